"""The command line refuses early, records what it ran, and closes what is interrupted."""

import os
import signal
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from labkit import cli, doctor, memory, notebooks, record

CODE = """import os
from pathlib import Path
from labkit import record
run = record.start("02_tiny", {"rank": rank, "data": data})
run.metric(double=2 * rank, here=os.getcwd(), found=Path(data).exists())
run.finish()"""
TRAIN = """import os, time
from pathlib import Path
Path(os.environ["LABKIT_PROGRESS"]).write_text("step 3/9 · loss 1.234 · 5 s left")
time.sleep(3)"""
SLEEP = """import time
from pathlib import Path
from labkit import record
run = record.start("04_slow", {"rank": rank})
run.path("checkpoints/checkpoint-1/made_with.json").write_text("{}")
Path("started").write_text("")
time.sleep(60)"""
PARAMETERS = "rank: int = 8\npart = 1\ndata = 'tinytown'\nresume = ''"


def save(path, code, parameters=PARAMETERS, **about):
    """A notebook that runs in a second: a parameters cell and one cell of `code`."""
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [new_markdown_cell("## Work"), new_code_cell(code)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"labkit": about}), path)
    return path


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder with two tiny notebooks and a profile; the current folder is elsewhere."""
    folder, here = tmp_path / "notebooks", tmp_path / "here"
    about = {"limits": {"rank": [1, None]}, "renamed": {"r": "rank"}, "multiples": {"rank": "part"}}
    save(folder / "02_tiny.ipynb", CODE, **about)
    save(folder / "03_bad.ipynb", "raise ValueError(f'no {rank}')")
    (folder / "params").mkdir()
    (folder / "params" / "gpu.yaml").write_text("rank: 32\nother: 1\n")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(folder))
    monkeypatch.setenv("LABKIT_RUNS", str(tmp_path))
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


REFUSED = [
    ("tyni", ["tyni"]),
    ("rank", ["tiny", "-p", "rank", "-1"]),
    ("part", ["tiny", "-p", "rank", "9", "-p", "part", "2"]),
    ("nowhere", ["tiny", "-p", "resume", "/nowhere"]),
    ("none.jsonl", ["tiny", "-p", "data", "none.jsonl"]),
    ("bad.jsonl", ["tiny", "-p", "data", "bad.jsonl"]),
    ("chosen", ["tiny", "-p", "data", "pair.jsonl"]),
    ("missing.yaml", ["tiny", "-f", "missing.yaml"]),
    ("list.yaml", ["tiny", "-f", "list.yaml"]),
    ("gpuu", ["tiny", "--profile", "gpuu"]),
    ("list.yaml", ["tiny", "--output", "list.yaml"]),
    ("notebook", []),
    ("rnak", ["tiny", "-p", "rnak=4"]),
    ("03_bad", ["tiny", "bad", "-p", "r=4"]),  # the second is bad: the first must not run
]


@pytest.mark.parametrize(("named", "arguments"), REFUSED)
def test_bad_input_is_refused_before_a_kernel_starts(library, call, monkeypatch, named, arguments):
    Path("list.yaml").write_text("- 1\n")
    Path("bad.jsonl").write_text('{"colour": "red"}\n')
    Path("pair.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    monkeypatch.setattr(notebooks, "execute", lambda *_, **__: pytest.fail("a kernel was started"))
    status, out, err = call("run", *arguments)
    assert status == 2 and out == "" and named in err and "Traceback" not in err
    assert not (library / "runs").exists()


def test_a_run_passes_parameters_records_and_keeps_the_notebook(library, call, monkeypatch):
    Path("mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    status, out, err = call("run", "tiny", "-p", "r=16", "-p", "data", "mine.jsonl")
    assert status == 0, err
    assert "LABKIT_RUN_DIR" not in os.environ  # what runs next in this process is another run
    (folder,) = (library / "runs" / "02_tiny").iterdir()
    (found,) = record.read_runs()
    assert found["parameters"] == {"rank": 16, "data": "mine.jsonl"}
    assert found["metrics"]["double"] == 32 and found["status"] == "finished"
    assert found["metrics"]["found"]  # a relative path means the caller's folder
    assert "papermill" not in nbformat.read(folder / "notebook.ipynb", as_version=4).metadata
    assert sorted(f.name for f in folder.iterdir()) == ["notebook.ipynb", "record.json"]
    assert "finished" in out and "Work" in err

    page = library / "runs" / "report.html"
    assert page.as_uri() in out and folder.name in page.read_text("utf-8")
    page.unlink()
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert call("report", "--open") == (0, f"{page.as_uri()}\n", "") and opened == [page.as_uri()]
    status, _, err = call("report", "nowhere")
    assert status == 2 and "nowhere" in err and not Path("nowhere").exists()


def test_the_line_of_a_training_is_passed_on_while_a_cell_works(library, call, monkeypatch):
    save(library / "notebooks" / "05_train.ipynb", TRAIN)
    monkeypatch.setattr(cli, "TICK", 0.2)
    status, _, err = call("run", "train")
    assert status == 0 and "Work · step 3/9 · loss 1.234 · 5 s left" in err
    assert "LABKIT_PROGRESS" not in os.environ


def test_a_failing_cell_gives_its_error_and_is_recorded(library, call):
    status, _, err = call("run", "bad", "tiny", "--profile", "gpu", "--output", "mine")
    assert status == 1 and "ValueError: no 32" in err and "Traceback" not in err
    (folder,) = Path("mine/runs/03_bad").iterdir()
    (found,) = record.read_runs("mine")
    assert found["status"] == "failed" and "no 32" in found["error"]
    assert (folder / "notebook.ipynb").exists()
    assert not Path("mine/runs/02_tiny").exists()  # stopped at the first failure
    assert call("run", "bad", "tiny", "--keep-going")[0] == 1
    assert (library / "runs" / "02_tiny").exists()


def test_later_sources_of_parameters_win(library, call, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_run_one", lambda path, values, _: given.append(values) or True)
    monkeypatch.setattr(cli, "_check", lambda *_: None)
    Path("p.yaml").write_text("rank: 4\ndata: file\n")
    own = library / "notebooks" / "params" / "gpu" / "02_tiny.yaml"
    assert call("run", "tiny", "--profile", "gpu", "-f", "p.yaml", "-p", "data", "last")[0] == 0
    assert call("run", "tiny", "--profile", "gpu")[0] == 0
    own.parent.mkdir()
    own.write_text("r: 16\n")  # a former name
    assert call("run", "tiny", "--profile", "gpu")[0] == 0
    assert given == [{"rank": 4, "data": "last"}, {"rank": 32}, {"rank": 16}]


def test_what_cannot_fit_is_refused_unless_forced(library, call, monkeypatch):
    save(library / "notebooks" / "02_lora.ipynb", CODE, f"model = 'tinytown'\n{PARAMETERS}")

    def check_fits(notebook, values):
        assert notebook == "02_lora" and values["rank"] == 8
        raise ValueError(f"{values['model']} does not fit")

    ran = []
    monkeypatch.setattr(memory, "check_fits", check_fits, raising=False)
    monkeypatch.setattr(cli, "_run_one", lambda path, *_: ran.append(path.stem) or True)
    status, _, err = call("run", "02_lora", "-p", "model", "huge")
    assert status == 2 and not ran and "huge" in err
    assert call("run", "02_lora", "-p", "model", "huge", "--force")[0] == 0
    assert call("run", "02_lora")[0] == 0 and len(ran) == 2


def test_refresh_executes_in_place_and_leaves_a_failing_notebook_alone(library, call):
    good = save(library / "notebooks" / "04_sum.ipynb", "1 + 1")
    bad = library / "notebooks" / "03_bad.ipynb"
    before = bad.read_bytes()
    assert call("refresh", "04_sum")[0] == 0 and call("refresh", "03_bad")[0] == 1
    nb = nbformat.read(good, as_version=4)
    assert nb.cells[-1].outputs[0].data["text/plain"] == "2" and not nb.cells[-1].metadata
    assert bad.read_bytes() == before
    assert len(list(good.parent.glob(".*"))) == 0  # nothing is left beside them


def stopped(command, send, *signals):
    """`labkit <command> slow`, stopped while its last cell runs, and its output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "labkit.cli", command, "slow"]
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    deadline = time.monotonic() + 60
    while not list(Path.cwd().parent.rglob("started")) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in signals:
        send(process.pid, getattr(signal, name))
        time.sleep(0.2)
    return process, *process.communicate(timeout=60)


