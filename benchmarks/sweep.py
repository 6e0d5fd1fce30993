"""Runs one function over the points of a sweep; tells how far a repetition is from what is recorded.

Every question in this folder is a module that declares its points and `measure(point)`, which
returns the results. Results are written after every point, with hardware, versions and commit:
a sweep that was killed skips what is there when it is started again.

    python benchmarks/lora_rank.py --json lora_rank.json --seeds 1      # seed 0 only
    python benchmarks/sweep.py compare lora_rank.json benchmarks/results/lora_rank.json

Small models use one core better than two, so two workers with a core each beat two threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from labkit import record

Row = dict[str, Any]
Measure = Callable[[Row], Row]
TUNING_SEED = 100  # no comparison uses it


def arguments(doc: str | None, seeds: int = 3, workers: int = 2, **settings: Any) -> Any:
    """The command line of a sweep; `settings` are what all its points share, with defaults.

    A type in place of a default makes the option required; with `seeds=0` there is none for them.
    `args.settings` holds the settings again. Exits if the file has runs with other settings.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in settings.items():
        options = {"required": True} if isinstance(default, type) else {"default": default}
        kind = default if isinstance(default, type) else type(default)
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, **options)
    if seeds:
        p.add_argument("--seeds", type=int, default=seeds, help="how many: 1 is seed 0 only")
    p.add_argument("--workers", type=int, default=workers, help="processes")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME=VALUE", help="these points only")
    p.add_argument("--json", type=Path, required=True, help="results; what is there is skipped")
    args = p.parse_args()
    args.settings = {name: getattr(args, name) for name in settings}
    if others := sum(not args.settings.items() <= run.items() for run in runs_in(args.json)):
        p.error(f"{args.json} holds {others} runs with other settings; name another file")
    return args


def runs_in(file: Path) -> list[Row]:
    """The runs recorded in `file`, none if there is no such file."""
    return json.loads(file.read_text("utf-8"))["runs"] if file.exists() else []


def run(
    measure: Measure, points: Sequence[Row], file: Path, workers: int = 1, only: Sequence[str] = ()
) -> list[Row]:
    """`measure(point)` for every point that is not yet in `file`; returns all runs of the file.

    A run is a point with its results and the seconds that they took. With several workers,
    `measure` must be importable, or a `functools.partial` of such a function. `only` selects
    points, see `selected`.
    """
    rows = runs_in(file)
    todo = [p for p in points
            if selected(p, only) and not any(p.items() <= row.items() for row in rows)]
    for found in _each(partial(_timed, measure), todo, workers if todo else 1):
        rows.append(found)
        _write(file, rows, list(points[0]))
        print(f"{len(rows)} {found}", flush=True)
    return rows


def selected(point: Row, only: Sequence[str]) -> bool:
    """Whether each field has a value that `only` names for it: ["rank=8", "rank=16", "seed=0"]."""
    wanted: dict[str, list[str]] = {}
    for name, _, value in (each.partition("=") for each in only):
        wanted.setdefault(name, []).append(value)
    return all(str(point[name]) in wanted.get(name, [str(point[name])]) for name in point)


def _timed(measure: Measure, point: Row) -> Row:
    started = time.perf_counter()
    found = measure(point)
    return point | {"seconds": round(time.perf_counter() - started, 2)} | found


def _each(function: Measure, points: Sequence[Row], workers: int) -> Iterator[Row]:
    """Results as they come, from this process or from workers with their own share of the cores."""
    if workers < 2:
        yield from map(function, points)
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(cores) // workers))
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    for i in range(workers):
        shares.put(cores[i % len(cores) :: workers] if cores else [])
    with context.Pool(workers, _pin, (shares,)) as pool:
        yield from pool.imap_unordered(function, points)


def _pin(shares: Any) -> None:
    cores = shares.get()
    shares.put(cores)  # for the worker that replaces a dead one
    if cores:
        os.sched_setaffinity(0, cores)


