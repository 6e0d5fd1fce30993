"""What W&B gets of a run: history, metrics, claims, texts, figures, what was trained and on what.

A thread of its own sends it, so that no server is waited for. Nothing that names the machine, its
user or its packages leaves unless W&B's own variables ask for it, such as WANDB_HOST or
WANDB_X_SAVE_REQUIREMENTS=true; data sets are named, never uploaded.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from hashlib import blake2s, sha256
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import psutil

from labkit.show import Table, show

Values = dict[str, Any]
UPLOAD_BYTES = 100 * 10**6  # of a larger artifact, W&B gets the name and the parents only
UNSENT = "unsent"  # a file of this name marks a run that W&B did not get whole
WAIT = 40.0  # seconds at most that a finished run waits for W&B
DATA = ("data", "pretraining_texts", "preferences")  # parameters that name a data set
_SCALARS = (int, float, str, bool, type(None))
# A container may have no home to write to; a place that the user has set stays.
_FOLDERS = [n for n in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if not os.environ.get(n)]


class Log:
    """The run of W&B next to a `record.Run`, in the run's folder; offline without a server.

    `send` names a method below and returns at once. An error ends what W&B gets, never the run.
    """

    def __init__(self, record: Values, folder: Path, project: str) -> None:
        self._record, self._folder, self._figures = record, folder, set[str]()
        self._late = False  # the run has ended, and nobody waits any longer
        for name in [n for n in os.environ if n.startswith("WANDB_") and not os.environ[n]]:
            del os.environ[name]  # compose files leave them empty, which wandb refuses
        os.environ.setdefault("WANDB_SILENT", "true")  # login takes no settings
        for name in _FOLDERS:
            os.environ[name] = str(folder / "wandb" / name.split("_")[1].lower())
        self._about = _about(record, folder, project)
        self._jobs: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        with suppress(Exception):  # said by the thread
            import requests  # noqa: F401
            import wandb  # noqa: F401  (two threads that import at once can meet half a module)
        self._thread.start()

    def send(self, method: str, *arguments: Any) -> None:
        self._jobs.put((method, arguments))

    def close(self, record: Values) -> None:
        """Sends the rest, and waits for it; `labkit sync` sends what is not sent in time."""
        self.send("finish", record)
        self._thread.join(WAIT)
        if self._thread.is_alive():
            self._late = True
            self._failed("finish", "no answer")

    def _work(self) -> None:
        method = ""
        for mode in dict.fromkeys((os.environ.get("WANDB_MODE", ""), "offline")):
            try:
                self._open(mode)
                while method != "finish":
                    method, arguments = self._jobs.get()
                    getattr(self, method)(*arguments)
                return
            except Exception as error:
                if not self._late:
                    self._failed(method, error)
                if method or self._late:
                    return

    def _failed(self, method: str, error: Any) -> None:
        what = "left out from here on" if method else "not reached"
        if method == "finish":  # all of it is in the run's folder
            what = "not sent whole, `labkit sync` sends it again"
            (self._folder / "wandb").mkdir(exist_ok=True)
            (self._folder / "wandb" / UNSENT).touch()
            for process in psutil.Process().children():  # else Python waits for it at its exit
                if "wandb-core" in process.name():
                    process.kill()
            with suppress(Exception, SystemExit):  # it exits with the code of the killed process
                import wandb

                wandb.teardown()
        logging.getLogger("labkit").warning("W&B, %s: %s", what, error)

    def _open(self, mode: Any) -> None:
        import requests
        import wandb

        mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        if mode == "online":  # wandb itself would wait for all of init_timeout
            requests.head(wandb.setup().settings.base_url, timeout=3)
        self.run, self.wandb = wandb.init(mode=mode, reinit="finish_previous", **self._about), wandb
        self.run._log_artifact = self._publish  # of tables too
        # Without it, the curve of a second training goes on where the first ended.
        self.run.define_metric("*", step_metric="step")
        self._configure(self._record)
        for name in filter(self._record["parameters"].get, ("model", *DATA)):
            self._source(name, str(self._record["parameters"][name]))

    def log(self, entry: Values) -> None:
        self.run.log({key if key == "step" else _in("train", key): entry[key] for key in entry})

    def table(self, name: str, rows: list[Values]) -> None:
        columns = Table(rows).columns
        cells = ((row.get(key) for key in columns) for row in rows)
        texts = [[c if isinstance(c, _SCALARS) else show(c) for c in row] for row in cells]
        table = self.wandb.Table([*map(str, columns)], texts, allow_mixed_types=True)
        self.run.log({_in("texts" if name.startswith("samples") else "tables", name): table})

    def figure(self, title: str, image: Any) -> None:
        """Each title once: a slider draws its figure anew with each move."""
        if title not in self._figures:
            self.run.log({f"figures/{title}": self.wandb.Image(image)})
        self._figures.add(title)

    def artifact(self, entry: Values) -> None:
        title = f"{self._folder.parent.name}-{entry['name']}".replace("/", "-")
        made = self.wandb.Artifact(title, entry["kind"].replace(" ", "-"), metadata=entry)
        if entry["bytes"] <= UPLOAD_BYTES:  # without a copy
            made.add_dir(str(self._folder / entry["name"]), policy="immutable", skip_cache=True)
        self._publish(made)

    def finish(self, record: Values) -> None:
        self._configure(record)  # by now the GPU is known
        if record["claims"]:
            self.table("claims", record["claims"])
        summary = {_in("eval", name): value for name, value in record["metrics"].items()}
        summary |= {f"claims/{claim['number']}": claim["verdict"] for claim in record["claims"]}
        costs = {key: record[key] for key in ("seconds", "peak_memory_bytes")}
        costs |= {f"{name}_seconds": value for name, value in record["timings"].items()}
        self.run.summary.update(summary | {f"cost/{name}": costs[name] for name in costs})
        self.run.finish(exit_code=int(record["status"] != "finished"))

    def _configure(self, record: Values) -> None:
        about = {key: record[key] for key in ("hardware", "versions", "commit", "seeds")}
        self.run.config.update({"labkit": about}, allow_val_change=True)

    def _source(self, name: str, value: str) -> None:
        """Makes the model or data set that a run starts from its input: its name and checksum."""
        about, file = {"parameter": name, "source": _place(value)}, Path(value)
        if file.is_file():
            about["sha256"] = sha256(file.read_bytes()).hexdigest()
        kind = "dataset" if name in DATA else "base-model"
        title = re.sub(r"[^\w.-]", "-", f"{kind}-{about['source']}")[:120]
        made = self.wandb.Artifact(title, kind, metadata=about)
        with made.new_file("source.json") as stream:
            json.dump(about, stream)
        self._publish(made, used=True)

    def _publish(self, artifact: Any, *_: Any, used: bool = False, **__: Any) -> Any:
        """What W&B does offline for `log_artifact`; online it would wait for answers.

        `used`: as `use_artifact`, which W&B refuses to do offline.
        """
        made, aliases = self.run._prepare_artifact(artifact, None, None, None)
        how = dict(finalize=True, is_user_created=True, use_after_commit=used)
        self.run._interface.publish_artifact(self.run, made, aliases, None, **how)
        return made


def sync(root: Path) -> int:
    """Sends the runs below `<root>/runs` that W&B has not got; returns how many there were.

    Raises ValueError without a login, and OSError where W&B did not take all of them.
    """
    marked = [mark.parent for mark in root.glob(f"runs/*/*/wandb/{UNSENT}")]
    offline = {file.parent for file in root.glob("runs/*/*/wandb/offline-run-*/*.wandb")}
    folders = {folder for folder in offline if not [*folder.glob("*.wandb.synced")]}
    folders |= {folder for place in marked for folder in place.glob("run-*")}
    if folders:
        login()
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--include-synced"]
        loud = {k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "WANDB_SILENT")}
        if subprocess.run([*command, *map(str, sorted(folders))], env=loud).returncode:
            raise OSError("W&B did not take all runs; what it has not got is sent the next time")
        for place in marked:
            (place / UNSENT).unlink()
    return len(folders)


def login() -> None:
    """Raises ValueError unless there is a key for W&B's server."""
    import wandb

    os.environ.pop("WANDB_MODE", None)  # offline is meant for runs
    os.environ.setdefault("WANDB_DIR", tempfile.gettempdir())  # for its logs
    if not wandb.login(prompt=False, verify=False):
        raise ValueError("not logged in to W&B: run `wandb login`, or set WANDB_API_KEY")


