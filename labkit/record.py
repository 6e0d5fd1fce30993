"""The run record: what a run was given, what it measured, and what it concluded.

Each run has its folder, `runs/<notebook>/<time>-<id>/`, with a `record.json` that is replaced
atomically. The history is kept here too, as offline runs of W&B cannot be read back.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import blake2s
from pathlib import Path
from typing import Any

import psutil

from labkit import notebooks, sweeps, wandb_log
from labkit.files import plain, write_text
from labkit.provenance import commit, hardware, peak_memory, versions
from labkit.show import Table, keepers
from labkit.sweeps import recorded  # noqa: F401

Place = str | Path | None
Values = dict[str, Any]
VERDICTS = ("holds", "holds in part", "not measured here", "undecided", "does not hold here")
# What may change when a run is resumed: no training that goes on depends on it.
FREE = {"resume", "save_steps", "recorded", "test_examples", "kl_limit", "device"}
_WRITES = ("log", "metric", "claim", "check", "table", "artifact", "timed")
_PROJECT = Path(__file__).resolve().parents[1]
_MACHINE = blake2s(platform.node().encode(), digest_size=4).hexdigest()
_SECRET = re.compile(r"(^|_)(api_key|secret|password|(hf|auth|access)_token)$", re.IGNORECASE)
_WRITE_EVERY = 5.0  # seconds between records while metrics stream in


class Run:
    """One run. Use `start` to make it and `finish` to close it."""

    _wandb: wandb_log.Log | None = None
    _open: Run | None = None  # of this process; one that is left open says interrupted

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
        """Append one entry to the history. Without `step`, the entry's number is its step.

        A series that does not go on (the training was run again) begins anew.
        """
        history = self.record["history"]
        entry = plain({"step": len(history) if step is None else int(step), **metrics})
        if any(e["step"] >= entry["step"] and e.keys() & metrics for e in reversed(history)):
            left = ({k: e[k] for k in e if k not in metrics} for e in history)
            history[:] = [e for e in left if len(e) > 1]
        history.append(entry)
        self._send("log", entry)
        if time.perf_counter() - self._written > _WRITE_EVERY:
            self._write()

    def metric(self, **values: Any) -> None:
        """Set final metrics by name; a later value of the same name replaces the earlier."""
        self.record["metrics"].update(plain(values))
        self._write()

    def claim(
        self, number: int, claim: str, how: str, value: Any, verdict: str, source: str = ""
    ) -> None:
        """Record a measurement of a claim, or of a part of it; the same `claim` again replaces it.

        `source` is what decides it: "this run", or the name of a recorded sweep (`sweeps.source`).
        """
        if verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}; got {verdict!r}")
        entry = plain(dict(number=number, verdict=verdict, claim=claim, how=how, value=value))
        if verdict != "not measured here":
            entry["source"] = sweeps.source(source)
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
        self._send("table", name, self.record["tables"][name])
        self._write()
        return Table(rows)

    def keep(self, name: str, shown: Any) -> None:
        """Record what a notebook shows: texts side by side as a table, a figure in W&B only.

        Texts under the same columns and questions replace the earlier; others get a number.
        """
        if not isinstance(shown, Table):
            return self._send("figure", name, shown)

        def asked(rows: list[Values]) -> list[Any]:  # the columns, and what stands in the first
            return [list(rows[0]), [next(iter(row.values())) for row in rows]]

        for key in (name, *(f"{name} {number}" for number in range(2, 21))):
            known = self.record["tables"].get(key)
            if shown.rows and (not known or asked(known) == asked(plain(shown.rows))):
                self.table(key, shown.rows)
                break

    def artifact(self, name: str, kind: str = "model", parents: Sequence[str] = ()) -> None:
        """Record what was trained: the folder `name` of this run, and what it came from."""
        files = [file for file in self.path(name).rglob("*") if file.is_file()]
        made = {entry["name"]: entry for entry in self.record["artifacts"]}
        if not files or not {*parents} <= {*made}:
            raise ValueError(f"artifact: expected files in {self.path(name)}, parents of {[*made]}")
        size = sum(file.stat().st_size for file in files)
        entry = {"name": name, "kind": kind, "parents": list(parents), "bytes": size}
        self.record["artifacts"] = [*(made | {name: entry}).values()]
        self._send("artifact", entry)
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
        """The claims so far: number, verdict, claim, how measured, value, what decides."""
        names = {"number": "#", "how": "how measured", "source": "decided by"}
        rows = [{names.get(key, key): c[key] for key in c} for c in self.record["claims"]]
        return Table(rows, css_class="labkit-claims")

    def finish(self, status: str = "finished") -> None:
        """Close the record, then W&B; a second call changes nothing.

        Models and adapters that were saved into the run's folder and not named are recorded.
        """
        if self.record["status"] == "running":
            keepers.clear()
            named = {entry["name"] for entry in self.record["artifacts"]}
            for place in sorted({file.parent for file in self.folder.glob("*/*.safetensors")}):
                if place.name not in named:
                    kind = "adapter" if (place / "adapter_config.json").exists() else "model"
                    self.artifact(place.name, kind)
            self.record.update(status=status, ended=_now(), hardware=hardware())
            self._write()
            _drop_empty(self.folder)
            self.__dict__ |= dict.fromkeys(_WRITES, _refuse)
            if self._wandb is not None:
                self._wandb.close(self.record)
                self._wandb = None

    def _send(self, method: str, *arguments: Any) -> None:
        if self._wandb is not None:
            self._wandb.send(method, *arguments)

    def _write(self) -> None:
        self._written = time.perf_counter()
        self.record["seconds"] = round(self._written - self._began, 3)
        self.record["peak_memory_bytes"] = peak_memory()
        _write_record(self.folder, self.record)


def start(notebook: str, parameters: Values, *, root: Place = None) -> Run:
    """Begin a run: make its folder, write the first record, open W&B unless it is off.

    `parameters` may be a notebook's `globals()`, of which its parameters are taken. They are
    checked as those of `labkit run` are; a run that this process left open is closed. The folder
    is `$LABKIT_RUN_DIR` (set by `labkit run`), else a new one below `root`, by default
    `project_root()`. Raises OSError if it cannot be written or holds a record, and ValueError
    from `notebooks.validate` and `check_resume`.
    """
    project = parameters.get("wandb_project", "labkit")
    with suppress(FileNotFoundError):  # no such notebook
        path = notebooks.folder() / f"{notebook}.ipynb"
        known = notebooks.parameters(path)
        if "__name__" in parameters:
            parameters = {n: parameters[n] for n in known if n != "wandb_project"}
        own = {name: value for name, value in parameters.items() if name in known}
        parameters = parameters | notebooks.validate(own, path)
    check_resume(notebook, parameters)
    if Run._open:
        Run._open.finish("interrupted")
    folder = Path(os.environ.get("LABKIT_RUN_DIR") or new_folder(notebook, root))
    if (folder / "record.json").exists():
        raise FileExistsError(f"{folder} already holds a run's record; unset LABKIT_RUN_DIR")
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(notebook, folder, parameters)
    keepers[:] = [run.keep]
    if os.environ.get("WANDB_MODE") != "disabled":
        run._wandb = wandb_log.Log(run.record, folder, project)
    Run._open, sweeps.this_run = run, {"notebook": notebook} | run.record["parameters"]
    return run


@atexit.register
def _close_open() -> None:
    if Run._open and not os.environ.get("LABKIT_RUN_DIR"):  # `labkit run` closes its own
        Run._open.finish("interrupted")


def _refuse(*_: Any, **__: Any) -> None:
    again = "Run the cell with record.start again to begin another"
    raise RuntimeError(f"this run is closed, and a closed run is never written to. {again}")


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
    """Make a folder of its own for a run of `notebook` and return it; names are in order of time."""
    now, chance = datetime.now(), os.urandom(1).hex()[0]
    identity = f"{now:%Y%m%d-%H%M%S}-{now.microsecond:05x}{chance}"
    folder = Path(root or project_root()) / "runs" / notebook / identity
    folder.mkdir(parents=True)
    return folder


def project_root() -> Path:
    """Where `runs/` is: `$LABKIT_RUNS`, the project around the current folder, or that folder."""
    default = _PROJECT if Path.cwd().is_relative_to(_PROJECT) else Path.cwd()
    return Path(os.environ.get("LABKIT_RUNS") or default)


def close(folder: Path, notebook: str, parameters: Values, status: str, error: str = "") -> Values:
    """Close the record in `folder` from outside, after its kernel ended or recorded nothing."""
    made = (folder / "record.json").exists()
    record = _read(folder) if made else _new_record(notebook, folder, parameters)
    if record["status"] == "running" or status != "finished":
        record.update(status=status, error=error or record["error"], ended=_now())
    _drop_empty(folder)
    _write_record(folder, record)
    return record


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