def _write(file: Path, rows: list[Row], fields: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {"hardware": record.hardware(), "versions": record.versions()}
    head |= {"commit": record.commit(), "fields": fields}
    record.write_text(file, json.dumps(head | {"runs": rows}, indent=1, default=str) + "\n")


Key = tuple[Any, ...]  # a condition: the values of the fields that tell it from the others


def compare_tuned(
    measure: Measure,
    fields: Sequence[str],
    learning_rates: Mapping[Key, Sequence[float]],
    conditions: Mapping[Key, Key | float],
    args: Any,
) -> None:
    """Finds learning rates among `learning_rates`, then runs all `conditions` over the seeds.

    A condition is compared at the learning rate given for it, or at the one found for the
    condition named. Found is the one of least `tuning_loss` at a seed that the comparison does
    not use. Where that is the end of its list, the list goes on by a factor of two, at most twice.
    """

    def point(stage: str, key: Key, learning_rate: float, seed: int) -> Row:
        own = dict(zip(fields, key, strict=True))
        return {"stage": stage, **own, "learning_rate": learning_rate, "seed": seed} | args.settings

    wanted = {key: source for key, source in conditions.items()
              if selected(dict(zip(fields, key, strict=True)), args.only)}
    todo = {key: learning_rates[key] for key in learning_rates if key in wanted.values()}
    found: dict[Key, dict[float, float]] = {key: {} for key in todo}
    for _ in range(3):
        points = [point("tune", key, lr, TUNING_SEED) for key, lrs in todo.items() for lr in lrs]
        rows = run(measure, points, args.json, args.workers)
        found = {key: _tuning_losses(rows, point("tune", key, 0, TUNING_SEED)) for key in found}
        todo = {key: (lr,) for key, losses in found.items() if (lr := _beyond(losses))}
    best = {key: min(losses, key=losses.__getitem__) for key, losses in found.items()}
    points = [point("compare", key, best[via] if isinstance(via, tuple) else via, seed)
              for seed in range(args.seeds) for key, via in wanted.items()]
    run(measure, points, args.json, args.workers, args.only)


def _tuning_losses(rows: Sequence[Row], like: Row) -> dict[float, float]:
    """{learning rate: loss} of the runs that differ from `like` in nothing else, in order."""
    shared = {name: value for name, value in like.items() if name != "learning_rate"}.items()
    found = {r["learning_rate"]: r["tuning_loss"] for r in rows if shared <= r.items()}
    return dict(sorted(found.items()))


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The next learning rate to try if the best one is the first or the last of those tried."""
    tried, best = list(losses), min(losses, key=losses.__getitem__)
    return best / 2 if best == tried[0] else best * 2 if best == tried[-1] else None


def compare(new: Path, recorded: Path) -> None:
    """Prints each number of `new` beside the recorded one and its standard deviation over seeds."""
    fields, before = json.loads(new.read_text("utf-8"))["fields"], runs_in(recorded)
    for row in runs_in(new):
        point = {name: row[name] for name in fields}
        seeds = [r for r in before if all(r.get(n) == v for n, v in point.items() if n != "seed")]
        same = next((r for r in seeds if r.get("seed") == point.get("seed")), None)
        print(", ".join(f"{name}={value}" for name, value in point.items()))
        if same is None:
            print("    not recorded")
            continue
        for name in (n for n, value in row.items() if n not in fields and type(value) in (int, float)):
            values = [r[name] for r in seeds if name in r]
            if name in same and not name.endswith("seconds"):
                spread = f"{statistics.stdev(values):.4g}" if len(values) > 1 else "one seed"
                print(f"    {name:24} {row[name]:<12.6g} recorded {same[name]:<12.6g} "
                      f"difference {row[name] - same[name]:<+10.4g} standard deviation {spread}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    command = p.add_subparsers(required=True).add_parser("compare", help="with recorded results")
    command.add_argument("new", type=Path)
    command.add_argument("recorded", type=Path)
    args = p.parse_args()
    compare(args.new, args.recorded)


if __name__ == "__main__":
    main()
