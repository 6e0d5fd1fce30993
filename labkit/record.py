"""The run record: what a run was given, what it measured, and what it concluded.

Each run has its folder, `runs/<notebook>/<time>-<id>/`, with a `record.json` that is replaced
atomically. The history is kept here too, as offline runs of W&B cannot be read back.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import blake2s
from pathlib import Path
from typing import Any

import psutil

from labkit import tinytown
from labkit.provenance import commit, hardware, peak_memory, versions
from labkit.show import Table

Place = str | Path | None
Values = dict[str, Any]
VERDICTS = ("holds", "holds in part", "not measured here", "undecided", "does not hold here")
# What may change when a run is resumed: no training that goes on depends on it.
FREE = {"resume", "save_steps", "recorded", "test_examples", "kl_limit", "device"}
_PROJECT = Path(__file__).resolve().parents[1]
_MACHINE = blake2s(platform.node().encode(), digest_size=4).hexdigest()
_SECRET = re.compile(r"(^|_)(api_key|secret|password|(hf|auth|access)_token)$", re.IGNORECASE)
_UPLOAD_BYTES = 100 * 10**6  # of a larger artifact, W&B gets the name and the parents only
_WRITE_EVERY = 5.0  # seconds between records while metrics stream in
# A container may have no home to write to; a place that the user has set stays.
_WANDB_FOLDERS = [n for n in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if not os.environ.get(n)]


class Run:
    """One run. Use `start` to make it and `finish` to close it."""

    _wandb: Any = None

    def __init__(self, notebook: str, folder: Path, parameters: Values) -> None:
        self.folder, self.record = folder, _new_record(notebook, folder, parameters)
        self._began = time.perf_counter()
        self._write()

    def __repr__(self) -> str:
        place = "/".join(self.folder.parts[-3:])
        return f"{place} · {self.record['status']} · {self.record['seconds']:.0f} s"

    def path(self, name: str) -> Path:
        """Where a file or folder of this run goes; its parent exists afterwards."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def log(self, metrics: Values, step: int | None = None) -> None:
        """Append one entry to the history. Without `step`, the entry's number is its step."""
        entry = {"step": len(self.record["history"]) if step is None else int(step), **metrics}
        self.record["history"].append(plain(entry))
        self._send(lambda run: run.log(entry))
        if time.perf_counter() - self._written > _WRITE_EVERY:
            self._write()

    def metric(self, **values: Any) -> None:
        """Set final metrics by name; a later value of the same name replaces the earlier."""
        self.record["metrics"].update(plain(values))
        self._write()

    def claim(self, number: int, claim: str, how: str, value: Any, verdict: str) -> None:
        """Record a measurement of a claim, or of a part of it; the same `claim` again replaces it."""
        if verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}; got {verdict!r}")
        entry = plain(dict(number=number, claim=claim, how=how, value=value, verdict=verdict))
        others = [c for c in self.record["claims"] if (c["number"], c["claim"]) != (number, claim)]
        self.record["claims"] = sorted([*others, entry], key=lambda c: c["number"])
        self._write()

    def check(self, name: str, passed: Any, found: Any = "") -> None:
        """Record whether what must be so is so: `found` is what was seen.

        Raises AssertionError if not, on Tinytown; on other models it is a verdict, and a warning.
        """
        self.record["checks"][name] = plain({"passed": bool(passed), "found": found})
        self._write()
        if not passed:
            if self.record["parameters"].get("model", "tinytown") == "tinytown":
                raise AssertionError(f"{name}: {found}")
            logging.getLogger("labkit").warning("not so on this model: %s: %s", name, found)

    def table(self, name: str, rows: list[Values]) -> Table:
        """Record a small table of results under `name`, and return it for display."""
        self.record["tables"][name] = plain(rows)
        table = Table(rows)
        shown = table.columns, table.cells()
        self._send(lambda run: run.log({name: sys.modules["wandb"].Table(*shown)}))
        self._write()
        return table

    def artifact(self, name: str, kind: str = "model", parents: Sequence[str] = ()) -> None:
        """Record what was trained: the folder `name` of this run, and what it came from."""
        files = [file for file in self.path(name).rglob("*") if file.is_file()]
        made = {entry["name"]: entry for entry in self.record["artifacts"]}
        if not files or not {*parents} <= {*made}:
            raise ValueError(f"artifact: expected files in {self.path(name)}, parents of {[*made]}")
        size = sum(file.stat().st_size for file in files)
        entry = {"name": name, "kind": kind, "parents": list(parents), "bytes": size}
        self.record["artifacts"] = [*(made | {name: entry}).values()]

        def send(run: Any) -> None:
            title = f"{self.record['notebook']}-{name}"
            artifact = sys.modules["wandb"].Artifact(title, kind, metadata=entry)
            if size <= _UPLOAD_BYTES:  # without a copy
                artifact.add_dir(str(self.path(name)), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._send(send)
        self._write()

    def lineage(self) -> Table:
        """What was trained in this run, in order: name, kind, parents, size."""
        made = [dict(a, parents=", ".join(a["parents"])) for a in self.record["artifacts"]]
        return Table([a | {"size": f"{a.pop('bytes') / 1e6:.1f} MB"} for a in made])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside `with` to the record's timings under `name`."""
        began, timings = time.perf_counter(), self.record["timings"]
        try:
            yield
        finally:
            timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - began, 3)

    def claims_table(self) -> Table:
        """The claims so far: number, claim, how measured, value, verdict."""
        names = {"number": "#", "how": "how measured"}
        rows = [{names.get(key, key): c[key] for key in c} for c in self.record["claims"]]
        return Table(rows, css_class="labkit-claims")

    def finish(self, status: str = "finished") -> None:
        """Close the record, then W&B; a second call changes nothing."""
        if self.record["status"] == "running":
            self.record.update(status=status, ended=_now(), hardware=hardware())
            self._write()
            _drop_empty(self.folder)
            self._send(lambda run: run.summary.update(self.record["metrics"]))
            self._send(lambda run: run.finish(exit_code=int(status != "finished")))
            self._wandb = None

    def _send(self, send: Callable[[Any], Any]) -> None:
        """Calls `send(run of W&B)` unless W&B is off; its errors never end this run."""
        try:
            if self._wandb is not None:
                send(self._wandb)
        except Exception as error:
            logging.getLogger("labkit").warning("W&B, left out from here on: %s", error)
            self._wandb = None

    def _write(self) -> None:
        self._written = time.perf_counter()
        self.record["seconds"] = round(self._written - self._began, 3)
        self.record["peak_memory_bytes"] = peak_memory()
        _write_record(self.folder, self.record)


