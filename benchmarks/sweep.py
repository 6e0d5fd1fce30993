"""Runs one function over the points of a sweep; compares a repetition with what is recorded.

A question is a module of this folder with a `measure(point)` that returns results. They are
written after every point, with hardware, versions, commit and the base's checksum: a sweep that
was killed skips what is there when it is started again, and refuses a file of another base. Small
models use one core better than two, so two workers with a core each beat two threads.

    python benchmarks/lora_rank.py --json lora_rank.json --seeds 1      # seed 0 only
    python benchmarks/sweep.py all --only lora_rank dpo    # those, into benchmarks/results
    python benchmarks/sweep.py compare lora_rank.json benchmarks/results/lora_rank.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from labkit import models, record, tinytown

Row = dict[str, Any]
Measure = Callable[[Row], Row]
Key = tuple[Any, ...]  # a condition: the values of the fields that tell it from the others
Rates = Mapping[Key, Sequence[float]]  # the learning rates to search
Conditions = Mapping[Key, Key | float]
TUNING_SEED = 100  # no comparison uses it
SWEEPS = ["full_finetuning", "lora_rank", "qlora_types", "prefix_length", "adapter_bottleneck"]
SWEEPS += ["instruction_tuning", "rlhf", "reward_noise", "dpo", "orpo", "peft_comparison"]
SWEEPS += ["self_instruct", "constitutional", "alignment_comparison", "over_refusal"]
models.autocast_dtype = lambda model: None  # "auto" is float32 here, so that all devices agree


def arguments(doc: str | None, seeds: int = 3, workers: int = 2, **settings: Any) -> Any:
    """The command line of a sweep; `settings` are what all its points share, with defaults.

    A type in place of a default makes the option required. `args.settings` holds them again.
    Exits if the file has runs with other settings.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--json", type=Path, required=True, help="results; what is there is skipped")
    p.add_argument("--workers", type=int, default=workers, help="processes")
    if seeds:
        p.add_argument("--seeds", type=int, default=seeds, help="how many: 1 is seed 0 only")
    p.add_argument("--only", nargs="+", default=[], help="only points with NAME=VALUE")
    for name, default in settings.items():
        option, required = f"--{name.replace('_', '-')}", isinstance(default, type)
        kind = default if required else type(default)
        p.add_argument(option, type=kind, required=required, default=None if required else default)
    args = p.parse_args()
    args.settings = {name: getattr(args, name) for name in settings}
    args.only = dict(each.split("=", 1) for each in args.only)
    if others := sum(not args.settings.items() <= run.items() for run in runs_in(args.json)):
        p.error(f"{args.json} holds {others} runs with other settings; name another file")
    return args


def over_seeds(measure: Measure, conditions: Iterable[Row], args: Any) -> list[Row]:
    """Runs every condition with every seed, or with the one that it names."""
    every = [c | {"seed": c.get("seed", n)} for n in range(args.seeds) for c in conditions]
    points = [p | args.settings for i, p in enumerate(every) if p not in every[:i]]
    return run(measure, selected(points, args.only), args.json, args.workers)


def run(measure: Measure, points: Sequence[Row], file: Path, workers: int = 1) -> list[Row]:
    """`measure(point)` for every point that is not yet in `file`; returns all runs of the file.

    A run is a point, its results, the seconds that they took and the device. With several workers, `measure`
    must be importable, or a `functools.partial` of such a function. Raises ValueError for a file
    that was recorded with another base.
    """
    rows = runs_in(file)
    base = points[0].get("base", "tinytown") if points else ""
    base = tinytown.base_checksum() if base == "tinytown" else base
    if points and rows and (other := _head(file).get("base")) != base:
        raise ValueError(f"{file} is of the base {other}, this one is {base}: move the file away")
    todo = [p for p in points if not any(p.items() <= row.items() for row in rows)]
    for found in _each(partial(_timed, measure), todo, workers if todo else 1):
        rows.append(found)
        head = {"hardware": record.hardware(), "versions": record.versions()}
        fields = list(dict.fromkeys(name for point in points for name in point))
        head |= {"commit": record.commit(), "base": base, "fields": fields, "runs": rows}
        file.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(file, json.dumps(head, indent=1, default=str) + "\n")
        print(f"{len(rows)} {found}", flush=True)
    return rows


def runs_in(file: Path) -> list[Row]:
    return _head(file).get("runs", [])


def _head(file: Path) -> Row:
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def selected(points: Iterable[Row], only: Mapping[str, str]) -> list[Row]:
    """The points that have the values of `only`, given as text, in those fields that they have."""
    return [p for p in points if all(str(p.get(n, value)) == value for n, value in only.items())]


def _timed(measure: Measure, point: Row) -> Row:
    started = time.perf_counter()
    found = measure(point)
    spent = {"seconds": round(time.perf_counter() - started, 2), "device": models.find_device()}
    return point | spent | found


def _each(function: Measure, points: Sequence[Row], workers: int) -> Iterator[Row]:
    """Results as they come, from this process or from workers with their own share of the cores."""
    if workers < 2:
        yield from map(function, points)
        return
    yield from _pool(workers).imap_unordered(function, points)


