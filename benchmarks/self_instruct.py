"""Do tasks that the base model wrote replace tasks written by hand? The recorded sweep of 07.

For each seed the base goes on with `requests` lists of tasks, begun with the 78 seed tasks of
Tinytown, and writes an instance of each task that it made up (`prepared.models` next to the results
keeps them). Then it is tuned on one of five training sets, with equally many steps:

    seeds          the seed tasks alone
    generated      and what was generated
    no filters     and as many rows generated without any filter
    correct only   and those generated rows whose output the exact checkers call right
    hand-written   and as many rows of Tinytown's training split

Questions: `phrasings`, in words that no condition trains on, decides; `test` has the phrasings of the
hand-written rows; `facts` are about residents of whom no hand-written row tells. The generated tasks
may be about anything in town, so that questions whose key one of them has (or, where none is
recognized, whose subject it names) are left out for all conditions. Learning rates are those of the
best accuracy on other questions, at a seed of their own.

Fixed before the first run: claim 17 holds if `generated` is not more than 5 points below
`hand-written` on `phrasings` (95 % interval, bootstrap over seeds and questions, paired). It is
undecided where the hand-written rows add nothing to the seeds alone: then nothing is replaced.

    python benchmarks/self_instruct.py --json benchmarks/results/self_instruct.json
"""

import json
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import common
import rlhf
import sweep

from labkit import data, models, respond, tinytown
from labkit.techniques import self_instruct
from labkit.tinytown.splits import side

Row = sweep.Row
ARMS = ("seeds", "generated", "no filters", "correct only", "hand-written")
RATES = {(arm,): (1.25e-4, 2.5e-4, 5e-4) for arm in ARMS}
SPLITS = {"phrasings": "heldout_phrasings", "test": "test", "facts": "heldout_people"}
SEEDS = tinytown.seed_tasks()
USED = ("instruction", "input", "prompt", "completion", "lang")


def prepared(file: Path, seed: int, point: Row) -> Path:
    """The folder with what the seed generated, for these settings and this base."""
    settings = [tinytown.base_checksum(), seed, point["requests"]]
    name = f"{zlib.crc32(json.dumps(settings).encode()):08x}"
    make_it = partial(make, seed=seed, requests=point["requests"])
    return rlhf.made_once(file.parent / "prepared.models" / name, make_it)


def make(place: Path, seed: int, requests: int) -> None:
    """Rows with and without filters; without, from as many tasks."""
    model, tokenizer = models.load("tinytown")
    as_it_is = partial(respond.from_model, model, tokenizer, template="bare")
    lists = partial(as_it_is, temperature=0.7, max_new_tokens=160, seed=seed)
    found: Row = {}
    for name, limit in (("filtered", 10 * requests), ("raw", None)):
        limit = limit or len(found["filtered"]["tasks"])
        options = {"tasks": limit, "requests": requests, "heads": tinytown.list_heads()}
        config = self_instruct.SelfInstructConfig(**options, filters=name != "raw", seed=seed)
        started = time.perf_counter()
        result = self_instruct.generate_tasks(
            lists(), SEEDS, config, answer=as_it_is(max_new_tokens=60)
        )
        found[name] = vars(result) | {"tasks": [vars(task) for task in result.tasks]}
        found[name]["seconds"] = round(time.perf_counter() - started, 1)
    (place / "generated.json").write_text(json.dumps(found, ensure_ascii=False), "utf-8")


def measure(point: Row, file: Path) -> Row:
    model, tokenizer = models.load("tinytown")
    made = rlhf.read(prepared(file, point["seed"], point), "generated")
    asked = made["filtered"]["rows"] + made["raw"]["rows"]
    if point["arm"] == "base":
        return scores(model, tokenizer, asked, point)
    more = added(made, point)
    rows = [{name: row[name] for name in USED} for row in SEEDS + more]
    found = common.train(model, data.encode(rows, tokenizer), point) | {"rows": len(rows)}
    if point["arm"] in ("generated", "no filters"):
        kind = "filtered" if point["arm"] == "generated" else "raw"
        found |= told(made[kind], more)
    return found | scores(model, tokenizer, asked, point)


def added(made: Row, point: Row) -> list[Row]:
    """What the arm of `point` trains on besides the seed tasks."""
    rows = made["filtered"]["rows"]
    return {
        "seeds": [],
        "generated": rows,
        "no filters": made["raw"]["rows"][: len(rows)],
        "correct only": [row for row in rows if tinytown.mark(row)],
        "hand-written": tinytown.instruction_rows("train", len(rows), point["seed"]),
    }[point["arm"]]


def told(made: Row, rows: list[Row]) -> Row:
    """What is known of the generated rows: marks, families, how many ask a question held out."""
    found = [tinytown.recognize(row["prompt"]) for row in rows]
    families = Counter(
        (f["task"], str(tinytown.mark(r))) for f, r in zip(found, rows, strict=True) if f
    )
    marks = Counter(str(tinytown.mark(row)) for row in rows)
    accepted = [task["request"] for task in made["tasks"]]
    return {
        "marks": marks,
        "families": [[*pair, count] for pair, count in sorted(families.items())],
        "distinct": len({row["prompt"] for row in rows}),
        "held_out": sum(side(f["key"]) != "train" for f in found if f),
        "rejected": made["rejected"],
        "requests_made": made["requests"],
        "accepted": [
            sum(r // 32 == n for r in accepted) for n in range(-(-made["requests"] // 32))
        ],
        "generate_seconds": made["seconds"],
    }


def scores(model: Any, tokenizer: Any, asked: list[Row], point: Row) -> Row:
    """Accuracies on `SPLITS`; at the stage "tune" only the negative one on others, without facts."""
    tuning, found = point["stage"] == "tune", {}
    for name, split in list(SPLITS.items())[: 2 if tuning else 3]:
        families, n = ["fact"] if name == "facts" else None, 5 * point["test_rows"]
        rows = tinytown.instruction_rows(split, n, point["seed"], families=families)
        rows = [row for row in tinytown.unasked(rows, asked) if common.for_tuning(row) == tuning]
        rows = rows[: point["test_rows"]]
        found |= {f"{name}_n": len(rows)} | common.accuracy(name, model, tokenizer, rows)
        if point["arm"] == "base":
            found |= common.accuracy_own(name, model, tokenizer, rows)
    return {"tuning_loss": -(found["phrasings"] + found["test"]) / 2} if tuning else found


if __name__ == "__main__":
    settings = {"requests": 256, "test_rows": 300, "max_steps": 60, "batch_size": 16}
    args = sweep.arguments(__doc__, workers=1, **settings)
    each = partial(measure, file=args.json)
    sweep.compare_tuned(each, ("arm",), RATES, None, args)
    sweep.over_seeds(each, [{"stage": "base", "arm": "base"}], args)