def start(
    notebook: str, parameters: Values, *, root: Place = None, wandb_project: str = "labkit"
) -> Run:
    """Begin a run: make its folder, write the first record, open W&B unless it is off.

    The folder is `$LABKIT_RUN_DIR` (set by `labkit run`), else a new one below `root`, by
    default `project_root()`. Raises OSError if it cannot be written or holds a record, and what
    `check_resume` raises.
    """
    check_resume(notebook, parameters)
    folder = Path(os.environ.get("LABKIT_RUN_DIR") or new_folder(notebook, root))
    if (folder / "record.json").exists():
        raise FileExistsError(f"{folder} already holds a run's record; unset LABKIT_RUN_DIR")
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(notebook, folder, parameters)
    run._wandb = _start_wandb(run, wandb_project)
    return run


def check_resume(notebook: str, parameters: Values) -> None:
    """Raises ValueError if the run that the parameter `resume` names cannot go on with these.

    Its record tells what it began with, and only what is in `FREE` may differ.
    """
    if not parameters.get("resume"):
        return
    folder, now = Path(parameters["resume"]).resolve(), plain(parameters) | {"notebook": notebook}
    if not can_resume(folder):
        raise ValueError(f"resume: expected a run's folder with a checkpoint, got {folder}")
    runs = [place for place in (folder, *folder.parents[:3]) if (place / "record.json").is_file()]
    record: Values = _read(runs[0]) if runs else {"parameters": {}, "notebook": notebook}
    began = record["parameters"] | {"notebook": record["notebook"]}
    for name in sorted(began.keys() & now.keys() - FREE):
        if began[name] not in (now[name], "(hidden)"):
            was = f"{name} = {began[name]!r}"
            raise ValueError(f"resume: {folder} began with {was}, got {now[name]!r}")


def can_resume(folder: Path) -> bool:
    """Whether a run left a complete checkpoint in its folder, or a stage that is finished."""
    patterns = ("made_with.json", "**/checkpoint-*/made_with.json", "*/config.json")
    return any(file for pattern in patterns for file in folder.glob(pattern))


def new_folder(notebook: str, root: Place = None) -> Path:
    """Make a folder of its own for a run of `notebook` and return it."""
    identity = f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"
    folder = Path(root or project_root()) / "runs" / notebook / identity
    folder.mkdir(parents=True)
    return folder


def project_root() -> Path:
    """Where `runs/` is: `$LABKIT_RUNS`, the project around the current folder, or that folder."""
    default = _PROJECT if Path.cwd().is_relative_to(_PROJECT) else Path.cwd()
    return Path(os.environ.get("LABKIT_RUNS") or default)


def close(folder: Path, notebook: str, parameters: Values, status: str, error: str = "") -> None:
    """Close the record in `folder` from outside, after its kernel ended or recorded nothing."""
    made = (folder / "record.json").exists()
    record = _read(folder) if made else _new_record(notebook, folder, parameters)
    if record["status"] == "running" or status != "finished":
        record.update(status=status, error=error or record["error"], ended=_now())
    _drop_empty(folder)
    _write_record(folder, record)


