"""The run record: complete, atomic, free of secrets; the report escapes what it shows."""

import json
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from conftest import python

from labkit import notebooks, plots, record, show, sweeps


def read(run):
    return json.loads((run.folder / "record.json").read_text("utf-8"))


def test_a_record_holds_what_a_run_was_given_and_measured(tmp_path):
    run = record.start("02_lora", {"rank": 8, "seed": 3, "hf_token": "hush"}, root=tmp_path)
    run.log({"loss": 2.0}, step=0)
    run.log({"loss": 1.0}, step=10)
    run.metric(accuracy=0.75)
    run.path("checkpoints/sft").mkdir(parents=True)  # a trainer's, which stays empty
    with run.timed("train"):
        pass
    run.finish()
    found = read(run)
    assert run.folder.parent == tmp_path / "runs" / "02_lora"
    assert [f.name for f in run.folder.iterdir()] == ["record.json"]
    assert found["status"] == "finished" and found["ended"] >= found["started"]
    assert found["parameters"] == {"rank": 8, "seed": 3, "hf_token": "(hidden)"}
    assert found["seeds"] == {"seed": 3} and found["metrics"] == {"accuracy": 0.75}
    assert found["history"] == [{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0}]
    assert found["versions"]["python"] == sys.version.split()[0]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert found["commit"].removesuffix("-dirty") == git.stdout.strip()
    assert found["hardware"]["cores"] >= 1 and list(found["timings"]) == ["train"]
    assert found["peak_memory_bytes"] > 5_000_000  # a Python process is never smaller


def test_scalars_of_libraries_and_numbers_that_are_not_finite_become_json(tmp_path):
    values = {"a": np.float32(0.5), "b": torch.tensor(2), "d": np.arange(3), "e": tmp_path}
    plain = {"a": 0.5, "b": 2, "d": [0, 1, 2], "e": str(tmp_path), "1": [1.5], "s": [3]}
    assert record.plain({**values, 1: torch.tensor([1.5]), "s": {3}}) == plain
    odd = record.plain([float("nan"), -np.inf, {"x": torch.tensor(float("nan"))}])
    assert json.loads(json.dumps(odd, allow_nan=False)) == odd


def test_claims_are_ordered_replaced_and_escaped(tmp_path):
    run = record.start("x", {}, root=tmp_path)
    with pytest.raises(ValueError, match="maybe"):
        run.claim(1, "c", "h", 1, "maybe")
    run.claim(2, "c", "h", 1, "undecided")
    run.claim(1, "<script>", "a | b", 0.123456, "not measured here")
    run.claim(2, "c", "h", 5, "does not hold here")  # the cell was run again
    assert [(c["number"], c["value"]) for c in read(run)["claims"]] == [(1, 0.123456), (2, 5)]
    run.claim(2, "another half of it", "h", 6, "holds")
    assert [c["value"] for c in read(run)["claims"]] == [0.123456, 5, 6]
    page = run.claims_table()._repr_html_()
    assert "labkit-claims" in page and "<script>" not in page and "0.1235" in page


def test_a_series_that_is_logged_again_begins_anew(tmp_path):
    run = record.start("x", {}, root=tmp_path)
    for steps in ((1, 2, 3), (1, 2)):  # the second training was stopped
        for step in steps:
            run.log({"loss": float(step)}, step)
        run.log({"eval_loss": 0.5}, steps[-1])
    run.log({"other_loss": 1.0}, 1)
    found = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    found += [{"step": 2, "eval_loss": 0.5}, {"step": 1, "other_loss": 1.0}]
    assert run.record["history"] == found


def test_a_closed_run_is_never_written_to_and_an_open_one_does_not_stay(tmp_path):
    first, second = (record.start("x", {}, root=tmp_path) for _ in range(2))
    assert read(first)["status"] == "interrupted"  # the first cell was run again
    second.finish()
    before = (second.folder / "record.json").read_bytes()
    claim = (1, "c", "h", 1, "holds")
    for name, given in {"log": [{"loss": 1.0}], "metric": [], "claim": claim, "timed": "x"}.items():
        with pytest.raises(RuntimeError, match="closed"):
            getattr(second, name)(*given)
    second.finish("failed")
    assert (second.folder / "record.json").read_bytes() == before
    code = "import sys; from labkit import record; record.start('y', {}, root=sys.argv[1])"
    assert python(code, tmp_path, WANDB_MODE="disabled").returncode == 0
    assert record.read_runs(tmp_path)[-1]["status"] == "interrupted"


