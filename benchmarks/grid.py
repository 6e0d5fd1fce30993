"""Runs one function over a grid of points, two single-threaded processes side by side.

Small models use one core better than two, so two workers beat two threads. Results are written
after every point; a killed grid goes on where it stopped when started again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkit import machine, tracking

Point = dict[str, Any]


def run_grid(
    function: Callable[..., dict[str, Any]], points: list[Point], file: Path, workers: int = 2
) -> list[dict[str, Any]]:
    """`function(**point)` for every point not yet in `file`; returns all rows, point and results.

    `function` must be importable (top level of a module). `file` holds hardware, versions and
    runs, and is replaced in one move after each point.
    """
    known = json.loads(file.read_text())["runs"] if file.exists() else []
    keys = [_key({k: run.get(k) for k in points[0]}) for run in known]
    todo = [p for p in points if _key(p) not in keys]
    rows = list(known)
    os.environ |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for point, result in pool.imap_unordered(_Call(function), todo):
            rows.append(point | result)
            _write(file, rows)
            print(f"{len(rows)}/{len(points)} {rows[-1]}", flush=True)
    return rows


class _Call:
    """A picklable `function(**point)` that keeps the point beside its result."""

    def __init__(self, function: Callable[..., dict[str, Any]]) -> None:
        self.function = function

    def __call__(self, point: Point) -> tuple[Point, dict[str, Any]]:
        return point, self.function(**point)


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {"hardware": machine.hardware(), "versions": machine.versions()}
    tracking.write_text(file, json.dumps(head | {"runs": rows}, indent=1, default=str) + "\n")
