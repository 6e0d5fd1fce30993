"""The run record: what a notebook run was given, what it measured, and what it concluded.

One folder a run, `runs/<notebook>/<time>-<id>/`, with `record.json` in it. The record is
replaced as a whole each time it is written, so a killed run leaves the last complete one,
and a run never opens another run's folder. The history is kept here as well as in W&B,
because an offline W&B run cannot be read back. No environment variables are recorded.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from labkit import machine

VERDICTS = ("holds", "holds in part", "does not hold here")
_SECRET = re.compile(r"(^|_)(api_key|secret|password|(hf|auth|access)_token)$", re.IGNORECASE)
_UPLOAD_BYTES = 100 * 10**6  # more is not sent to W&B: only where it lies
_WRITE_EVERY = 5.0  # seconds between records while metrics stream in
_logger = logging.getLogger("labkit")


class Table:
    """Rows to show in a notebook: HTML with every value escaped, aligned text elsewhere."""

    def __init__(self, rows: list[dict[str, Any]], css_class: str = "labkit-table") -> None:
        self.rows = rows
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self._css_class = css_class

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(str(name))}</th>" for name in self.columns)
        body = "".join(
            "<tr>"
            + "".join(f"<td>{escape(show(row.get(c, '')))}</td>" for c in self.columns)
            + "</tr>"
            for row in self.rows
        )
        return f'<table class="{self._css_class}"><tr>{head}</tr>{body}</table>'

    def __repr__(self) -> str:
        cells = [self.columns] + [[show(r.get(c, "")) for c in self.columns] for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (" | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


def show(value: Any) -> str:
    """A value as a short text: floats to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Run:
    """One notebook run. Use `start` to make it; `finish`, or leaving `with`, closes it."""

    def __init__(self, notebook: str, folder: Path, parameters: dict[str, Any]) -> None:
        self.folder = folder
        self.record = _new_record(notebook, folder, parameters)
        self._began = self._written = time.perf_counter()
        self._wandb: Any = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            self.record["error"] = f"{kind.__name__}: {error}"
        self.finish("finished" if kind is None else "failed")

    def __repr__(self) -> str:
        r = self.record
        place = "/".join(self.folder.parts[-3:])
        return f"{place} · {r['status']} · {r['seconds']:.0f} s · {len(r['claims'])} claims"

    def path(self, name: str) -> Path:
        """Where a file or folder of this run goes; its parent exists afterwards."""
        target = self.folder / name
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"name must stay inside the run's folder, got {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append one row to the history. Without `step`, the row's number is its step."""
        step = len(self.record["history"]) if step is None else int(step)
        self.record["history"].append(plain({"step": step, **metrics}))
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})
        if time.perf_counter() - self._written > _WRITE_EVERY:
            self._write()

    def metric(self, **values: Any) -> None:
        """Set final metrics by name; a later value of the same name replaces the earlier."""
        self.record["metrics"].update(plain(values))
        self._write()

    def claim(self, number: int, claim: str, how: str, value: Any, verdict: str) -> None:
        """Record what was measured about a claim of the chapter.

        `verdict` is one of "holds", "holds in part", "does not hold here". A second call with
        the same number replaces the first, so that a cell may be run again.
        """
        if verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}; got {verdict!r}")
        row = plain(dict(number=number, claim=claim, how=how, value=value, verdict=verdict))
        others = [c for c in self.record["claims"] if c["number"] != row["number"]]
        self.record["claims"] = sorted([*others, row], key=lambda c: c["number"])
        self._write()

    def table(self, name: str, rows: list[dict[str, Any]]) -> Table:
        """Record a small table of results under `name`, and return it for display."""
        self.record["tables"][name] = plain(rows)
        if self._wandb is not None and rows:
            import wandb

            table = Table(self.record["tables"][name])
            data = [[show(row.get(c, "")) for c in table.columns] for row in table.rows]
            self._wandb.log({name: wandb.Table(columns=table.columns, data=data)})
        self._write()
        return Table(rows)

    def artifact(self, name: str, kind: str = "model", parents: Sequence[str] = ()) -> None:
        """Note what was trained: the folder `name` of this run, and which others it came from.

        The lineage goes into the record. W&B gets an artifact of the same name with its
        `parents` as metadata: the files up to 100 MB, beyond that where they lie. Raises
        `FileNotFoundError` for a folder, `ValueError` for a parent, that is not there.
        """
        folder, known = self.path(name), [a["name"] for a in self.record["artifacts"]]
        if not folder.is_dir():
            raise FileNotFoundError(f"artifact: expected the folder {name!r} in {self.folder}")
        if strangers := sorted({*parents} - {*known}):
            raise ValueError(f"parents: expected some of {known}, got {strangers}")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        about = {"name": name, "kind": kind, "parents": list(parents), "bytes": size}
        others = [a for a in self.record["artifacts"] if a["name"] != name]
        self.record["artifacts"] = [*others, about]
        if self._wandb is not None:
            import wandb

            made = wandb.Artifact(f"{self.record['notebook']}-{name}", kind, metadata=about)
            if size <= _UPLOAD_BYTES:
                for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                    place = file.relative_to(folder).as_posix()
                    made.add_file(str(file), place, policy="immutable", skip_cache=True)  # no copy
            else:
                made.add_reference(folder.resolve().as_uri(), checksum=False)
            self._wandb.log_artifact(made)
        self._write()

    def lineage(self) -> Table:
        """What was trained in this run, in order: name, kind, what it came from, size."""
        rows = [{**a, "parents": ", ".join(a["parents"]), "bytes": f"{a['bytes'] / 1e6:.1f} MB"}
                for a in self.record["artifacts"]]  # fmt: skip
        return Table([{"size" if k == "bytes" else k: v for k, v in row.items()} for row in rows])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside `with` to the record's timings under `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            timings = self.record["timings"]
            timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - began, 3)

    def claims_table(self) -> Table:
        """The claims so far: number, claim, how measured, value, verdict."""
        names = {"number": "#", "how": "how measured"}
        rows = [{names.get(k, k): v for k, v in c.items()} for c in self.record["claims"]]
        return Table(rows, css_class="labkit-claims")

    def finish(self, status: str = "finished") -> None:
        """Close the run: status, time and peak memory into the record, then close W&B.

        A run is closed once; a second call changes nothing.
        """
        if self.record["status"] != "running":
            return
        self.record.update(status=status, ended=_now(), hardware=machine.hardware())
        self._write()
        if self._wandb is not None:
            summary, self._wandb = self._wandb, None
            summary.summary.update(self.record["metrics"])
            summary.finish(exit_code=0 if status == "finished" else 1)

    def _write(self) -> None:
        self._written = time.perf_counter()
        self.record["seconds"] = round(self._written - self._began, 3)
        self.record["peak_memory_bytes"] = machine.peak_memory()
        write_record(self.folder, self.record)


