"""W&B: what is sent, to a server on loopback; that nobody waits for a server; sync; dashboard."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import python
from wandb_server import WandbServer

from labkit import dashboard, record, show, wandb_log

RUN = """import sys, time; from labkit import record, show, wandb_log
given = {'rank': 8, 'seed': 3, 'model': 'tinytown', 'data': sys.argv[2]}
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    run = record.start('02_lora', given, root=sys.argv[1])
    if len(sys.argv) > 4:
        time.sleep(8); wandb_log.WAIT, began = 1.0, time.perf_counter()
    for step in range(1, 6):
        run.log({'loss': 1 / step}, step=10 * step)
    run.table('scores', [{'model': 'base', 'accuracy': 0.25}, {'model': 2, 'accuracy': None}])
    show.SideBySide(('prompt', 'after'), [('Where?', 'the mill')])._repr_html_()
    if len(sys.argv) > 4:
        print(time.perf_counter() - began)
    run.claim(10, 'r = 8 is enough', 'sweep', '91 %', 'holds in part')
    run.path('adapter/adapter_config.json').write_text('{}')
    run.path('adapter/w.safetensors').write_bytes(b'1' * 1000)
    run.metric(accuracy=0.5); run.finish()"""


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "disabled")  # in this process
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def find(server, operation):
    return [given for name, given in server.calls if name == operation]


def test_a_team_finds_on_the_server_what_it_looks_for(tmp_path):
    data = tmp_path / "a secret place" / "mine.jsonl"
    data.parent.mkdir()
    data.write_text('{"prompt": "private", "completion": "b"}\n')
    with WandbServer() as server:
        done = python(RUN, tmp_path, data, 1, **server.environment(), WANDB_TAGS="mine,own")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (folder,) = (tmp_path / "runs" / "02_lora").iterdir()
    first, *_, last = find(server, "UpsertBucket")
    assert first["displayName"] == f"02_lora-{folder.name}" and first["jobType"] == "02_lora"
    assert first["groupName"].startswith("02_lora-") and first["tags"] == ["mine", "own"]
    assert "low-rank" in first["notes"] and not first["host"]  # the question of the notebook
    config = json.loads(last["config"])
    kept = json.loads((folder / "record.json").read_text("utf-8"))
    assert config["rank"] == {"value": 8} and config["labkit"]["value"]["versions"]["torch"]
    assert config["labkit"]["value"]["commit"] == kept["commit"]
    assert config["labkit"]["value"]["hardware"]["cores"] == kept["hardware"]["cores"]
    metrics = config["_wandb"]["value"]["m"]
    assert metrics[1]["1"] == "step" and metrics[0] == {"2": "*", "5": 2, "6": [1], "7": []}

    files = [sent.get("files", {}).get("wandb-history.jsonl", {}) for sent in server.stream]
    rows = [json.loads(line) for file in files for line in file.get("content", [])]
    assert [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r][1] == (20, 0.5)
    summary = json.loads(server.files["wandb-summary.json"])
    assert summary["eval/accuracy"] == 0.5 and summary["claims/10"] == "holds in part"
    named = {name.split("/")[-1]: f for name, f in server.files.items() if name[:4] == "run-"}
    kinds = ("scores", "samples", "claims")
    scores, samples, claims = (json.loads(named[f"{kind}.table.json"])["data"] for kind in kinds)
    assert scores == [["base", 0.25], [2, None]]  # numbers are numbers
    assert samples == [["Where?", "the mill"]] and claims[0][0] == 10
    used = {given["artifactID"] for given in find(server, "UseArtifact")}
    assert used == {"base-model-tinytown", "dataset-mine.jsonl"}
    made = {given["artifactCollectionName"]: given for given in find(server, "CreateArtifact")}
    assert made["02_lora-adapter"]["artifactTypeName"] == "adapter"
    assert server.files["02_lora-adapter/w.safetensors"] == b"1" * 1000
    # W&B's own manifests name the places of local files.
    files = {n: data for n, data in server.files.items() if "wandb_manifest" not in n}
    sent = json.dumps([server.calls, server.stream]) + str(files)
    for private in (str(tmp_path), "a secret place", "private", "requirements.txt"):
        assert private not in sent


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["dead", "slow"])
def test_a_server_that_dies_or_hangs_is_not_waited_for(tmp_path, seconds):
    with WandbServer() as server:
        began = time.monotonic()
        command = [sys.executable, "-c", RUN, tmp_path, "tinytown", "1", "late"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        run = subprocess.Popen(command, env={**os.environ} | server.environment(), **pipes)
        while not find(server, "UpsertBucket") and time.monotonic() - began < 60:
            time.sleep(0.1)
        server.seconds = seconds  # from here on
        if not seconds:
            server.close()
        out, err = run.communicate(timeout=180)
    assert run.returncode == 0 and "labkit sync" in err
    assert float(out) < 20  # five steps and two tables: nothing of 60 seconds
    (found,) = record.read_runs(tmp_path)
    assert found["status"] == "finished" and found["metrics"] == {"accuracy": 0.5}
    assert len(found["history"]) == 5 and found["tables"]["samples"]
    (mark,) = tmp_path.glob(f"runs/*/*/wandb/{wandb_log.UNSENT}")


@pytest.mark.parametrize(("home", "mode"), [("/proc/home", {}), ("home", {"WANDB_MODE": ""})])
def test_without_a_login_runs_stay_offline_silent_and_inside_their_folders(tmp_path, mode, home):
    # No login, no network, and a home that cannot be written, or must not be.
    home = tmp_path / home
    proxy = {"HOME": str(home), "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = python(RUN, tmp_path, "tinytown", 2, **proxy, **mode)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    for folder in (tmp_path / "runs" / "02_lora").iterdir():
        assert list(folder.glob("wandb/offline-run-*/*.wandb"))
        weights = [f for f in folder.rglob("*") if f.is_file() and f.stat().st_size == 1000]
        assert weights == [folder / "adapter" / "w.safetensors"]  # not copied
        assert not list(folder.rglob("wandb-metadata.json"))


def test_an_error_of_wandb_never_ends_a_run(tmp_path):
    for broken in ("wandb.Table = wandb.Artifact = None", "wandb.init = None"):
        done = python(f"import wandb\n{broken}\n{RUN}", tmp_path, "tinytown", 1)
        assert done.returncode == 0 and "W&B" in done.stderr
    assert {run["status"] for run in record.read_runs(tmp_path)} == {"finished"}


def test_sync_sends_offline_runs_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="logged in"):
        wandb_log.login()
    assert python(RUN, tmp_path, "tinytown", 1).returncode == 0
    sync = "import sys; from labkit import cli; sys.argv[0] = 'labkit'; cli.main()"
    refused = python(sync, "sync", tmp_path)
    assert refused.returncode == 2 and "wandb login" in refused.stderr
    with WandbServer() as server:
        access = server.environment() | {"WANDB_MODE": "offline"}
        sent = python(sync, "sync", tmp_path, **access)
        assert sent.returncode == 0 and "1 sent" in sent.stdout, sent.stderr
        assert "02_lora-adapter/w.safetensors" in server.files
        assert json.loads(server.files["wandb-summary.json"])["eval/accuracy"] == 0.5
        assert len(find(server, "UseArtifact")) == 2
        before = len(server.calls)
        again = python(sync, "sync", tmp_path, **access)
        assert "has all runs" in again.stdout and len(server.calls) == before


def test_the_dashboard_needs_its_extra_and_a_login(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ValueError, match="wandb-workspaces"):
        dashboard.update(root=tmp_path)


def test_claims_become_a_table_in_which_nothing_is_markup_with_the_signs_of_notebooks(tmp_path):
    run = record.start("02_lora", {}, root=tmp_path)
    for number, verdict in enumerate(record.VERDICTS, 1):
        run.claim(number, "a | b <i>", "h", "91 % *", verdict)
    run.finish()
    rows = dashboard.claims_table(record.read_runs(tmp_path)).splitlines()[-5:]
    assert rows[1].startswith(r"| 2 | ◐ holds in part | a \| b &lt;i> | 91 % \* |")
    signs = {row.split(" | ")[1][2:]: row.split(" | ")[1][0] for row in rows}
    assert signs == dict.fromkeys(record.VERDICTS, "?") | show.SIGNS


def test_the_dashboard_is_made_once_and_keeps_what_people_change(tmp_path):
    pytest.importorskip("wandb_workspaces")
    run = record.start("02_lora", {}, root=tmp_path)
    run.claim(10, "r = 8 is enough", "sweep", "91 %", "holds in part")
    run.finish()
    update = "import sys; from labkit import dashboard; print(*dashboard.update(root=sys.argv[1]))"
    with WandbServer() as server:
        access = server.environment()
        done = python(update, tmp_path, **access)
        assert done.returncode == 0 and "nw=labkitshared" in done.stdout, done.stderr
        report, workspace = server.views.values()
        assert "holds in part" in report["spec"] and "train/loss" in workspace["spec"]

        spec = json.loads(workspace["spec"])  # somebody removes a section and edits a panel
        sections = spec["section"]["panelBankConfig"]["sections"]
        sections.pop(1)
        sections[0]["panels"][0]["config"]["metrics"] = ["train/mine"]
        workspace["spec"] = json.dumps(spec)
        report["spec"] = report["spec"].replace("holds in part", "out of date")
        spec = json.loads(report["spec"])
        own = {"type": "paragraph", "children": [{"text": "our own words"}]}
        spec["blocks"].append(own)
        report["spec"] = json.dumps(spec)

        assert python(update, tmp_path, **access).returncode == 0
        report, workspace = server.views.values()  # still two
        assert "train/mine" in workspace["spec"] and "Preferences" in workspace["spec"]
        assert "our own words" in report["spec"] and "out of date" not in report["spec"]
        assert report["spec"].count("holds in part") == 1
