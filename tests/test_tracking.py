"""The run record: complete, atomic, free of secrets; the report escapes what it shows."""

import errno
import json
import os
import subprocess
import sys

import pytest

from labkit import tracking


@pytest.fixture(autouse=True)
def without_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LABKIT_RUN_DIR", raising=False)
    monkeypatch.delenv("LABKIT_RUNS", raising=False)


def read(run):
    return json.loads((run.folder / "record.json").read_text("utf-8"))


def test_record_holds_what_a_run_was_given_and_measured(tmp_path):
    with tracking.start("02_lora", {"rank": 8, "seed": 3}, root=tmp_path) as run:
        run.log({"loss": 2.0}, step=0)
        run.log({"loss": 1.0}, step=10)
        run.metric(accuracy=0.75)
        run.claim(5, "256 times fewer", "exact", 256, "holds")
        with run.timed("train"):
            pass
    record = read(run)
    assert run.folder.parent == tmp_path / "runs" / "02_lora"
    assert record["status"] == "finished"
    assert record["parameters"] == {"rank": 8, "seed": 3}
    assert record["seeds"] == {"seed": 3}
    assert record["history"] == [{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0}]
    assert record["metrics"] == {"accuracy": 0.75}
    assert record["claims"][0]["verdict"] == "holds"
    assert record["versions"]["python"] == sys.version.split()[0]
    assert record["hardware"]["cores"] >= 1
    assert record["peak_memory_bytes"] > 5_000_000  # a Python process is never smaller
    assert "train" in record["timings"]


def test_the_lineage_of_what_was_trained(tmp_path):
    with tracking.start("08_rlhf", {}, root=tmp_path) as run:
        for name in ("sft", "policy"):
            run.path(f"{name}/weights").write_bytes(bytes(2_000_000))
        run.artifact("sft")
        run.artifact("policy", parents=["sft"])
        run.artifact("policy", "adapter", parents=["sft"])  # the cell is run again
        with pytest.raises(FileNotFoundError, match="expected the folder 'reward'"):
            run.artifact("reward")
        with pytest.raises(ValueError, match="expected some of .*'sft'.*, got .'tuned'"):
            run.artifact("policy", parents=["tuned"])
        assert "policy | adapter | sft" in repr(run.lineage()) and "2.0 MB" in repr(run.lineage())
    made = read(run)["artifacts"]
    assert [(a["name"], a["parents"], a["bytes"]) for a in made] == [
        ("sft", [], 2_000_000), ("policy", ["sft"], 2_000_000)
    ]  # fmt: skip
    assert "Lineage: sft · sft → policy" in tracking.report(tmp_path).read_text("utf-8")


def test_a_failure_inside_with_is_recorded(tmp_path):
    with pytest.raises(FloatingPointError):
        with tracking.start("x", {}, root=tmp_path) as run:
            raise FloatingPointError("loss is nan at step 7")
    assert read(run)["status"] == "failed"
    assert read(run)["error"] == "FloatingPointError: loss is nan at step 7"


def test_no_key_and_no_environment_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "from-the-environment")
    given = {"api_key": "hush-1", "hf_token": "hush-2", "pad_token": "<|pad|>"}
    text = (tracking.start("x", given, root=tmp_path).folder / "record.json").read_text()
    assert "hush" not in text and "from-the-environment" not in text
    assert "<|pad|>" in text


def test_scalars_of_libraries_and_non_finite_numbers_are_json(tmp_path):
    import numpy as np
    import torch

    run = tracking.start("x", {}, root=tmp_path)
    run.metric(a=np.float32(0.5), b=torch.tensor(2), c=float("nan"), d=np.arange(3), e=tmp_path)
    run.metric(f=torch.tensor([1.5, 2.5]), g=np.inf)
    metrics = read(run)["metrics"]
    assert metrics["a"] == 0.5 and metrics["b"] == 2 and metrics["d"] == [0, 1, 2]
    assert metrics["f"] == [1.5, 2.5]
    assert metrics["c"] == "nan" and metrics["g"] == "inf" and metrics["e"] == str(tmp_path)


def test_the_verdict_is_one_of_three(tmp_path):
    run = tracking.start("x", {}, root=tmp_path)
    with pytest.raises(ValueError, match="verdict must be one of holds, .*'maybe'"):
        run.claim(1, "c", "h", 1, "maybe")
    run.claim(2, "c", "h", 1, "holds in part")
    run.claim(1, "c", "h", 1, "holds")
    run.claim(2, "c", "h", 5, "does not hold here")  # the cell was run again
    assert [(c["number"], c["value"]) for c in read(run)["claims"]] == [(1, 1), (2, 5)]