def start(
    notebook: str,
    parameters: dict[str, Any],
    *,
    root: str | Path | None = None,
    wandb_project: str = "labkit",
) -> Run:
    """Begin a run: make its folder, write the first record, open W&B unless it is off.

    The folder is `$LABKIT_RUN_DIR` where that is set (`labkit run` sets it), else
    `<root>/runs/<notebook>/<time>-<id>`. `root` is by default `$LABKIT_RUNS`, or the nearest
    parent folder that holds labkit's `pyproject.toml`, or the current folder. W&B follows
    `WANDB_MODE`: offline without a login, `disabled` to leave it out. Raises `OSError` naming
    the folder when it cannot be written, `FileExistsError` when it already holds a record.
    """
    given = os.environ.get("LABKIT_RUN_DIR")
    folder = Path(given) if given else new_folder(notebook, root)
    if (folder / "record.json").exists():
        raise FileExistsError(
            f"{folder} already holds a run's record; unset LABKIT_RUN_DIR or name a new folder"
        )
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(notebook, folder, parameters)
    run._write()
    run._wandb = _start_wandb(notebook, run, wandb_project)
    return run


def new_folder(notebook: str, root: str | Path | None = None) -> Path:
    """Make a folder of its own for a run of `notebook` and return it."""
    identity = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    folder = (project_root() if root is None else Path(root)) / "runs" / notebook / identity
    with _explained(folder):
        folder.mkdir(parents=True)
    return folder


def project_root() -> Path:
    """Where `runs/` is: `$LABKIT_RUNS`, the project that surrounds the current folder, or it."""
    if named := os.environ.get("LABKIT_RUNS"):
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        if file.is_file() and re.search(r'^name = "labkit"$', file.read_text("utf-8"), re.M):
            return folder
    return here