@cache
def _pool(workers: int) -> Any:
    """Processes that serve all stages of a sweep: to start one takes longer than a short run."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    pin = _pin if hasattr(os, "sched_setaffinity") else None
    return multiprocessing.get_context("spawn").Pool(workers, pin, (workers,))


def _pin(workers: int) -> None:
    cores, name = sorted(os.sched_getaffinity(0)), multiprocessing.current_process().name
    number = int(name.rpartition("-")[2])
    os.sched_setaffinity(0, cores[number % workers :: workers] or cores)


def compare_tuned(
    measure: Measure,
    fields: Sequence[str],
    learning_rates: Rates,
    conditions: Conditions | None,
    args: Any,
) -> None:
    """Finds learning rates among `learning_rates`, then runs all `conditions` over the seeds.

    A condition is compared at the learning rate given for it, or at the one found for the
    condition named; None compares every condition at its own.
    """
    conditions = conditions or {key: key for key in learning_rates}
    named = {key: dict(zip(fields, key, strict=True)) for key in {**learning_rates, **conditions}}
    wanted = {key: via for key, via in conditions.items() if selected([named[key]], args.only)}
    tuned = {key: named[key] for key in learning_rates if key in wanted.values()}
    best = best_rates(measure, tuned, learning_rates, args)
    rates = {key: {"learning_rate": best.get(via, via)} for key, via in wanted.items()}
    over_seeds(measure, [{"stage": "compare"} | named[k] | rate for k, rate in rates.items()], args)


def best_rates(
    measure: Measure, conditions: Mapping[Key, Row], learning_rates: Rates, args: Any
) -> dict[Key, float]:
    """Of every condition the learning rate of least `tuning_loss`, at a seed of its own.

    Where that is the end of its list, the list goes on by a factor of two, at most twice.
    """
    common: Row = {"stage": "tune", "seed": TUNING_SEED} | args.settings
    tuning = {key: row | common for key, row in conditions.items()}
    todo: Rates = {key: learning_rates[key] for key in tuning}
    best: dict[Key, float] = {}
    while todo:
        points = [tuning[key] | {"learning_rate": lr} for key, lrs in todo.items() for lr in lrs]
        rows = run(measure, points, args.json, args.workers)
        todo = {}
        for key, like in tuning.items():
            like_it = [row for row in rows if like.items() <= row.items()]
            tried = {row["learning_rate"]: row["tuning_loss"] for row in like_it}
            best[key] = min(sorted(tried), key=tried.__getitem__)
            beyond = {min(tried): best[key] / 2, max(tried): best[key] * 2}.get(best[key], 0.0)
            if min(learning_rates[key]) / 4 <= beyond <= max(learning_rates[key]) * 4:
                todo[key] = (beyond,)
    return best


def run_all(only: Sequence[str], seeds: int | None) -> None:
    """Every sweep that is there, one after the other, into `benchmarks/results`."""
    place = Path(__file__).parent
    scripts = [file for name in only or SWEEPS if (file := place / f"{name}.py").exists()]
    results = [_run_script(file, seeds) for file in scripts]
    sys.exit(any(results))


def _run_script(script: Path, seeds: int | None) -> int:
    started, file = time.perf_counter(), script.parent / f"results/{script.stem}.json"
    command = [sys.executable, str(script), "--json", str(file)]
    command += ["--seeds", str(seeds)] if seeds else []
    code = subprocess.run(command, check=False).returncode
    minutes, outcome = (time.perf_counter() - started) / 60, f"failed ({code})" if code else "done"
    print(f"== {script.stem}: {outcome}, {minutes:.1f} min, {len(runs_in(file))} runs", flush=True)
    return code


def compare(new: Path, recorded: Path) -> None:
    """Prints each number of `new` next to the recorded one and its deviation over the seeds."""
    fields, before = json.loads(new.read_text("utf-8"))["fields"], runs_in(recorded)
    for row in runs_in(new):
        point = {name: row[name] for name in fields if name in row}
        alike = [r for r in before if point.items() <= (r | {"seed": point.get("seed")}).items()]
        same = next((r for r in alike if point.items() <= r.items()), {})
        label = ", ".join(f"{name}={value}" for name, value in point.items())
        print(label if same else f"{label}: not recorded")
        for name in (n for n, value in row.items() if type(value) in (int, float)):
            if name in same and name not in fields and not name.endswith("seconds"):
                values, (ours, old) = [r[name] for r in alike], (row[name], same[name])
                deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
                line = f"    {name:20} new {ours:<11.6g} recorded {old:<11.6g} "
                print(f"{line}difference {ours - old:<+11.4g} deviation {deviation:.4g}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = p.add_subparsers(required=True, dest="command")
    command = commands.add_parser("compare", help="with recorded results")
    command.add_argument("new", type=Path)
    command.add_argument("recorded", type=Path)
    command = commands.add_parser("all", help="every sweep, into benchmarks/results")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=SWEEPS)
    command.add_argument("--seeds", type=int, help="in place of each sweep's own number")
    options = vars(p.parse_args())
    {"compare": compare, "all": run_all}[options.pop("command")](**options)
