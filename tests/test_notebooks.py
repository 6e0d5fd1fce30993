"""Notebooks are found by name, their parameters are checked, and a run's traces are cleaned."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit import notebooks

PARAMETERS = """rank: int = 8  # size of the update; rank = 1 is the least
learning_rate = 1e-3
data = "tinytown"
quick = False
ranks = [1, 8]
anything = None
loss = "sft"
dropout = 0.0
part = 4
alpha = 16.0
"""
DEFAULTS = [8, 1e-3, "tinytown", False, [1, 8], None, "sft", 0.0, 4, 16.0]
LIMITS = {"rank": [1, None], "ranks": [1, 64], "learning_rate": {"gt": 0, "lt": 1}}
LIMITS |= {"loss": ["sft", "dpo"], "data": {"min_length": 1}, "dropout": {"ge": 0, "lt": 1}}
ABOUT = {"limits": LIMITS, "renamed": {"rate": "learning_rate"}, "multiples": {"rank": "part"}}


def save(path, parameters=PARAMETERS, **about):
    cell = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = new_notebook(cells=[new_markdown_cell("# LoRA"), cell], metadata={"labkit": about})
    nbformat.write(nb, path)
    return path


@pytest.fixture
def typed(tmp_path):
    return save(tmp_path / "02_x.ipynb", **ABOUT)


@pytest.fixture
def library(tmp_path, monkeypatch):
    for name in ("00_start_here", "02_lora", "06_instruction_tuning"):
        save(tmp_path / f"{name}.ipynb", seconds_cpu=60, claims=[5])
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(tmp_path))
    return tmp_path


def test_names_are_found_by_number_name_or_both_and_others_refused(library, monkeypatch):
    for name in ("02_lora", "lora", "02", "LoRA", "02_lora.ipynb", "lo"):
        assert notebooks.find(name) == library / "02_lora.ipynb"
    found = notebooks.available()
    assert [n.name for n in found] == ["00_start_here", "02_lora", "06_instruction_tuning"]
    assert (found[1].title, found[1].seconds_cpu, found[1].claims) == ("LoRA", 60, [5])
    with pytest.raises(ValueError, match="02_lora"):
        notebooks.find("lroa")
    save(library / "06_instruments.ipynb")
    for several in ("06", "instru"):
        with pytest.raises(ValueError, match="06_instruction_tuning, 06_instruments"):
            notebooks.find(several)
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(library / "none"))
    with pytest.raises(FileNotFoundError, match="none"):
        notebooks.available()


def test_parameters_are_names_and_defaults_whatever_else_the_line_holds(typed):
    assert list(notebooks.parameters(typed).values()) == DEFAULTS


@pytest.mark.parametrize("line", ["rank = int(8)", "import os", "a, b = 1, 2"])
def test_a_parameters_cell_holds_literals_only(tmp_path, line):
    with pytest.raises(ValueError, match="02_y.ipynb"):
        notebooks.parameters(save(tmp_path / "02_y.ipynb", line))


GOOD = [("rank", "16", 16), ("learning_rate", "1e-4", 1e-4), ("data", "a # b", "a # b")]
GOOD += [("quick", "true", True), ("ranks", "[1, 2]", [1, 2]), ("anything", "null", None)]
GOOD += [("loss", "dpo", "dpo"), ("dropout", 0, 0.0)]
BAD = [("rnak", 8), ("rank", "big"), ("rank", 8.5), ("rank", True), ("rank", "null"), ("rank", -1)]
BAD += [("learning_rate", "fast"), ("learning_rate", "nan"), ("learning_rate", 0), ("data", 7)]
BAD += [("ranks", "8"), ("ranks", "[1, x]"), ("ranks", "[8, 128]"), ("ranks", [0]), ("loss", "ppo")]
BAD += [("quick", "2"), ("data", ""), ("dropout", "1"), ("alpha", "inf"), ("rank", 10), ("part", 3)]


@pytest.mark.parametrize(("name", "given", "expected"), GOOD)
def test_good_values_come_back_in_their_type(typed, name, given, expected):
    value = notebooks.validate({name: given}, typed)[name]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(("name", "given"), BAD)
def test_bad_values_are_refused_by_name(typed, name, given):
    with pytest.raises(ValueError, match=name):
        notebooks.validate({name: given}, typed)


def test_later_values_win_and_a_former_name_is_accepted_with_a_warning(typed, caplog):
    first, later = {"learning_rate": 0.1, "part": 3}, {"rate": "0.5", "part": 2}
    values = notebooks.validate(first, typed, later)
    assert values == {"learning_rate": 0.5, "part": 2} and "learning_rate" in caplog.text


def test_clean_leaves_source_outputs_tags_and_the_metadata_of_labkit(tmp_path):
    path = save(tmp_path / "02_x.ipynb", claims=[5])
    nb = nbformat.read(path, as_version=4)
    nb.metadata.update(papermill={"duration": 1}, widgets={"state": {}})
    nb.cells[1].metadata.update(papermill={"duration": 1}, execution={"iopub": ""})
    nb.cells[1].metadata.tags.append("papermill-error-cell-tag")
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "VBox()"}
    copy = {"text/html": "<p>its copy</p>"}
    for data in (view, copy):
        nb.cells[1].outputs.append(new_output("display_data", data, metadata={"a": 1}))
    nbformat.write(nb, path)
    notebooks.clean(path)
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert set(nb.metadata) == {"kernelspec", "language_info", "labkit"}
    assert nb.cells[1].metadata == {"tags": ["parameters"]} and nb.cells[1].source == PARAMETERS
    (output,) = nb.cells[1].outputs
    assert output.data == copy and output.metadata == {}
