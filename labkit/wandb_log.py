"""What W&B gets of a run: history, metrics, claims, texts, figures, what was trained and on what.

Nothing that names the machine, its user or its packages leaves, unless W&B's own variables ask for
it, such as WANDB_HOST or WANDB_X_SAVE_REQUIREMENTS=true; data sets are named, never uploaded.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextlib import suppress
from hashlib import blake2s, sha256
from pathlib import Path
from typing import Any

from labkit.show import show

Values = dict[str, Any]
UPLOAD_BYTES = 100 * 10**6  # of a larger artifact, W&B gets the name and the parents only
MODELS = ("model", "judge_model")
DATA = ("data", "pretraining_texts", "preferences")  # parameters that name a data set
# A container may have no home to write to; a place that the user has set stays.
_FOLDERS = [n for n in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if not os.environ.get(n)]


class Log:
    """The run of W&B next to a `record.Run`. Its calls queue what they send, and return."""

    def __init__(self, run: Any, record: Values, folder: Path) -> None:
        import wandb

        self.run, self.wandb, self._folder, self._figures = run, wandb, folder, set[str]()
        run.define_metric("*", step_metric="step")  # else curves of a second training follow on
        about = {key: record[key] for key in ("hardware", "versions", "commit", "seeds")}
        run.config.update({"labkit": about})
        for name in filter(record["parameters"].get, (*MODELS, *DATA)):
            self._source(name, str(record["parameters"][name]))

    def log(self, entry: Values) -> None:
        self.run.log({key if key == "step" else _in("train", key): entry[key] for key in entry})

    def table(self, name: str, rows: list[Values]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        kept = (int, float, str, bool, type(None))
        cells = [[row.get(key) for key in columns] for row in rows]
        cells = [[cell if isinstance(cell, kept) else show(cell) for cell in row] for row in cells]
        table = self.wandb.Table([str(key) for key in columns], cells, allow_mixed_types=True)
        self.run.log({_in("texts" if name.startswith("samples") else "tables", name): table})

    def figure(self, title: str, image: Any) -> None:
        """Each title once: a slider redraws its figure with each move."""
        if title not in self._figures:
            self.run.log({f"figures/{title}": self.wandb.Image(image)})
        self._figures.add(title)

    def artifact(self, entry: Values) -> None:
        name, place = entry["name"], self._folder / entry["name"]
        title = f"{self._folder.parent.name}-{name}".replace("/", "-")
        made = self.wandb.Artifact(title, entry["kind"].replace(" ", "-"), metadata=entry)
        if entry["bytes"] <= UPLOAD_BYTES:  # without a copy
            made.add_dir(str(place), policy="immutable", skip_cache=True)
        self.run.log_artifact(made)

    def finish(self, record: Values) -> None:
        claims = record["claims"]
        if claims:
            self.table("claims", claims)
        summary = {_in("eval", name): value for name, value in record["metrics"].items()}
        summary |= {f"claims/{claim['number']}": claim["verdict"] for claim in claims}
        costs = {key: record[key] for key in ("seconds", "peak_memory_bytes")}
        costs |= {f"{name}_seconds": value for name, value in record["timings"].items()}
        self.run.summary.update(summary | {f"cost/{name}": costs[name] for name in costs})
        self.run.finish(exit_code=int(record["status"] != "finished"))

    def _source(self, name: str, value: str) -> None:
        """Makes the model or data set that a run starts from its input: its name and checksum."""
        about, file = {"parameter": name, "source": value}, Path(value)
        if file.exists():
            about["source"] = file.name  # the path may name its owner
        if file.is_file():
            about["sha256"] = sha256(file.read_bytes()).hexdigest()
        kind = "dataset" if name in DATA else "base-model"
        title = re.sub(r"[^\w.-]", "-", f"{kind}-{about['source']}")[:120]
        made = self.wandb.Artifact(title, kind, metadata=about)
        with made.new_file("source.json") as stream:
            json.dump(about, stream)
        # As `use_artifact`, which waits for the server and refuses to work offline.
        self.run._log_artifact(made, is_user_created=True, use_after_commit=True)


def _in(section: str, name: str) -> str:
    return name if name.startswith(("train/", "eval/")) else f"{section}/{name}"


def open_log(record: Values, folder: Path, project: str) -> Log | None:
    """W&B's run inside the run's folder, or None; offline where its server is not reached."""
    for name in [n for n in os.environ if n.startswith("WANDB_") and not os.environ[n]]:
        del os.environ[name]  # compose files leave them empty, which wandb refuses
    os.environ.setdefault("WANDB_SILENT", "true")  # login takes no settings
    for name in _FOLDERS:
        os.environ[name] = str(folder / "wandb" / name.split("_")[1].lower())
    mode: Any
    for mode in dict.fromkeys((os.environ.get("WANDB_MODE", ""), "offline")):
        try:
            import wandb

            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            if mode == "online":  # wandb itself would wait for all of init_timeout
                import requests

                requests.head(wandb.Settings().base_url, timeout=3)
            run = wandb.init(mode=mode, reinit="finish_previous", **_about(record, folder, project))
            return Log(run, record, folder)
        except Exception as error:
            logging.getLogger("labkit").warning("W&B was not opened: %s", error)
    return None


def _about(record: Values, folder: Path, project: str) -> Values:
    """What the run is called and belongs to. W&B's own variables, where set, come first."""
    notebook, given = record["notebook"], record["parameters"]
    same = {k: v for k, v in given.items() if k not in {*record["seeds"], "resume", "save_steps"}}
    condition = blake2s(json.dumps(same, sort_keys=True).encode(), digest_size=3).hexdigest()
    about: Values = {"PROJECT": ("project", project), "NAME": ("name", f"{notebook}-{folder.name}")}
    about["RUN_GROUP"] = ("group", f"{notebook}-{condition}")  # runs that differ in seeds only
    about["JOB_TYPE"] = ("job_type", notebook)
    about["NOTES"] = ("notes", _question(notebook))
    device = "cuda" if _on_gpu() else "cpu"
    tags = (re.sub(r"^\d+_", "", notebook), Path(str(given.get("model", ""))).name, device)
    about["TAGS"] = ("tags", [tag[:64] for tag in tags if tag])
    quiet: Values = dict(silent=True, console="off", init_timeout=10, finish_timeout=10, host="")
    quiet |= dict(disable_git=True, x_save_requirements=False, x_disable_meta=True)
    quiet |= dict(x_disable_stats=not _on_gpu())
    free = {k: v for k, v in quiet.items() if f"WANDB_{k.upper()}" not in os.environ}
    found = dict(v for k, v in about.items() if f"WANDB_{k}" not in os.environ)
    return found | dict(dir=str(folder), config=given, settings=free)


def _on_gpu() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available())


def _question(notebook: str) -> str:
    from labkit import notebooks

    with suppress(OSError, ValueError):
        return next((n.question for n in notebooks.available() if n.name == notebook), "")
    return ""
