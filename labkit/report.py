"""`labkit report`: all runs on one HTML page that needs nothing else: table, curves, claims."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from labkit import record
from labkit.show import Table, show

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto}
table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.25rem .7rem;
text-align:left;vertical-align:top}figure{display:inline-block;margin:.5rem 1rem .5rem 0}
polyline{fill:none;stroke:#2563a8;stroke-width:1.5}figcaption,small{color:#555}"""


def write(root: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Write one HTML page of all runs below `<root>/runs`, by default `runs/report.html`."""
    runs = record.read_runs(root)
    page = Path(out or Path(root or record.project_root()) / "runs" / "report.html")
    overview = [
        {key: run[key] for key in ("notebook", "id", "status")}
        | {"seconds": round(run["seconds"]), "peak memory, MB": run["peak_memory_bytes"] // 10**6}
        | {"metrics": _list(run["metrics"])}
        for run in runs
    ]
    head = f'<!doctype html><meta charset="utf-8"><title>labkit</title><style>{_STYLE}</style>'
    title = f"<h1>labkit: {len(runs)} run{'s' * (len(runs) != 1)}</h1>"
    body = Table(overview)._repr_html_() + "".join(map(_section, reversed(runs)))
    page.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(page, f"{head}{title}{body}\n")
    return page


def _section(run: dict[str, Any]) -> str:
    facts = {key: _list(run[key]) for key in ("parameters", "versions")}
    facts |= {"commit": run.get("commit", ""), "error": run["error"]}
    lineage = ([" + ".join(a["parents"]), a["name"]] for a in run.get("artifacts", []))
    facts["lineage"] = " · ".join(" → ".join(filter(None, names)) for names in lineage)
    lines = (f"<br>{escape(f'{key}: {text}')}" for key, text in facts.items() if text)
    page = f"<h2>{escape(run['notebook'])} <small>{escape(run['id'])}</small></h2>"
    page += f"<small>{''.join(lines)}</small>{Table(run['claims'])._repr_html_()}"
    for name in dict.fromkeys(name for entry in run["history"] for name in entry):
        page += _curve(name, run["history"]) if name != "step" else ""
    for name, rows in run["tables"].items():
        page += f"<h3>{escape(name)}</h3>{Table(rows)._repr_html_()}"
    return page


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {show(value)}" for name, value in values.items())


def _curve(name: str, history: list[dict[str, Any]]) -> str:
    points = [(e["step"], e[name]) for e in history if isinstance(e.get(name), (int, float))]
    if len(points) < 2:
        return ""
    (x0, y0), (x1, y1) = (map(min, zip(*points, strict=True)), map(max, zip(*points, strict=True)))
    across, up = 300 / ((x1 - x0) or 1), 90 / ((y1 - y0) or 1)
    path = " ".join(f"{(x - x0) * across:.1f},{(y1 - y) * up:.1f}" for x, y in points)
    ends = f"{show(points[0][1])} → {show(points[-1][1])} (steps {show(x0)} to {show(x1)})"
    svg = f'<svg width="300" height="90" role="img"><polyline points="{path}"/></svg>'
    return f"<figure>{svg}<figcaption>{escape(f'{name}: {ends}')}</figcaption></figure>"