# Ctrl-C reaches the whole group, kernel included; a scheduler stops the parent, or all of them.
STOPS = [(os.kill, "SIGHUP"), (os.kill, "SIGINT", "SIGTERM"), (os.killpg, "SIGINT", "SIGINT")]


@pytest.mark.parametrize("stop", [*STOPS, (os.killpg, "SIGTERM")])
def test_a_stopped_run_is_closed_as_interrupted_with_its_folder(library, stop):
    save(library / "notebooks" / "04_slow.ipynb", SLEEP)
    process, out, err = stopped("run", *stop)
    (folder,) = (library / "runs" / "04_slow").iterdir()
    assert process.returncode == 130 and record.read_runs()[0]["status"] == "interrupted", err
    assert out == "" and len(err.splitlines()) == 2  # the section, and how to go on
    assert f"labkit run 04_slow -p resume={folder}" in err and "Traceback" not in err
    assert {f.name for f in folder.iterdir()} == {"checkpoints", "notebook.ipynb", "record.json"}


def test_a_stopped_refresh_leaves_the_notebook_alone(library):
    path = save(library / "notebooks" / "04_slow.ipynb", SLEEP)
    before = path.read_bytes()
    process, _, err = stopped("refresh", os.killpg, "SIGINT")
    assert process.returncode == 1 and "interrupted by Ctrl-C" in err
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*"))
    assert [run["status"] for run in record.read_runs()] == ["interrupted"]


def test_list_and_show_tell_of_notebooks_and_doctor_a_remedy(library, call, monkeypatch):
    status, out, _ = call("list")
    assert status == 0 and "02_tiny" in out and "03_bad" in out
    status, out, _ = call("show", "2")
    assert status == 0 and "rank: int = 8" in out and "rank from 1" in out
    assert call("show", "tyni")[0] == 2
    monkeypatch.setattr(doctor, "_services", lambda: iter([(doctor.NOTE, "offline", "log in")]))
    monkeypatch.setattr(doctor, "_other", lambda pin: "torch 1.0" if "torch=" in pin else "")
    status, out, _ = call("doctor")
    assert "torch 1.0" in out and "requirements.lock" in out and "→ log in" in out
    assert status == int(doctor.PROBLEM in out)


def test_the_commands_of_the_readme_parse():
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    lines = [line.split("#")[0].split() for line in text.splitlines() if line[:7] == "labkit "]
    for _, command, *arguments in lines:
        cli.app.commands[command].make_context(command, arguments)
