"""The contract of a committed notebook, checked: order, outputs, size, metadata.

`check` returns one line for each breach, so that a writer sees them all at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from labkit import notebooks

SECTIONS = (
    "Setup", "The idea", "The core", "By hand", "The data", "Train", "Evaluate",
    "Vary one dial", "Claims", "Explore", "Exercises", "Close",
)  # fmt: skip
EXEMPT = ("00_start_here",)  # a table of contents, not a technique
MAX_BYTES = 600_000
MAX_LINES = 20  # a cell that a reader takes in at once
_METADATA = {"kernelspec", "language_info", "labkit"}
_LABKIT = {"question": str, "seconds_cpu": int, "memory_mb": int, "claims": list}
_MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(?:root|home|Users|tmp|work|mnt|opt)/\w+")
_BARE_MODEL = re.compile(r"^\w*(?:Model|ForCausalLM)\w*\(\n")


def check(path: Path) -> list[str]:
    """What breaks the contract in the notebook at `path`; empty when all is well."""
    import nbformat

    nb = notebooks.read(path)
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        return [f"invalid notebook: {str(error).splitlines()[0]}"]
    if not nb.cells:
        return ["the notebook is empty"]
    technique = path.stem not in EXEMPT
    found = _size(path) + _title(nb, technique) + _parameters(nb) + _metadata(nb) + _cells(nb)
    if technique:
        found += _sections(nb) + _claims(nb) + _closed(nb)
    return found


def _size(path: Path) -> list[str]:
    size = path.stat().st_size
    return [f"{size:,} bytes; at most {MAX_BYTES:,} allowed"] if size > MAX_BYTES else []


def _title(nb: Any, technique: bool) -> list[str]:
    first = nb.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# \S", first.source):
        return ["the first cell must be markdown and begin with a title (`# …`)"]
    words = ("question", "prediction") if technique else ()
    before = " ".join(c.source for c in nb.cells[: _first_code(nb)]).lower()
    return [f"no {word} stands before the first code cell" for word in words if word not in before]


def _first_code(nb: Any) -> int:
    kinds = [cell.cell_type for cell in nb.cells]
    return kinds.index("code") if "code" in kinds else len(kinds)


def _parameters(nb: Any) -> list[str]:
    tagged = [i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1 or nb.cells[tagged[0]].cell_type != "code":
        return [f"expected one code cell tagged `parameters`, found {len(tagged)}"]
    found = []
    if tagged[0] != _first_code(nb):
        found.append("the parameters cell must be the first code cell")
    try:
        known = {p.name: p for p in notebooks.parse_parameters(nb.cells[tagged[0]].source)}
    except (ValueError, SyntaxError) as error:
        return [*found, f"parameters cell: {error}"]
    limits = nb.metadata.get("labkit", {}).get("limits", {})
    return found + [f"limits for {n!r}, which is no parameter" for n in limits if n not in known]


def _metadata(nb: Any) -> list[str]:
    found = [f"stray metadata {name!r}" for name in sorted(set(nb.metadata) - _METADATA)]
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel must be `python3`")
    meta = nb.metadata.get("labkit", {})
    for name, kind in _LABKIT.items():
        if type(meta.get(name)) is not kind:
            found.append(f"metadata labkit.{name} must be {kind.__name__}, got {meta.get(name)!r}")
    for i, cell in enumerate(nb.cells):
        for name in sorted(set(cell.metadata) - {"tags"}):
            found.append(f"cell {i}: stray metadata {name!r}")
    return found


def _cells(nb: Any) -> list[str]:
    found, expected = [], 1
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        if not cell.source.strip():
            found.append(f"cell {i}: empty code cell")
            continue
        if cell.execution_count != expected:
            found.append(
                f"cell {i}: not run in order in a fresh kernel "
                f"(expected [{expected}], got [{cell.execution_count}])"
            )
        expected += 1
        length = sum(1 for line in cell.source.splitlines() if line.strip())
        if length > MAX_LINES and "parameters" not in cell.metadata.get("tags", []):
            found.append(f"cell {i}: {length} lines of code, at most {MAX_LINES} allowed")
        found += [f"cell {i}: {problem}" for o in cell.outputs for problem in _output(o)]
    return found


def _output(output: Any) -> list[str]:
    if output.output_type == "error":
        return [f"error output {output.ename}: {output.evalue}"]
    data = output.get("data", {})
    texts = [output.get("text", "")]
    texts += [v for k, v in data.items() if k.startswith("text/") and isinstance(v, str)]
    found = []
    for text in texts:
        bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
        if match := _MACHINE_PATH.search(bare):
            found.append(f"a path of this machine in the output: {match[0]}…")
        if _BARE_MODEL.match(text):
            found.append("a bare model is shown")
    if "application/vnd.jupyter.widget-view+json" in data:
        found.append("a widget view without its state (run `labkit refresh`)")
    return found


def _sections(nb: Any) -> list[str]:
    headings = [
        line[3:].strip()
        for cell in nb.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    found = [f"section `## {name}` is missing" for name in SECTIONS if name not in headings]
    order = [name for name in headings if name in SECTIONS]
    if not found and order != list(SECTIONS):
        found.append(f"sections must be, once each, in this order: {', '.join(SECTIONS)}")
    return found


def _section_cells(nb: Any, name: str) -> list[Any]:
    inside, cells = False, []
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (titles := re.findall(r"(?m)^## (.+)$", cell.source)):
            inside = titles[-1].strip() == name
        if inside:
            cells.append(cell)
    return cells


def _claims(nb: Any) -> list[str]:
    outputs = [o for c in _section_cells(nb, "Claims") for o in c.get("outputs", [])]
    pages = [str(o.get("data", {}).get("text/html", "")) for o in outputs]
    tables = [page for page in pages if 'class="labkit-claims"' in page]
    if not tables:
        return ["section Claims shows no claims table (`run.claims_table()`)"]
    shown = set(re.findall(r"<tr><td>(\d+)</td>", tables[-1]))
    promised = nb.metadata.get("labkit", {}).get("claims") or []
    return [f"claim {n} has no row in the claims table" for n in promised if str(n) not in shown]


def _closed(nb: Any) -> list[str]:
    code = "\n".join(c.source for c in _section_cells(nb, "Close") if c.cell_type == "code")
    return [] if ".finish(" in code else ["section Close does not close the run (`run.finish()`)"]
