"""The run record: what a run was given, what it measured, and what it concluded.

Each run has its folder, `runs/<notebook>/<time>-<id>/`, with a `record.json` that is replaced
atomically, so that a killed run leaves its last complete record. The history is kept here as
well as in W&B, whose offline runs cannot be read back. No environment variables are recorded.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import blake2s
from pathlib import Path
from typing import Any

from labkit.show import Table

Place = str | Path | None
Values = dict[str, Any]
VERDICTS = ("holds", "holds in part", "does not hold here", "undecided", "not measured here")
_PROJECT = Path(__file__).resolve().parents[1]
_MACHINE = blake2s(platform.node().encode(), digest_size=4).hexdigest()
_PACKAGES = """labkit torch transformers trl peft bitsandbytes datasets accelerate tokenizers
safetensors numpy wandb papermill""".split()
_SECRET = re.compile(r"(^|_)(api_key|secret|password|(hf|auth|access)_token)$", re.IGNORECASE)
_SEED = re.compile(r"(^|_)seeds?$")
_UPLOAD_BYTES = 100 * 10**6  # of a larger artifact, W&B gets the place only
_WRITE_EVERY = 5.0  # seconds between records while metrics stream in


class Run:
    """One run. Use `start` to make it and `finish` to close it."""

    def __init__(self, notebook: str, folder: Path, parameters: Values) -> None:
        self.folder, self.record = folder, _new_record(notebook, folder, parameters)
        self._began = time.perf_counter()
        self._wandb: Any = None
        self._write()

    def __repr__(self) -> str:
        r, place = self.record, "/".join(self.folder.parts[-3:])
        return f"{place} · {r['status']} · {r['seconds']:.0f} s · {len(r['claims'])} claims"

    def path(self, name: str) -> Path:
        """Where a file or folder of this run goes; its parent exists afterwards."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def log(self, metrics: Values, step: int | None = None) -> None:
        """Append one entry to the history. Without `step`, the entry's number is its step."""
        entry = {"step": len(self.record["history"]) if step is None else int(step), **metrics}
        self.record["history"].append(plain(entry))
        self._send(lambda wandb, run: run.log(entry))
        if time.perf_counter() - self._written > _WRITE_EVERY:
            self._write()

    def metric(self, **values: Any) -> None:
        """Set final metrics by name; a later value of the same name replaces the earlier."""
        self.record["metrics"].update(plain(values))
        self._write()

    def claim(self, number: int, claim: str, how: str, value: Any, verdict: str) -> None:
        """Record a claim's measurement; the same number again replaces it (a cell run twice)."""
        if verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}; got {verdict!r}")
        entry = dict(number=number, claim=claim, how=how, value=value, verdict=verdict)
        self._put("claims", "number", entry)
        self.record["claims"].sort(key=lambda c: c["number"])
        self._write()

    def table(self, name: str, rows: list[Values]) -> Table:
        """Record a small table of results under `name`, and return it for display."""
        self.record["tables"][name] = plain(rows)
        table = Table(rows)
        columns, data = table.columns, table.cells()
        self._send(lambda wandb, run: run.log({name: wandb.Table(columns=columns, data=data)}))
        self._write()
        return table

    def artifact(self, name: str, kind: str = "model", parents: Sequence[str] = ()) -> None:
        """Record what was trained: the folder `name` of this run, and what it came from.

        W&B gets an artifact of that name with its `parents` as metadata: its files up to 100 MB,
        beyond that their place. Raises `ValueError` for a parent that is not recorded.
        """
        folder, known = self.path(name), [a["name"] for a in self.record["artifacts"]]
        if not folder.is_dir():
            raise FileNotFoundError(f"artifact: expected the folder {name!r} in {self.folder}")
        if unknown := sorted({*parents} - {*known}):
            raise ValueError(f"parents: expected some of {known}, got {unknown}")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        size = sum(file.stat().st_size for file in files)
        entry = {"name": name, "kind": kind, "parents": list(parents), "bytes": size}
        self._put("artifacts", "name", entry)
        self._write()

        def send(wandb: Any, run: Any) -> None:
            made = wandb.Artifact(f"{self.record['notebook']}-{name}", kind, metadata=entry)
            for file in files if size <= _UPLOAD_BYTES else []:
                place = file.relative_to(folder).as_posix()
                made.add_file(str(file), place, policy="immutable", skip_cache=True)  # no copy
            if size > _UPLOAD_BYTES:
                made.add_reference(folder.resolve().as_uri(), checksum=False)
            run.log_artifact(made)

        self._send(send)

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
        claims = self.record["claims"]
        rows = [{names.get(key, key): value for key, value in claim.items()} for claim in claims]
        return Table(rows, css_class="labkit-claims")

    def finish(self, status: str = "finished") -> None:
        """Close the record, then W&B; a second call changes nothing."""
        if self.record["status"] == "running":
            self.record.update(status=status, ended=_now(), hardware=hardware())
            self._write()
            self._send(lambda wandb, run: run.summary.update(self.record["metrics"]))
            self._send(lambda wandb, run: run.finish(exit_code=int(status != "finished")))
            self._wandb = None

    def _put(self, group: str, key: str, entry: Values) -> None:
        others = [e for e in self.record[group] if e[key] != entry[key]]
        self.record[group] = [*others, plain(entry)]

    def _send(self, send: Callable[[Any, Any], Any]) -> None:
        """Calls `send(wandb, its run)` unless W&B is off; its errors never end this run."""
        try:
            if self._wandb is not None:
                send(sys.modules["wandb"], self._wandb)
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
    default `project_root()`. W&B follows `WANDB_MODE`: offline without a login, `disabled` to
    leave it out. Raises `OSError` naming a folder that cannot be written or holds a record.
    """
    folder = Path(os.environ.get("LABKIT_RUN_DIR") or new_folder(notebook, root))
    if (folder / "record.json").exists():
        raise FileExistsError(f"{folder} already holds a run's record; unset LABKIT_RUN_DIR")
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(notebook, folder, parameters)
    run._wandb = _start_wandb(run, wandb_project)
    return run


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
    file, record = folder / "record.json", _new_record(notebook, folder, parameters)
    if file.exists():
        record = json.loads(file.read_text("utf-8"))
    if record["status"] == "running" or status != "finished":
        record.update(status=status, error=error or record["error"], ended=_now())
    _write_record(folder, record)


def read_runs(root: Place = None) -> list[Values]:
    """All records below `<root>/runs`, oldest first, each with its `folder` added.

    The status is `stopped` where the process of a running record is gone, `unreadable` where
    the file cannot be read.
    """
    import psutil

    runs = []
    files = Path(root or project_root()).glob("runs/*/*/record.json")
    for file in sorted(files, key=lambda f: f.parent.name):
        try:
            record = dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            record = _new_record(file.parent.parent.name, file.parent, {})
            record.update(status="unreadable", error=f"{file}: {error}")
        machine, process = record.get("process") or ("", 0)  # another machine's are not known
        if machine == _MACHINE and record["status"] == "running" and not psutil.pid_exists(process):
            record["status"] = "stopped"
        runs.append(record | {"folder": str(file.parent)})
    return runs


def recorded(question: str) -> Values:
    """Committed results of a sweep too long to run live: `benchmarks/results/<question>.json`."""
    file = _PROJECT / "benchmarks" / "results" / f"{question}.json"
    return json.loads(file.read_text("utf-8"))


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
    except OSError as error:
        reason = f"{error.strerror}; free some space or set another folder (--output, LABKIT_RUNS)"
        raise OSError(error.errno, reason, str(file)) from error
    finally:
        partial.unlink(missing_ok=True)


def commit() -> str:
    """The commit of the project's checkout, `-dirty` after changes; empty where there is none."""
    describe = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    with suppress(OSError, subprocess.SubprocessError):
        if (_PROJECT / ".git").exists():
            return subprocess.check_output(describe, cwd=_PROJECT, text=True, timeout=5).strip()
    return ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    from importlib.metadata import version  # slow to import

    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def hardware() -> Values:
    """Processor, usable cores, memory in bytes; threads and GPUs where torch is loaded."""
    import psutil

    affinity = getattr(os, "sched_getaffinity", None)
    found: Values = {"system": f"{platform.system()} {platform.machine()}"}
    found["processor"] = _line("/proc/cpuinfo", "model name") or platform.processor()
    found["cores"] = len(affinity(0)) if affinity else os.cpu_count()
    found["memory_bytes"] = psutil.virtual_memory().total
    if torch := sys.modules.get("torch"):  # importing it would cost seconds
        found["threads"] = torch.get_num_threads()
        if devices := range(torch.cuda.device_count()):
            found["gpus"] = [torch.cuda.get_device_name(i) for i in devices]
            found["gpu_peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import psutil

    info = psutil.Process().memory_info()
    line = _line("/proc/self/status", "VmHWM")  # getrusage counts the parent's before exec
    return int(line.split()[0]) * 1024 if line else getattr(info, "peak_wset", info.rss)


def _line(file: str, name: str) -> str:
    text = Path(file).read_text() if Path(file).exists() else ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _new_record(notebook: str, folder: Path, parameters: Values) -> Values:
    given = {k: "(hidden)" if _SECRET.search(k) else v for k, v in plain(parameters).items()}
    seeds = {k: v for k, v in given.items() if _SEED.search(k)}
    record = {"schema": 1, "notebook": notebook, "id": folder.name, "status": "running"}
    record |= {"error": "", "started": _now(), "ended": "", "seconds": 0.0}
    record |= {"parameters": given, "seeds": seeds, "versions": versions(), "commit": commit()}
    record |= {"hardware": hardware(), "process": [_MACHINE, os.getpid()], "timings": {}}
    record |= {"peak_memory_bytes": 0, "metrics": {}, "claims": [], "tables": {}}
    return record | {"artifacts": [], "history": []}


def _write_record(folder: Path, record: Values) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False)
    write_text(folder / "record.json", text + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _start_wandb(run: Run, project: str) -> Any:
    """W&B's run inside the run's folder, or None; offline where its server is not reached."""
    for name in [n for n in os.environ if n.startswith("WANDB_") and not os.environ[n]]:
        del os.environ[name]  # compose files leave them empty, which wandb refuses
    for kind in ("DATA", "CACHE"):  # a container may have no home to write to
        os.environ.setdefault(f"WANDB_{kind}_DIR", str(run.folder / "wandb" / kind.lower()))
    for mode in dict.fromkeys((os.environ.get("WANDB_MODE", ""), "offline")):
        try:
            return None if mode == "disabled" else _open_wandb(run, project, mode)
        except Exception as error:
            logging.getLogger("labkit").warning("W&B was not opened: %s", error)
    return None


def _open_wandb(run: Run, project: str, mode: Any) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")  # login takes no settings
    import wandb

    online = mode == "" and wandb.login(prompt=False, verify=False)
    notebook = run.record["notebook"]
    about: Values = dict(project=project, group=notebook, name=f"{notebook}-{run.folder.name}")
    about |= dict(config=run.record["parameters"], dir=str(run.folder))
    quiet = dict(silent=True, console="off", x_disable_stats=True, init_timeout=10)
    private = dict(host="", x_save_requirements=False, x_disable_meta=True, disable_git=True)
    about["settings"] = wandb.Settings(finish_timeout=10, **quiet, **private)
    about["mode"] = mode or ("online" if online else "offline")
    made = wandb.init(reinit="finish_previous", **about)
    made.define_metric("*", step_metric="step")
    return made
