"""Recorded sweeps: long runs over several seeds, whose results are committed and decide claims."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

from labkit import notebooks, tinytown

_FOLDER = notebooks.shipped("benchmarks/results")
_read: dict[str, list[dict[str, Any]]] = {}  # what those that this process has read compare
this_run: dict[str, Any] = {}  # its notebook and parameters; `record.start` sets them


def recorded(question: str) -> dict[str, Any]:
    """A sweep's committed results, with a word where there are none, or settings differ.

    Runs of an earlier base are left out, and all where this run's model or data are one's own.
    """
    used = {this_run.get(name, "tinytown") for name in ("model", "data", "preferences")}
    if used != {"tinytown"}:
        return {"runs": []}
    file = _FOLDER / f"{question}.json"
    found = json.loads(file.read_text("utf-8")) if file.exists() else {"runs": []}
    if not found["runs"]:
        print(f"{file.name} is not recorded yet: benchmarks/{question}.py makes it.")
        return found
    if found.get("base", tinytown.base_checksum()) != tinytown.base_checksum():
        print(f"{file.name} was recorded on an earlier base checkpoint, not on this one.")
        found["runs"] = []
    _read[question] = [p for p in found["runs"] if p.get("stage", "compare") == "compare"]
    if other := differs(question):
        print(f"This run differs from {question}.json: {other}.")
    return found


def differs(question: str) -> str:
    """Which parameters of this run are not those that a sweep's points share: a note for figures."""
    points = _read[question]
    with suppress(FileNotFoundError):
        names = notebooks.renamed(notebooks.folder() / f"{this_run.get('notebook')}.ipynb")
        points = [{names.get(name, name): p[name] for name in p} for p in points]
    found = []
    for name in [name for name in this_run if points and name in points[0] and name != "device"]:
        values: list[Any] = [p.get(name) for p in points]
        own = this_run[name]
        floats = isinstance(own, float) and isinstance(values[0], float)
        rounded = floats and math.isclose(own, values[0], rel_tol=0.02)  # 0.33 for a third
        if values == values[:1] * len(values) and values[0] != own and not rounded:
            found.append(f"{name} {own} instead of {values[0]}")
    return ", ".join(found)


def source(name: str = "") -> str:
    """What decides a claim: "this run", or a sweep by name; left out, the only one that was read."""
    name = name or ("this run" if not _read else next(iter(_read)) if len(_read) == 1 else "")
    if name in _read:
        seeds = {p.get("seed") for p in _read[name]}
        return f"recorded sweep {name}, {len(seeds)} seeds"
    return name
