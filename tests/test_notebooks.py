"""Notebooks are found, parameterized and cleaned; each way to break the contract is told."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from labkit import checker, notebooks

HERE = Path(__file__).parent
COMMITTED = sorted((HERE.parent / "notebooks").glob("[0-9]*.ipynb"))
_spec = importlib.util.spec_from_file_location("factory", HERE / "notebook_factory.py")
factory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(factory)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_notebooks_keep_the_contract(path):
    assert notebooks.check(path) == []


def test_profiles_hold_good_values_of_parameters_that_exist():
    params, known = COMMITTED[0].parent / "params", set()
    for path in COMMITTED:
        known |= set(notebooks.parameters(path))
        own = [f for f in params.glob("*/*.yaml") if f.stem == path.stem]
        for file in own:
            notebooks.validate(yaml.safe_load(file.read_text("utf-8")), path)
    for file in params.glob("*.yaml"):
        assert set(yaml.safe_load(file.read_text("utf-8"))) <= known, file.name


def test_a_good_notebook_has_no_problems(tmp_path):
    assert notebooks.check(factory.save(factory.good(), tmp_path / "02_lora.ipynb")) == []


def code(nb, last=True):
    return [c for c in nb.cells if c.cell_type == "code"][-1 if last else 0]


def swap_sections(nb):
    headings = [c for c in nb.cells if c.source.startswith("## ")]
    headings[0].source, headings[1].source = headings[1].source, headings[0].source


def drop(nb, text):
    nb.cells = [c for c in nb.cells if c.source != text]


def say(text):
    return lambda nb: code(nb).outputs.append(new_output("stream", name="stdout", text=text))


BROKEN = {
    "begin with a title": lambda nb: nb.cells.insert(0, new_markdown_cell("no title")),
    "no prediction stands": lambda nb: nb.cells[0].update(source="# LoRA\n\nQuestion?"),
    "found 0": lambda nb: nb.cells[1].metadata.update(tags=[]),
    "found 2": lambda nb: code(nb).metadata.update(tags=["parameters"]),
    "must be the first code cell": lambda nb: nb.cells.insert(1, new_code_cell("1", execution_count=1)),
    "rank must be a literal": lambda nb: nb.cells[1].update(source="rank = int(8)"),
    "expected `name = literal`, got `import os`": lambda nb: nb.cells[1].update(source="import os"),
    "`a, b = (1, 2)`": lambda nb: nb.cells[1].update(source="a, b = 1, 2"),
    "limits for 'rnak'": lambda nb: nb.metadata.labkit.update(limits={"rnak": [1, 2]}),
    "section `## Train` is missing": lambda nb: drop(nb, "## Train"),
    "once each, in this order": swap_sections,
    "once each": lambda nb: nb.cells.insert(3, new_markdown_cell("## Train")),
    "stray metadata 'papermill'": lambda nb: nb.metadata.update(papermill={}),
    "stray metadata 'widgets'": lambda nb: nb.metadata.update(widgets={}),
    "cell 1: stray metadata 'execution'": lambda nb: nb.cells[1].metadata.update(execution={}),
    "kernel must be": lambda nb: nb.metadata.kernelspec.update(name="venv"),
    "labkit.seconds_cpu must be int": lambda nb: nb.metadata.labkit.update(seconds_cpu="60"),
    "error output ValueError: bad": lambda nb: code(nb).outputs.append(
        new_output("error", ename="ValueError", evalue="bad", traceback=[])
    ),
    "expected [3], got [7]": lambda nb: code(nb).update(execution_count=7),
    "expected [1], got [None]": lambda nb: code(nb, last=False).update(execution_count=None),
    "empty code cell": lambda nb: nb.cells.append(new_code_cell("")),
    "21 lines of code": lambda nb: code(nb).update(source="run.finish()\n" * 21),
    "bytes; at most 600,000": say("x" * 600_001),
    "a path of this machine": say("saved to /" + "home/someone/model"),
    "a bare model": say("LlamaForCausalLM(\n  (model): …"),
    "a widget view": lambda nb: code(nb).outputs.append(
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
    ),
    "shows no claims table": lambda nb: drop(nb, "run.claims_table()"),
    "claim 6 has no row": lambda nb: nb.metadata.labkit.update(claims=[5, 6]),
    "does not close the run": lambda nb: code(nb).update(source="print()"),
}  # fmt: skip


@pytest.mark.parametrize("problem", BROKEN)
def test_each_breach_is_told(problem, tmp_path):
    nb = factory.good()
    BROKEN[problem](nb)
    found = notebooks.check(factory.save(nb, tmp_path / "02_lora.ipynb"))
    assert any(problem in line for line in found), found


def test_pictures_are_not_searched_for_paths(tmp_path):
    nb = factory.good()
    page = '<img src="data:image/png;base64,abc/' + 'home/xyz+/tmp/abc="/>'
    code(nb).outputs.append(
        new_output("display_data", {"image/png": "a/home/b", "text/html": page})
    )
    assert notebooks.check(factory.save(nb, tmp_path / "02_lora.ipynb")) == []


def test_the_start_page_needs_no_technique_sections(tmp_path):
    nb = factory.good()
    nb.cells = nb.cells[:2]
    path = factory.save(nb, tmp_path / "00_start_here.ipynb")
    assert notebooks.check(path) == []
    assert checker.check(factory.save(nb, tmp_path / "02_lora.ipynb")) != []


def test_clean_makes_a_papermill_run_committable(tmp_path):
    nb = factory.good()
    nb.metadata.update(papermill={"duration": 1}, widgets={"state": {}}, extra=1)
    nb.metadata.kernelspec.name = "other"
    nb.metadata.language_info.version = "3.11.7"
    nb.cells[1].metadata.update(papermill={"duration": 1}, execution={"iopub": ""})
    nb.cells[1].metadata.tags.append("papermill-error-cell-tag")
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "VBox()"}
    code(nb).outputs.append(new_output("display_data", view, metadata={"a": 1}))
    notebooks.clean(nb)
    path = factory.save(nb, tmp_path / "02_lora.ipynb")
    assert notebooks.check(path) == []
    assert "version" not in nb.metadata.language_info


@pytest.fixture
def library(tmp_path, monkeypatch):
    for name in ("00_start_here", "02_lora", "06_instruction_tuning"):
        factory.save(factory.good(), tmp_path / f"{name}.ipynb")
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["02_lora", "lora", "02", "LoRA", "02_lora.ipynb"])
def test_names_are_found_by_number_name_or_both(library, name):
    assert notebooks.find(name) == library / "02_lora.ipynb"


def test_an_unknown_name_gets_the_nearest_and_the_list(library):
    with pytest.raises(ValueError, match="'lroa', did you mean 'lora'.*06_instruction_tuning"):
        notebooks.find("lroa")


def test_listing_reads_title_and_cost_from_the_metadata(library):
    found = notebooks.available()
    assert [n.name for n in found] == ["00_start_here", "02_lora", "06_instruction_tuning"]
    assert found[1].title == "LoRA" and found[1].seconds_cpu == 60 and found[1].claims == (5,)


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    (tmp_path / "02_x.ipynb").write_text("not json")
    with pytest.raises(ValueError, match="02_x.ipynb is not a notebook"):
        notebooks.read(tmp_path / "02_x.ipynb")


PARAMETERS = """rank: int = 8  # size of the update
rate = 1e-3
data = "tinytown"
quick = False
ranks = [1, 8]
limit: int | None = None
revision: str | None = None
anything = None
loss = "sft"
"""


@pytest.fixture
def typed(tmp_path):
    limits = {"rank": [1, None], "ranks": [1, 64], "rate": [0, 1], "loss": ["sft", "dpo"]}
    return factory.save(factory.tiny("1", PARAMETERS, limits), tmp_path / "02_x.ipynb")


def test_parameters_are_read_with_type_default_and_comment(typed):
    found = notebooks.parameters(typed)
    assert found["rank"].kind == "int" and found["rank"].default == 8
    assert found["rank"].help == "size of the update"
    assert found["rate"].kind == "float" and found["ranks"].kind == "list[int]"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("rank", "16", 16),
        ("rank", 16, 16),
        ("rate", "1e-4", 1e-4),  # YAML 1.1 reads this as a text
        ("rate", 1, 1.0),
        ("data", "123", "123"),
        ("quick", "true", True),
        ("ranks", "[1, 2]", [1, 2]),
        ("limit", "null", None),
        ("limit", "5", 5),
        ("revision", "null", None),
        ("revision", "main", "main"),
        ("anything", "3", 3),
    ],
)
def test_good_values_come_back_in_their_type(typed, name, given, expected):
    value = notebooks.validate({name: given}, typed)[name]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("rnak", 8, "no parameter 'rnak', did you mean 'rank'"),
        ("rank", "big", "'rank' of 02_x must be int .default 8.; got 'big'"),
        ("rank", 8.5, "must be int"),
        ("rank", True, "must be int"),
        ("rank", "null", "must be int"),
        ("rank", -1, "'rank' of 02_x must be at least 1; got -1"),
        ("rate", "fast", "must be float"),
        ("rate", "nan", "between 0 and 1; got nan"),
        ("data", 7, "must be str"),
        ("quick", "2", "must be bool"),
        ("ranks", "8", r"must be list\[int\]"),
        ("ranks", "[1, x]", r"must be list\[int\]"),
        ("ranks", "[8, 128]", "between 1 and 64; got 128"),
        ("loss", "ppo", "one of sft, dpo; got 'ppo'"),
        ("limit", "some", r"must be int \| None"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(typed, name, given, message):
    with pytest.raises(ValueError, match=message):
        notebooks.validate({name: given}, typed)
