"""`labkit report`: all runs in one HTML file that needs no server, no network and nothing beside it.

The records stand in the page as JSON, and the views of `views.js` draw from them. The curves
are drawn by uPlot 1.6.32 (MIT, github.com/leeoniya/uPlot), which is inlined with its licence.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from labkit import record

POINTS = 200  # of a curve in the page
HERE = Path(__file__).parent
SCRIPTS = ("uPlot.iife.min.js", "parts.js", "views.js")


def write(root: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Write one page of all runs below `<root>/runs`, by default as `runs/report.html`.

    Raises FileNotFoundError where there is no `<root>/runs`.
    """
    root = Path(root or record.project_root()).absolute()
    page = Path(out or root / "runs" / "report.html").absolute()
    if not (root / "runs").is_dir():
        raise FileNotFoundError(f"expected a folder that holds runs/, got {root}")
    runs = [_shown(run, page.parent) for run in record.read_runs(root)]
    data = json.dumps({"root": root.name, "runs": runs}, ensure_ascii=False, separators=(",", ":"))
    files = {file.name: file.read_text("utf-8") for file in HERE.iterdir() if file.is_file()}
    licence = f"/* {files['uPlot.LICENSE']} */"
    script = "\n".join([licence, *(files[name] for name in SCRIPTS)])
    parts = {"style": files["uPlot.min.css"] + files["page.css"], "script": script}
    parts["hash"] = b64encode(sha256(script.encode()).digest()).decode()  # no other script runs
    parts["data"] = data.replace("<", "\\u003c")  # ends no element and begins no comment
    page.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], files["page.html"])
    record.write_text(page, text)
    return page


def _shown(run: dict[str, Any], start: Path) -> dict[str, Any]:
    """A record as the page has it: thin curves, and where its files are, seen from the page."""
    folder = Path(run.pop("folder"))
    run |= {"place": os.path.relpath(folder.absolute(), start), "steps": [], "curves": {}}
    run["files"] = [n for n in ("notebook.ipynb", "record.json") if (folder / n).is_file()]
    history = run.pop("history")
    for name in dict.fromkeys(name for entry in history for name in entry if name != "step"):
        points = [(e["step"], e[name]) for e in history if isinstance(e.get(name), int | float)]
        steps, values = thin(points)
        if steps not in run["steps"]:
            run["steps"].append(steps)
        if len(steps) > 1:
            run["curves"][name] = [run["steps"].index(steps), values]
    return run


def thin(points: list[tuple[int, float]], limit: int = POINTS) -> tuple[list[int], list[float]]:
    """At most `limit` steps and values: of equal shares of the points, last step and mean value."""
    count = min(limit, len(points))
    bounds = [len(points) * i // count for i in range(count + 1)] if count else []
    shares = [points[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    means = [sum(value for _, value in share) / len(share) for share in shares]
    return [share[-1][0] for share in shares], [float(f"{mean:.5g}") for mean in means]
