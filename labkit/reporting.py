"""`labkit report`: all runs on one HTML page that needs nothing else: table, curves, claims.

Everything that came from a record is escaped; a curve is a small SVG drawn here, so that the
page opens fast and without a plotting library.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from labkit.tracking import Table, show, write_text

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.6rem 0}td,th{border-bottom:1px solid #ddd;padding:.25rem .7rem;
text-align:left;vertical-align:top}figure{display:inline-block;margin:.5rem 1rem .5rem 0}
polyline{fill:none;stroke:#2563a8;stroke-width:1.5}figcaption,small{color:#555}"""


def write(runs: list[dict[str, Any]], out: Path) -> Path:
    """Write the page for `runs` (records as `tracking.read_runs` gives them) to `out`."""
    title = f"labkit: {len(runs)} run{'' if len(runs) == 1 else 's'}"
    parts = [f"<h1>{title}</h1>", _overview(runs), *(_section(run) for run in reversed(runs))]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _overview(runs: list[dict[str, Any]]) -> str:
    rows = [
        {
            "notebook": run["notebook"],
            "run": run["id"],
            "status": run["status"],
            "seconds": round(run["seconds"]),
            "peak memory, MB": run["peak_memory_bytes"] // 10**6,
            "metrics": ", ".join(f"{k} {show(v)}" for k, v in run["metrics"].items()),
        }
        for run in runs
    ]
    return Table(rows)._repr_html_() if rows else "<p>No runs yet.</p>"


def _section(run: dict[str, Any]) -> str:
    names = {"number": "#", "how": "how measured"}
    claims = [{names.get(k, k): v for k, v in claim.items()} for claim in run["claims"]]
    parts = [f"<h2>{escape(run['notebook'])} <small>{escape(run['id'])}</small></h2>"]
    if run.get("error"):
        parts.append(f"<p><b>{escape(run['error'])}</b></p>")
    parts.append(_facts({"parameters": run["parameters"], "versions": run["versions"]}))
    if claims:
        parts.append("<h3>Claims</h3>" + Table(claims)._repr_html_())
    if made := run.get("artifacts"):
        steps = [" + ".join(a["parents"]) + " → " * bool(a["parents"]) + a["name"] for a in made]
        parts.append(f"<p>Lineage: {escape(' · '.join(steps))}</p>")
    parts += [_curve(name, points) for name, points in _series(run["history"]).items()]
    for name, rows in run["tables"].items():
        parts.append(f"<h3>{escape(name)}</h3>{Table(rows)._repr_html_()}")
    return "".join(parts)


def _facts(groups: dict[str, dict[str, Any]]) -> str:
    lines = (
        f"<small>{escape(name)}: "
        + escape(", ".join(f"{k} = {show(v)}" for k, v in values.items()))
        + "</small>"
        for name, values in groups.items()
    )
    return "<p>" + "<br>".join(lines) + "</p>"


def _series(history: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                series.setdefault(name, []).append((row["step"], value))
    return {name: points for name, points in series.items() if len(points) > 1}


def _curve(name: str, points: list[tuple[float, float]], width: int = 300, height: int = 90) -> str:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_span, y_span = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    path = " ".join(
        f"{(x - min(xs)) / x_span * width:.1f},{(max(ys) - y) / y_span * height:.1f}"
        for x, y in points
    )
    caption = f"{name}: {show(ys[0])} → {show(ys[-1])} (steps {show(xs[0])} to {show(xs[-1])})"
    return (
        f'<figure><svg width="{width}" height="{height}" role="img">'
        f'<polyline points="{path}"/></svg><figcaption>{escape(caption)}</figcaption></figure>'
    )