def _in(section: str, name: str) -> str:
    return name if name.startswith(("train/", "eval/")) else f"{section}/{name}"


def _place(value: Any) -> Any:
    """A path without the folders above it, which may name their owner; else the value."""
    return Path(value).name if isinstance(value, str) and value and Path(value).exists() else value


def _about(record: Values, folder: Path, project: str) -> Values:
    """What the run is called and belongs to. W&B's own variables, where set, come first."""
    from labkit import notebooks

    notebook, given = record["notebook"], record["parameters"]
    same = {k: v for k, v in given.items() if k not in {*record["seeds"], "resume", "save_steps"}}
    condition = blake2s(json.dumps(same, sort_keys=True).encode(), digest_size=3).hexdigest()
    gpu = bool(record["hardware"].get("gpus")) or Path("/proc/driver/nvidia/gpus").exists()
    tags = (re.sub(r"^\d+_", "", notebook), Path(str(given.get("model", ""))).name)
    about: Values = {"project": project, "name": f"{notebook}-{folder.name}", "job_type": notebook}
    about["run_group"] = f"{notebook}-{condition}"  # runs that differ in nothing but seeds
    about["tags"] = [tag[:64] for tag in (*tags, "gpu" if gpu else "cpu") if tag]
    with suppress(OSError, ValueError):  # a run of no notebook
        about["notes"] = next((n.question for n in notebooks.available() if n.name == notebook), "")
    quiet: Values = dict(silent=True, console="off", init_timeout=10, finish_timeout=30, host="")
    quiet |= dict(finish_timeout_raises=True, program=notebook, disable_git=True)
    quiet |= dict(x_save_requirements=False, x_disable_meta=True, x_disable_stats=not gpu)
    for values in (about, quiet):
        for name in [name for name in values if f"WANDB_{name.upper()}" in os.environ]:
            del values[name]
    if "run_group" in about:
        about["group"] = about.pop("run_group")
    config = {name: _place(value) for name, value in given.items()}
    return about | {"dir": str(folder), "config": config, "settings": quiet}
