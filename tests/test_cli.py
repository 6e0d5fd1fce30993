"""The command line refuses early, in one line, and records what it ran."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkit import cli, notebooks

_spec = importlib.util.spec_from_file_location(
    "factory", Path(__file__).parent / "notebook_factory.py"
)
factory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(factory)

CODE = """import os
from pathlib import Path
from labkit import tracking
run = tracking.start("02_tiny", {"rank": rank, "data": data})
run.metric(double=2 * rank, here=os.getcwd(), found=Path(data).exists())
run.finish()"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder with two tiny notebooks and a profile; the current folder is elsewhere."""
    folder = tmp_path / "notebooks"
    factory.save(factory.tiny(CODE, limits={"rank": [1, None]}), folder / "02_tiny.ipynb")
    factory.save(factory.tiny("raise ValueError(f'no {rank}')"), folder / "03_bad.ipynb")
    (folder / "params").mkdir()
    (folder / "params" / "gpu.yaml").write_text("rank: 32\nother: 1\n")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(folder))
    monkeypatch.setenv("LABKIT_RUNS", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LABKIT_RUN_DIR", raising=False)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capfd):
    """`call("run", …)` gives (exit status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["labkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def no_kernel(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(notebooks, "execute", refuse)


REFUSED = {
    "no notebook is called 'tyni', did you mean 'tiny'": ["tyni"],
    "no parameter 'rnak', did you mean 'rank'": ["tiny", "-p", "rnak", "4"],
    "'rank' of 02_tiny must be int (default 8); got 'big'": ["tiny", "-p", "rank", "big"],
    "must be at least 1; got -1": ["tiny", "-p", "rank", "-1"],
    "-f: there is no file missing.yaml": ["tiny", "-f", "missing.yaml"],
    "expected `name: value` lines": ["tiny", "-f", "list.yaml"],
    "not a YAML file": ["tiny", "-f", "broken.yaml"],
    "no --profile 'gpuu', did you mean 'gpu'": ["tiny", "--profile", "gpuu"],
    "cannot write to the run folder": ["tiny", "--output", "list.yaml"],
    "which notebook?": [],
    "requires 2 arguments": ["tiny", "-p", "rank"],
    # the second is bad: the first must not run either
    "03_bad has no parameter 'rnak'": ["bad", "tiny", "-p", "rnak", "4"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_before_a_kernel_starts(library, call, no_kernel, message):
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("a: [1\n")
    status, out, err = call("run", *REFUSED[message])
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err
    assert not (library / "runs").exists()


def test_a_run_passes_parameters_records_and_keeps_the_notebook(library, call):
    Path("mine.jsonl").write_text("{}\n")
    status, out, err = call("run", "tiny", "-p", "rank", 16, "-p", "data", "mine.jsonl")
    assert status == 0, err
    (folder,) = (library / "runs" / "02_tiny").iterdir()
    record = json.loads((folder / "record.json").read_text("utf-8"))
    assert record["parameters"] == {"rank": 16, "data": "mine.jsonl"}
    assert record["metrics"]["double"] == 32 and record["status"] == "finished"
    assert record["metrics"]["found"]  # a relative path means the caller's folder
    executed = notebooks.read(folder / "notebook.ipynb")
    assert "papermill" not in executed.metadata
    assert sorted(f.name for f in folder.iterdir()) == ["notebook.ipynb", "record.json"]
    progress = [line for line in err.splitlines() if line.startswith("02_tiny")]
    assert "02_tiny: finished" in out and "cell 4/5" in err and len(progress) == 2
    assert "LABKIT_RUN_DIR" not in os.environ

    status, out, _ = call("report")
    page = (library / "runs" / "report.html").read_text("utf-8")
    assert status == 0 and "report.html" in out and folder.name in page


def test_a_failing_cell_gives_its_error_and_is_recorded(library, call):
    status, _, err = call("run", "bad", "tiny", "--profile", "gpu")
    assert status == 1
    assert "03_bad, cell [3]: ValueError: no 32" in err and "Traceback" not in err
    (folder,) = (library / "runs" / "03_bad").iterdir()
    record = json.loads((folder / "record.json").read_text("utf-8"))
    assert record["status"] == "failed" and "no 32" in record["error"]
    assert (folder / "notebook.ipynb").exists()
    assert not (library / "runs" / "02_tiny").exists()  # stopped at the first failure


def test_a_full_disk_is_told_with_what_to_do(library, call):
    code = "raise RuntimeError('I/O error: No space left on device (os error 28)')"
    factory.save(factory.tiny(code), library / "notebooks" / "04_full.ipynb")
    status, _, err = call("run", "full")
    assert status == 1 and "No space left" in err and "choose another folder by --output" in err


def test_later_sources_of_parameters_win(library, call, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_run_one", lambda path, values, _: given.append(values) or True)
    Path("p.yaml").write_text("rank: 4\ndata: file\n")
    assert call("run", "tiny", "--profile", "gpu", "-f", "p.yaml", "-p", "data", "last")[0] == 0
    assert call("run", "tiny", "--profile", "gpu")[0] == 0
    own = library / "notebooks" / "params" / "gpu" / "02_tiny.yaml"
    own.parent.mkdir()
    own.write_text("rank: 16\n")
    assert call("run", "tiny", "--profile", "gpu")[0] == 0
    assert given == [{"rank": 4, "data": "last"}, {"rank": 32}, {"rank": 16}]


def test_what_cannot_fit_is_refused_unless_forced(library, call, monkeypatch, tiny_folder):
    code = "max_length = 256\nbatch_size = 16"
    nb = factory.tiny(CODE)
    nb.cells[1].source += f"\nmodel = 'tinytown'\n{code}"
    factory.save(nb, library / "notebooks" / "02_lora.ipynb")
    ran = []
    monkeypatch.setattr(cli, "_run_one", lambda path, *_: ran.append(path.stem) or True)
    huge = ["run", "02_lora", "-p", "model", tiny_folder(), "-p", "max_length", "9000000"]
    status, _, err = call(*huge)
    assert status == 2 and not ran and "Needs" in err and "--force" in err
    assert "Traceback" not in err
    status, _, err = call(*huge[:-3])
    assert status == 0, err
    assert call(*huge, "--force")[0] == 0 and len(ran) == 2


def test_keep_going_runs_the_rest_and_still_fails(library, call, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run_one", lambda path, *_: seen.append(path.stem) or False)
    status, _, err = call("run", "--all", "--keep-going")
    assert status == 1 and seen == ["02_tiny", "03_bad"] and "failed: 02_tiny, 03_bad" in err


def test_refresh_executes_in_place_and_leaves_no_trace(library, call):
    path = factory.save(factory.tiny("1 + 1"), library / "notebooks" / "04_sum.ipynb")
    assert call("refresh", "04_sum")[0] == 0
    nb = notebooks.read(path)
    assert nb.cells[-1].outputs[0].data["text/plain"] == "2"
    assert not nb.cells[-1].metadata and "papermill" not in nb.metadata
    assert [p.name for p in path.parent.glob("04*")] == ["04_sum.ipynb"]


def test_list_shows_every_notebook(library, call):
    status, out, _ = call("list")
    assert status == 0 and "02_tiny" in out and "03_bad" in out


def test_check_tells_all_problems(library, call):
    status, out, _ = call("check", "tiny")
    assert status == 1 and "02_tiny: section `## Train` is missing" in out


def test_the_console_script_is_installed():
    script = Path(sys.executable).parent / "labkit"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "report" in done.stdout