def test_the_first_cell_checks_and_takes_a_notebooks_parameters(tmp_path):
    path = notebooks.find("02_lora")
    cell = notebooks.parameters(path) | {"__name__": "__main__", "something": object()}
    with pytest.raises(ValueError, match="train_examples"):
        record.start("02_lora", cell | {"train_examples": -5}, root=tmp_path)
    assert not (tmp_path / "runs").exists()
    run = record.start("02_lora", cell | {"rank": 4}, root=tmp_path)
    given = notebooks.parameters(path) | {"rank": 4}
    assert run.record["parameters"] == {k: given[k] for k in given if k != "wandb_project"}


def test_a_claim_says_what_decides_it_and_how_this_run_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "_FOLDER", tmp_path)
    monkeypatch.setattr(sweeps, "_read", {})
    point = {"rows": 2000, "epochs": 2.0, "dropout": 1 / 3, "stage": "compare"}
    points = [point | {"seed": s, "learning_rate": lr} for s in range(3) for lr in (1e-3, 1e-2)]
    (tmp_path / "rate.json").write_text(json.dumps({"runs": [*points, {"stage": "tune"}]}))
    given = {"train_examples": 1200, "epochs": 2.0, "dropout": 0.33, "learning_rate": 0.5}
    run = record.start("02_lora", given, root=tmp_path)
    run.claim(1, "c", "h", 1, "holds")
    assert record.recorded("rate")["runs"][0]["rows"] == 2000
    said = "train_examples 1200 instead of 2000"
    assert sweeps.differs("rate") == said and said in capsys.readouterr().out
    run.claim(2, "c", "h", 1, "holds", source="rate")
    run.claim(3, "c", "h", 1, "holds")
    run.claim(4, "c", "h", "", "not measured here")
    (tmp_path / "another.json").write_text(json.dumps({"runs": points}))
    record.recorded("another")
    run.claim(5, "c", "h", 1, "holds")  # by which of the two?
    found = ["this run", "recorded sweep rate, 3 seeds", "recorded sweep rate, 3 seeds", None, ""]
    assert [claim.get("source") for claim in read(run)["claims"]] == found
    for own in ({"model": "mine"}, {"data": "mine.jsonl"}, {"preferences": "mine.jsonl"}):
        monkeypatch.setattr(sweeps, "this_run", own)
        assert record.recorded("rate") == {"runs": []}  # Tinytown's say nothing of them


def test_what_was_trained_is_recorded_with_its_parents_and_also_if_it_was_not_named(tmp_path):
    run = record.start("08_rlhf", {}, root=tmp_path)
    for name in ("sft", "policy", "adapter", "checkpoints/checkpoint-1"):
        run.path(f"{name}/w.safetensors").write_bytes(bytes(2_000_000))
    run.path("adapter/adapter_config.json").write_text("")
    run.artifact("sft")
    for kind in ("model", "policy model"):  # the cell is run again
        run.artifact("policy", kind, parents=["sft"])
    for name, parents in (("reward", []), ("policy", ["tuned"])):
        with pytest.raises(ValueError, match="artifact"):
            run.artifact(name, parents=parents)
    run.finish()
    made = [(a["name"], a["kind"], a["parents"]) for a in read(run)["artifacts"]]
    named = [("sft", "model", []), ("policy", "policy model", ["sft"])]
    assert made == [*named, ("adapter", "adapter", [])]
    assert [row["size"] for row in run.lineage().rows] == ["2.0 MB"] * 3


