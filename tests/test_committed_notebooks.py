"""The contract of the committed notebooks: order, outputs, size, sections, claims, parameters."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from labkit import cli, notebooks

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LESSON = """In short, The idea, Write it yourself, With the libraries, Train, Before and after,
Ablation, Prediction and outcome, In practice, Interview question, Explore, Exercises,
Next""".replace("\n", " ").split(", ")
MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(?:root|home|Users|tmp|work|mnt|opt)/\w+")
WIDGET = "application/vnd.jupyter.widget-view+json"

every = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
each_technique = pytest.mark.parametrize("path", PATHS[1:], ids=lambda path: path.stem)


def read(path):
    """The notebook, and its code cells."""
    nb = nbformat.read(path, as_version=4)
    return nb, [cell for cell in nb.cells if cell.cell_type == "code"]


def titles(cells):
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return [title.strip() for title in re.findall(r"(?m)^## (.+)$", text)]


def section(nb, name):
    """The cells below the heading `name`."""
    return [c for i, c in enumerate(nb.cells) if titles(nb.cells[: i + 1])[-1:] == [name]]


@every
def test_a_valid_small_file_executed_in_order_without_stray_metadata(path):
    nb, cells = read(path)
    nbformat.validate(nb)
    assert path.stat().st_size <= 600_000
    assert set(nb.metadata) == {"kernelspec", "language_info", "labkit"}
    assert nb.metadata.kernelspec.name == "python3"
    about = nb.metadata.labkit
    assert about.question and type(about.seconds_cpu) is type(about.memory_mb) is int
    assert isinstance(about.claims, list)
    assert all(set(cell.metadata) <= {"tags", "jupyter"} for cell in nb.cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in cells]
    assert min(lengths) > 0 and max(lengths[1:]) <= 30  # the first holds the parameters


@every
def test_outputs_have_no_errors_paths_models_or_dead_widgets(path):
    for output in (output for cell in read(path)[1] for output in cell.outputs):
        data = output.get("data", {})
        assert output.output_type != "error" and WIDGET not in data
        for text in [output.get("text", ""), *(v for k, v in data.items() if k[:5] == "text/")]:
            assert not MACHINE_PATH.search(re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
            assert not re.match(r"\w*(?:Model|ForCausalLM)\w*\(\n", text)


@every
def test_the_first_code_cell_holds_the_parameters(path):
    nb, cells = read(path)
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [0] and nb.cells[0].source.startswith("# ")
    known, about = notebooks.parameters(path), nb.metadata.labkit
    assert set(about.get("limits", {})) | set(about.get("renamed", {}).values()) <= set(known)
    assert notebooks.validate(known, path) == known  # the defaults keep their own limits


@each_technique
def test_a_question_and_a_prediction_come_first_and_the_sections_once_in_order(path):
    nb, (parameters, *_) = read(path)
    before = " ".join(cell.source for cell in nb.cells[: nb.cells.index(parameters)]).lower()
    assert "question" in before and "prediction" in before
    assert [title for title in titles(nb.cells) if title in LESSON] == LESSON


@each_technique
def test_what_only_keeps_books_is_folded_and_little_code_is_left_to_read(path):
    nb, cells = read(path)
    folded = [cell for cell in cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    for name in ("In short", "Prediction and outcome", "Interview question", "Next"):
        code = [cell for cell in section(nb, name) if cell.cell_type == "code"]
        assert all(cell in folded for cell in code), name
    for name in ("Write it yourself", "With the libraries", "Train"):
        assert not any(cell in folded for cell in section(nb, name)), name
    lines = [line for cell in cells if cell not in folded for line in cell.source.splitlines()]
    assert sum(bool(line.strip()) and line.strip()[0] != "#" for line in lines) <= 270


@each_technique
def test_every_promised_claim_has_its_row_and_the_run_is_closed(path):
    nb, _ = read(path)
    claims = section(nb, "Prediction and outcome")
    outputs = [output for cell in claims for output in cell.get("outputs", [])]
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    table = [page for page in pages if 'class="labkit-claims"' in page][-1]
    shown = {int(number) for number in re.findall(r"<tr><td[^>]*>(\d+)</td>", table)}
    assert set(nb.metadata.labkit.claims) <= shown
    assert any(".finish(" in cell.source for cell in section(nb, "Next"))


@each_technique
def test_data_of_ones_own_is_checked_for_what_its_comment_asks(path):
    (about,) = (n for n in notebooks.available() if n.path == path)
    said = re.search(r'(?m)^data = "\w+"  # (\w+):', notebooks.parameters_cell(path))
    kind = said[1] if said else ""
    assert about.learns == (kind if kind in ("preferences", "prompts") else "answers")


def test_profiles_hold_good_values_of_parameters_that_exist():
    params, known = ROOT / "notebooks" / "params", set()
    for path in PATHS:
        known |= set(notebooks.parameters(path)) | set(notebooks.renamed(path))
        for file in params.glob(f"*/{path.stem}.yaml"):
            notebooks.validate(yaml.safe_load(file.read_text("utf-8")), path)
        for file in params.glob("*.yaml"):  # and with what all notebooks share
            notebooks.validate(cli._profile(file.stem, path), path)
    for file in params.glob("*.yaml"):
        assert set(yaml.safe_load(file.read_text("utf-8"))) <= known, file.name


@pytest.mark.parametrize("path", [*PATHS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_commands_to_copy_name_notebooks_and_parameters_that_exist(path):
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells)
    text = text.replace("\\\n", " ")
    for name, options in re.findall(r"labkit (?:run|show) ([a-z0-9][\w.]*)(.*)", text):
        called = notebooks.find(name)
        given = set(re.findall(r"-p (\w+)", options))
        known = {*notebooks.parameters(called), *notebooks.renamed(called)}
        assert given <= known, (name, given - known)
