"""Small synthetic notebooks for the tests of the checker and the command line."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit.checker import SECTIONS

CLAIMS = (
    '<table class="labkit-claims"><tr><th>#</th><th>verdict</th></tr>'
    "<tr><td>5</td><td>holds</td></tr></table>"
)


def good(parameters="rank: int = 8  # size of the update\nlearning_rate = 1e-3"):
    """A technique notebook that keeps the contract, as if it had been executed."""
    cells = [
        new_markdown_cell("# LoRA\n\n**Question.** How much?\n\n**Prediction.** Most."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
    ]
    for name in SECTIONS:
        cells.append(new_markdown_cell(f"## {name}"))
        if name == "Claims":
            output = new_output("display_data", {"text/html": CLAIMS, "text/plain": "# | verdict"})
            cells.append(new_code_cell("run.claims_table()", outputs=[output]))
        if name == "Close":
            cells.append(new_code_cell("run.finish()"))
    code = [cell for cell in cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
    meta = {"question": "How much?", "seconds_cpu": 60, "memory_mb": 900, "claims": [5]}
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    return new_notebook(
        cells=cells,
        metadata={"labkit": meta, "kernelspec": kernel, "language_info": {"name": "python"}},
    )


def tiny(code, parameters="rank: int = 8\ndata = 'tinytown'", limits=None):
    """A notebook that runs in a second: a parameters cell and one cell of `code`."""
    cells = [
        new_markdown_cell("# Tiny\n\nA question."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_markdown_cell("## Work"),
        new_code_cell(code),
    ]
    return new_notebook(cells=cells, metadata={"labkit": {"limits": limits or {}}})


def save(nb, path):
    """Write `nb` to `path` and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path