def test_texts_that_are_shown_side_by_side_are_recorded_and_figures_go_to_wandb(tmp_path):
    def shown(question, answer):
        texts = show.SideBySide(("prompt", "after"), [(question, answer)])
        assert answer in texts._repr_html_()

    class Sent(list):
        def send(self, *what):
            self.append(what)

        def close(self, _):
            pass

    shown("Where?", "before any run")
    run = record.start("02_lora", {}, root=tmp_path)
    run._wandb = sent = Sent()
    for question, answer in (("Where?", "the inn"), ("Who?", "Mira"), ("Where?", "the mill")):
        shown(question, answer)  # the third is the first's cell, run again
    plots.lines({"a": ([1, 2], [3, 4])}, title="Losses", xlabel="x", ylabel="y")._repr_png_()
    run.finish()
    shown("When?", "after the run")
    tables = {name: [[*row.values()] for row in rows] for name, rows in read(run)["tables"].items()}
    assert tables == {"samples": [["Where?", "the mill"]], "samples 2": [["Who?", "Mira"]]}
    assert [what[:2] for what in sent][-1] == ("figure", "Losses") and len(sent) == 4


def test_two_runs_never_share_a_folder_and_the_environment_says_where(tmp_path, monkeypatch):
    folders = {record.start("x", {}, root=tmp_path).folder for _ in range(5)}
    assert len(folders) == 5
    monkeypatch.setenv("LABKIT_RUN_DIR", str(folders.pop()))
    with pytest.raises(FileExistsError):
        record.start("x", {})
    monkeypatch.chdir(tmp_path)
    assert record.project_root() == tmp_path
    monkeypatch.setenv("LABKIT_RUNS", str(tmp_path / "else"))
    assert record.project_root() == tmp_path / "else"


def test_a_run_goes_on_only_as_it_began(tmp_path):
    given = {"model": "a", "beta": 0.1, "resume": "", "save_steps": 2}
    run = record.start("08_rlhf", given, root=tmp_path)
    again = given | {"resume": str(run.folder), "save_steps": 5}
    with pytest.raises(ValueError, match="checkpoint"):
        record.start("08_rlhf", again, root=tmp_path)
    run.path("checkpoints/ppo/checkpoint-2/made_with.json").write_text("{}")
    record.start("08_rlhf", again, root=tmp_path)
    below = str(run.folder / "checkpoints" / "ppo")
    for notebook, other, named in (
        ("08_rlhf", {"model": "b"}, "model"),
        ("08_rlhf", {"beta": 0.2, "resume": below}, "beta"),
        ("02_lora", {}, "notebook"),
        ("08_rlhf", {"resume": "/nowhere"}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=named):
            record.start(notebook, again | other, root=tmp_path)


def test_a_failed_write_keeps_the_last_record_and_leaves_nothing_else(tmp_path, monkeypatch):
    run = record.start("x", {}, root=tmp_path)
    before = (run.folder / "record.json").read_bytes()

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        run.metric(a=2)
    assert (run.folder / "record.json").read_bytes() == before
    assert [f.name for f in run.folder.iterdir()] == ["record.json"]


def test_a_killed_process_leaves_a_whole_record_that_reads_as_lost(tmp_path, monkeypatch):
    code = """import os, sys; from labkit import record
run = record.start('x', {}, root=sys.argv[1]); run.metric(a=1)
os.replace = lambda *_: os.kill(os.getpid(), 9)
run.metric(a=2)"""
    assert python(code, tmp_path, WANDB_MODE="disabled").returncode == -9
    live = record.start("x", {}, root=tmp_path)
    broken = tmp_path / "runs" / "x" / "20200101-000000-abcdef" / "record.json"
    broken.parent.mkdir()
    broken.write_text('{"half')
    unreadable, *others = record.read_runs(tmp_path)
    killed, running = sorted(others, key=lambda run: -len(run["metrics"]))
    assert killed["metrics"] == {"a": 1} and killed["status"] == "lost"
    assert running["status"] == "running" == read(live)["status"]
    assert unreadable["status"] == "unreadable" and unreadable["folder"] == str(broken.parent)
    later = (live.folder / "record.json").stat().st_mtime + 60  # another process got the number
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: later)
    assert {run["status"] for run in record.read_runs(tmp_path)} == {"lost", "unreadable"}