def read_runs(root: Place = None) -> list[Values]:
    """All records below `<root>/runs`, oldest first, each with its `folder` added.

    Their status may also be `lost` (the process is gone), or `unreadable`.
    """
    runs = []
    files = Path(root or project_root()).glob("runs/*/*/record.json")
    for file in sorted(files, key=lambda f: f.parent.name):
        try:
            record = _read(file.parent)
        except (OSError, ValueError) as error:
            broken = {"status": "unreadable", "error": f"{file}: {error}"}
            record = _new_record(file.parent.parent.name, file.parent, {}) | broken
        machine, number = record.get("process") or ("", 0)  # another machine's are not known
        if record["status"] == "running" and machine == _MACHINE and not _lives(number, file):
            record["status"] = "lost"
        runs.append(record | {"folder": str(file.parent)})
    return runs


def _lives(number: int, file: Path) -> bool:
    """Whether the process that wrote `file` still runs, and is not a later one of its number."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        earlier = process.create_time() <= file.stat().st_mtime
        return earlier and process.status() != psutil.STATUS_ZOMBIE
    return False


def recorded(question: str, current: bool = False) -> Values:
    """A sweep's committed results. Says so if they are of an earlier base; `current`: no such runs."""
    file = _PROJECT / f"benchmarks/results/{question}.json"
    found = json.loads(file.read_text("utf-8")) if file.exists() else {"runs": []}
    if not found["runs"]:
        print(f"{file.name} is not recorded yet: benchmarks/{question}.py makes it.")
    elif found.get("base") != tinytown.base_checksum():
        print(f"{file.name} was recorded on an earlier base checkpoint, not on this one.")
        found["runs"] = [] if current else found["runs"]
    return found


def plain(value: Any) -> Any:
    """`value` as JSON holds it: tensors and arrays as lists, NaN and infinity as text."""
    from pydantic_core import to_json

    def other(x: Any) -> Any:
        return x.tolist() if hasattr(x, "tolist") else str(x)

    return json.loads(to_json(value, inf_nan_mode="strings", fallback=other))


def write_text(file: Path, text: str) -> None:
    """Replace `file` atomically: written next to it, flushed to the disk, then renamed."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _new_record(notebook: str, folder: Path, parameters: Values) -> Values:
    given = {k: "(hidden)" if _SECRET.search(k) else v for k, v in plain(parameters).items()}
    record = {"schema": 1, "notebook": notebook, "id": folder.name, "status": "running"}
    record |= {"error": "", "started": _now(), "ended": "", "seconds": 0.0, "parameters": given}
    record |= {"seeds": {k: v for k, v in given.items() if re.search(r"(^|_)seeds?$", k)}}
    record |= {"versions": versions(), "commit": commit(), "hardware": hardware()}
    record |= {"process": [_MACHINE, os.getpid()], "timings": {}, "peak_memory_bytes": 0}
    record |= {"metrics": {}, "checks": {}, "claims": [], "tables": {}, "artifacts": []}
    return record | {"history": []}


def _read(folder: Path) -> Values:
    return json.loads((folder / "record.json").read_text("utf-8"))


def _write_record(folder: Path, record: Values) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False)
    write_text(folder / "record.json", text + "\n")


def _drop_empty(folder: Path) -> None:
    """Remove empty folders, which trainers make for checkpoints that are never written."""
    own = [f for f in folder.rglob("*") if f.relative_to(folder).parts[0] != "wandb"]
    for path in sorted(own, reverse=True):
        with suppress(OSError):  # a file, or a folder with files
            path.rmdir()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _start_wandb(run: Run, project: str) -> Any:
    """W&B's run inside the run's folder, or None; offline where its server is not reached."""
    for name in [n for n in os.environ if n.startswith("WANDB_") and not os.environ[n]]:
        del os.environ[name]  # compose files leave them empty, which wandb refuses
    os.environ.setdefault("WANDB_SILENT", "true")  # login takes no settings
    for name in _WANDB_FOLDERS:
        os.environ[name] = str(run.folder / "wandb" / name.split("_")[1].lower())
    group, given = run.record["notebook"], run.record["parameters"]
    about: Values = dict(project=project, group=group, name=f"{group}-{run.folder.name}")
    quiet: Values = dict(silent=True, console="off", init_timeout=10, finish_timeout=10, host="")
    quiet |= dict(disable_git=True, x_save_requirements=False, x_disable_meta=True)
    about |= dict(dir=str(run.folder), config=given, settings=quiet | {"x_disable_stats": True})
    mode: Any
    for mode in dict.fromkeys((os.environ.get("WANDB_MODE", ""), "offline")):
        try:
            if mode == "disabled":
                return None
            import wandb

            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            if mode == "online":  # wandb itself would wait for all of init_timeout
                import requests

                requests.head(wandb.Settings().base_url, timeout=3)
            made = wandb.init(mode=mode, reinit="finish_previous", **about)
            made.define_metric("*", step_metric="step")
            return made
        except Exception as error:
            logging.getLogger("labkit").warning("W&B was not opened: %s", error)
    return None
