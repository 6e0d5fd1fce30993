"""What limits refusing too much? For 13_alignment_comparison, claim 27.

For each seed the SFT model of `benchmarks/rlhf.py` learns to refuse mischief, by DPO on pairs of
mischief alone (a refusal with an offer chosen, the steps rejected): `over`. Then it refuses harmless
requests that only sound so. Each remedy is switched on alone, and all three together:

    balanced data   as many pairs of look-alikes, answered (chosen) and refused (rejected)
    red teaming     attacks (paraphrases and wrappings) of the same requests, harmful and harmless; as
                    many of those that `over` failed on as there are pairs, with the right response
                    chosen and its own rejected
    KL penalty      beta 1 instead of 0.1

Steps are equal, also where there are more pairs. Held out are other titles in other words, plain and
attacked; a run keeps for each title which requests were refused (a partial refusal counts against
the model on both sides), and how helpful it was on the harmless ones. KL is k1 per response, to the
SFT model, on the town's mixture of prompts, whose gold score is kept as well. One learning rate, of
`over`: 1e-4, found by `benchmarks/dpo.py` to be one step above the best, so that it does too much.

    python benchmarks/over_refusal.py --json benchmarks/results/over_refusal.json
"""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import common
import rlhf
import sweep

from labkit import evaluation, generate, models, refusals, tinytown
from labkit.techniques import dpo
from labkit.tinytown import preferences
from labkit.tinytown.genres import numbered

Row = sweep.Row
REMEDIES = ("balanced data", "red teaming", "KL penalty")
ARMS = {"SFT": (), "over": (), "all three": REMEDIES} | {name: (name,) for name in REMEDIES}


def measure(point: Row, file: Path) -> Row:
    """Trained, unless it is the SFT model, and scored."""
    place = rlhf.prepared(file, point["seed"], point)
    sft, tokenizer = models.load(str(place / "sft"))
    model = sft
    if point["arm"] != "SFT":
        model = trained(place, tokenizer, point, ARMS[point["arm"]])
    rows = preferences.prompts(point["test_prompts"], 5 + point["seed"], "test")
    mixture = rlhf.scores(model, sft, tokenizer, rows)
    found = {name: mixture[name] for name in ("test_total", "test_kl", "test_golds")}
    for name, rows in held_out(point).items():
        found |= refused(rows, answers(model, tokenizer, rows), name)
    return found


def held_out(point: Row) -> dict[str, list[Row]]:
    """Requests of other titles, as they are, and a sample of the attacks on them."""
    rows = refusals.requests(split="test")
    return {"plain": rows, "attacked": attacked(rows, point)}


def attacked(requests: Sequence[Row], point: Row) -> list[Row]:
    """A sample of the attacks on the requests."""
    rows = [row for row in refusals.attacks(requests) if row["attack"] != "none"]
    return Random(point["seed"]).sample(rows, point["attacks"])


def answers(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    found = generate.responses(model, tokenizer, rows, seed=2, max_new_tokens=rlhf.TOKENS)
    return [text for (text,) in found]


def refused(rows: Sequence[Row], texts: Sequence[str], name: str) -> Row:
    """Marks by title, 1 where a request was refused; and the help on harmless ones."""
    found: Row = {}
    for side, harmful in (("harmful", True), ("harmless", False)):
        both = [(r, t) for r, t in zip(rows, texts, strict=True) if r["harmful"] == harmful]
        titles = [{"key": row["title"]} for row, _ in both]
        no = [bool(refusals.refused(row, refusals.exact(row, text))) for row, text in both]
        found[f"{name}_{side}"] = common.marks(evaluation.Evaluation(titles, [], no))
    helpful = [tinytown.judge(row, text).helpful for row, text in both]  # the harmless ones
    return found | {f"{name}_helpful": statistics.fmean(helpful)}


def trained(place: Path, tokenizer: Any, point: Row, remedies: Sequence[str]) -> Any:
    """The SFT model after DPO on pairs that the remedies say."""
    requests = refusals.requests(split="train")
    harmful = [row for row in requests if row["harmful"]]
    rng, pairs = Random(point["seed"]), [pair(row) for row in harmful]
    if "red teaming" in remedies:
        pairs += failures(place, tokenizer, point, requests)[: len(harmful)]
    if "balanced data" in remedies:
        pool = [row for row in requests if not row["harmful"]]
        pairs += [pair(row) for row in (pool * 2)[: len(harmful)]]
    rng.shuffle(pairs)
    model = models.load(str(place / "sft"))[0]
    beta = point["strong_beta"] if "KL penalty" in remedies else point["beta"]
    epochs = point["passes"] * len(harmful) / len(pairs)
    config = common.config(dpo.DPOConfig, point, beta=beta, epochs=epochs)
    dpo.train(model, tokenizer, pairs, config, progress=False)
    return model


def pair(row: Row, wrong: str = "") -> Row:
    """The right response to a request chosen; rejected is `wrong`, or help with what is harmful and
    a refusal of what is not."""
    other = numbered(row["steps"])
    if not row["harmful"]:
        other = tinytown.texts("genres")["refusal"][row["lang"]]["plain"]
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong or other}


def failures(place: Path, tokenizer: Any, point: Row, requests: Sequence[Row]) -> list[Row]:
    """Attacks on which the over-refusing model fails, as pairs, in random order."""
    rows = attacked(requests, point)
    texts = answers(trained(place, tokenizer, point, ()), tokenizer, rows)
    failed = []
    for row, text in zip(rows, texts, strict=True):
        found = refusals.exact(row, text)
        wrong = found != ("full" if row["harmful"] else "compliance")
        failed += [pair(row, text)] if wrong and text.strip() else []
    return failed


if __name__ == "__main__":
    made = {"learning_rate": 1e-4, "beta": 0.1, "strong_beta": 1.0, "passes": 3.0, "batch_size": 16}
    counts = {"test_prompts": 100, "attacks": 300}
    args = sweep.arguments(__doc__, workers=1, **rlhf.MADE, **made, **counts)
    conditions = [{"stage": "compare", "arm": arm} for arm in ARMS]
    sweep.over_seeds(partial(measure, file=args.json), conditions, args)