def close(
    folder: Path, notebook: str, parameters: dict[str, Any], status: str, error: str = ""
) -> None:
    """Close the record in `folder` from outside: after a kernel that failed or never recorded."""
    file = folder / "record.json"
    if file.exists():
        record = json.loads(file.read_text("utf-8"))
    else:
        record = _new_record(notebook, folder, parameters)
    if error:
        record["error"] = error
    if record["status"] == "running" or status == "failed":
        record.update(status=status, ended=_now())
    write_record(folder, record)


def read_runs(root: str | Path | None = None) -> list[dict[str, Any]]:
    """All records below `<root>/runs`, oldest first, each with its `folder` added.

    A record that cannot be read comes back with the status `unreadable` and the reason.
    """
    top = project_root() if root is None else Path(root)
    runs = []
    for file in sorted((top / "runs").glob("*/*/record.json"), key=lambda f: f.parent.name):
        try:
            record = json.loads(file.read_text("utf-8"))
            if not isinstance(record, dict):
                raise ValueError("expected a JSON object")
        except (OSError, ValueError) as error:
            record = _new_record(file.parent.parent.name, file.parent, {})
            record.update(status="unreadable", error=f"{file}: {error}")
        runs.append({**record, "folder": str(file.parent)})
    return runs


def recorded(question: str) -> dict[str, Any]:
    """Results committed as `benchmarks/results/<question>.json`, for sweeps too long to run live.

    Returns hardware, versions and `runs`, one dict a point. Raises FileNotFoundError naming the
    command that makes the file.
    """
    file = Path(__file__).parents[1] / "benchmarks" / "results" / f"{question}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.name}: no recorded results of {question!r}; make them with "
            f"`python benchmarks/{question}.py --json benchmarks/results/{question}.json`, "
            "or run the notebook with recorded=False"
        )
    return json.loads(file.read_text("utf-8"))


def report(root: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Write one HTML page about all runs (`labkit.reporting`); returns its path."""
    from labkit import reporting

    top = project_root() if root is None else Path(root)
    return reporting.write(read_runs(top), Path(out) if out else top / "runs" / "report.html")


def plain(value: Any) -> Any:
    """`value` as JSON holds it. Scalars of torch and numpy are unpacked; NaN becomes text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    for method in ("item", "tolist"):
        if hasattr(value, method) and (method == "tolist" or getattr(value, "size", 1) == 1):
            return plain(getattr(value, method)())
    return str(value)


def write_text(file: Path, text: str) -> None:
    """Replace `file` as a whole: written beside it, flushed to the disk, then renamed."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with _explained(file.parent):
        try:
            with open(partial, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `record.json` into `folder`, whole or not at all."""
    text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False)
    write_text(folder / "record.json", text + "\n")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "free some space or choose another folder by --output, root or LABKIT_RUNS"
        message = f"cannot write to the run folder {folder}: {error.strerror}; {remedy}"
        raise type(error)(error.errno, message) from error


def _new_record(notebook: str, folder: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    shown = {k: "(hidden)" if _SECRET.search(k) else v for k, v in parameters.items()}
    return {
        "schema": 1,
        "notebook": notebook,
        "id": folder.name,
        "status": "running",
        "error": "",
        "started": _now(),
        "ended": "",
        "seconds": 0.0,
        "parameters": plain(shown),
        "seeds": plain({k: v for k, v in parameters.items() if re.search(r"(^|_)seeds?$", k)}),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "timings": {},
        "peak_memory_bytes": 0,
        "metrics": {},
        "claims": [],
        "tables": {},
        "artifacts": [],
        "history": [],
    }


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _start_wandb(notebook: str, run: Run, project: str) -> Any:
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode == "disabled":
        return None
    import wandb

    # No host, code or environment leaves in W&B's own metadata, and nothing is printed.
    settings = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, x_disable_meta=True,
        disable_git=True, init_timeout=10, finish_timeout=10,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        project=project, name=f"{notebook}-{run.folder.name}", group=notebook,
        config=run.record["parameters"], dir=str(run.folder), settings=settings, reinit="finish_previous",
    )  # fmt: skip
    try:
        return wandb.init(mode=mode, **options)
    except wandb.errors.CommError as error:
        _logger.warning("W&B was not reached (%s); this run stays offline", error)
        return wandb.init(mode="offline", **options)


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