def test_claims_table_is_escaped(tmp_path):
    run = tracking.start("x", {}, root=tmp_path)
    run.claim(1, "<script>alert(1)</script>", "a | b", 0.123456, "holds")
    page = run.claims_table()._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "0.1235" in page
    assert "verdict" in repr(run.claims_table())


def test_paths_stay_inside_the_run(tmp_path):
    run = tracking.start("x", {}, root=tmp_path)
    assert run.path("adapter/weights").parent.is_dir()
    with pytest.raises(ValueError, match="inside the run's folder"):
        run.path("../../elsewhere")


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    folders = {tracking.start("x", {}, root=tmp_path).folder for _ in range(20)}
    assert len(folders) == 20
    monkeypatch.setenv("LABKIT_RUN_DIR", str(folders.pop()))
    with pytest.raises(FileExistsError, match="already holds a run's record"):
        tracking.start("x", {})


def test_a_failed_write_keeps_the_last_record_and_leaves_nothing_else(tmp_path, monkeypatch):
    run = tracking.start("x", {}, root=tmp_path)
    run.metric(a=1)
    before = (run.folder / "record.json").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"(?s){run.folder.name}.*No space left.*LABKIT_RUNS"):
        run.metric(a=2)
    assert (run.folder / "record.json").read_bytes() == before
    assert [f.name for f in run.folder.iterdir()] == ["record.json"]


def test_a_killed_process_leaves_a_whole_record(tmp_path):
    code = (
        "import os, sys; from labkit import tracking\n"
        "run = tracking.start('x', {}, root=sys.argv[1]); run.metric(a=1)\n"
        "replace = os.replace\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "run.metric(a=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    (record,) = tracking.read_runs(tmp_path)
    assert record["metrics"] == {"a": 1} and record["status"] == "running"


def test_a_root_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the run folder .*file"):
        tracking.start("x", {}, root=tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_root_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write to the run folder"):
        tracking.start("x", {}, root=tmp_path)


def test_root_comes_from_the_environment_or_the_surrounding_project(tmp_path, monkeypatch):
    inner = tmp_path / "notebooks" / "deep"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "labkit"\n')
    monkeypatch.chdir(inner)
    assert tracking.project_root() == tmp_path
    monkeypatch.setenv("LABKIT_RUNS", str(tmp_path / "else"))
    assert tracking.project_root() == tmp_path / "else"


def test_a_broken_record_is_listed_not_fatal(tmp_path):
    good = tracking.start("x", {}, root=tmp_path)
    bad = tmp_path / "runs" / "x" / "20200101-000000-abcdef"
    bad.mkdir()
    (bad / "record.json").write_text('{"half')
    statuses = {run["id"]: run["status"] for run in tracking.read_runs(tmp_path)}
    assert statuses == {bad.name: "unreadable", good.folder.name: "running"}


def test_report_shows_all_runs_and_escapes_them(tmp_path):
    for value in (1.0, 2.0):
        with tracking.start("02_lora", {"data": "<b>mine</b>"}, root=tmp_path) as run:
            run.log({"loss": 3.25}, step=0)
            run.log({"loss": value}, step=5)
            run.metric(accuracy=0.5)
            run.claim(10, "<i>r = 8</i>", "sweep", 0.95, "holds in part")
            run.table("samples", [{"answer": "<img src=x>"}])
    page = tracking.report(tmp_path).read_text("utf-8")
    assert "labkit: 2 runs" in page and "holds in part" in page and "accuracy 0.5" in page
    assert page.count("<polyline") == 2 and "loss: 3.25 → 2" in page
    for raw in ("<b>mine", "<i>r = 8", "<img"):
        assert raw not in page
    assert "http" not in page  # the page needs nothing from elsewhere


def test_wandb_stays_offline_silent_and_inside_the_run(tmp_path):
    code = (
        "import sys; from labkit import tracking\n"
        "run = tracking.start('x', {'rank': 8}, root=sys.argv[1])\n"
        "run.log({'loss': 1.0}, step=0); run.table('t', [{'a': 1}])\n"
        "run.path('sft/w.bin').write_bytes(b'1' * 1000); run.artifact('sft'); run.finish()\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}  # no login, no network
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "root")],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
    (folder,) = (tmp_path / "root" / "runs" / "x").iterdir()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert not (tmp_path / "wandb").exists()
    assert [f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size == 1000] == [
        folder / "sft" / "w.bin"  # not copied
    ]
    assert not list(folder.rglob("wandb-metadata.json"))
