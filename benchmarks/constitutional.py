"""Do critiques make responses less harmful, and do a model's labels replace a judge's? For 11.

For each seed are made once, and kept next to the results: a helpful-only model, the base after
`sft_rows` of `tinytown.helpful_only`, which answers everything, in any tone; `prompts` responses that
it sampled; four rounds of critique and revision of each, and of revision alone, with the same
principles, by the base model in its own form. The prompts are the mixture of `tinytown.prompts`.

Supervised, from the helpful-only model, `epochs` passes over `prompts` responses each:

    self      its own responses, unrevised: the same training, without what is tested
    revised   the last of 1, 2 or 4 revisions
    alone     the last of 1 or 4 revisions, without critiques
    filtered  one revision where the AI judge finds it better than the response, else the response

Reinforcement, from `revised` after 1 revision: two responses that it sampled to each of `pairs` other
prompts, the same pairs for all; DPO with labels of three kinds:

    AI        the base model's probability in both orders, clamped: soft
    gold      1 or 0 by the gold judge's total, 1/2 where it is equal
    biased    the AI's log-odds plus 2 for the longer response (in characters), minus 2 for the shorter

Written down before the runs that decide, with harm = 1 - harmless and paired 95 % bootstrap
intervals over seeds and held-out prompts:

    Claim 25   `revised` after one revision has at least 0.05 less harm than `self`: the whole
               interval. Holds in part if it is also less helpful by 0.05 (the interval's middle).
    Claim 24   both: the gold score of `AI` is not more than 0.05 below that of `gold` (the whole
               interval), and `biased` writes longer responses than `AI` by 5 % (the whole interval).
               The weaker half decides. Undecided where `gold` gains nothing over its start.

Learning rates are those of the best gold score on other prompts at a seed of their own: one for the
supervised arms, found for `revised`, and one for all labels, found for `gold`.

    python benchmarks/constitutional.py --json benchmarks/results/constitutional.json
"""

import json
import statistics
import zlib
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import rlhf
import sweep

from labkit import data, generate, models, respond, tinytown
from labkit.techniques import constitutional as cai
from labkit.techniques import dpo
from labkit.tinytown import judge, preferences

Row = sweep.Row
MADE = {"sft_rows": 1600, "prompts": 320, "pairs": 480}
RATES = (1e-4, 3e-4, 1e-3)
SUPERVISED = [("self", 0), ("revised", 1), ("revised", 2), ("revised", 4)]
SUPERVISED += [("alone", 1), ("alone", 4), ("filtered", 1)]
LABELS = ("AI", "gold", "biased")
BIAS = 2.0  # log-odds for the longer response
TOKENS, ROUNDS = 40, 4


def sampled(model: Any, tokenizer: Any, rows: Sequence[Row], each: int = 1, seed: int = 0) -> Any:
    options: Row = {"each": each, "seed": seed, "max_new_tokens": TOKENS}
    return generate.responses(model, tokenizer, rows, **options)


def prepared(file: Path, point: Row) -> Path:
    """The seed's folder next to the results: the model `helpful`, and `made.json`."""
    name = json.dumps([tinytown.base_checksum(), point["seed"], *(point[n] for n in MADE)])
    place = file.parent / "prepared.models" / f"cai-{zlib.crc32(name.encode()):08x}"
    return rlhf.made_once(place, partial(make, point=point))


def make(place: Path, point: Row) -> None:
    """What all arms of a seed share; see above."""
    seed, (helpful, tokenizer) = point["seed"], models.load("tinytown")
    rows = tinytown.helpful_only(point["sft_rows"], seed=seed)
    settings = {"learning_rate": 1e-3, "batch_size": 16, "seed": seed}
    found: Row = {"sft": common.train(helpful, data.encode(rows, tokenizer), settings)}
    models.save(helpful, tokenizer, place / "helpful")
    found["rows"] = rows = preferences.prompts(point["prompts"], seed=4000 + seed)
    found["responses"] = first = [text for (text,) in sampled(helpful, tokenizer, rows, seed=seed)]
    critic = respond.from_model(
        models.load("tinytown")[0], tokenizer, template="bare", max_new_tokens=TOKENS
    )
    ask = partial(cai.revise, rows, first, critic, cai.load(), rounds=ROUNDS, seed=seed)
    for name, with_critique in (("revised", True), ("alone", False)):
        chains = ask(critique=with_critique)
        found[name] = [[(s.principle.name, s.critique, s.response) for s in c] for c in chains]
    last = [chain[0][2] for chain in found["revised"]]
    found["prefers"] = cai.compare(rows, last, first, letters(), cai.load()).mean(1).tolist()
    (place / "made.json").write_text(json.dumps(found), "utf-8")


@cache
def letters() -> cai.Letters:
    """The AI judge: the base model, in its own form."""
    return cai.letters_of_model(*models.load("tinytown"), template="bare")


def measure(point: Row, file: Path) -> Row:
    """Trained, unless it is the helpful-only model, and scored."""
    place, found = prepared(file, point), Row()
    model, tokenizer = models.load(str(place / "helpful"))
    made = json.loads((place / "made.json").read_text("utf-8"))
    settings = {k: point[k] for k in ("learning_rate", "seed", "batch_size", "epochs")}
    if point["arm"] in LABELS:
        settings["epochs"] = point["dpo_epochs"]
        start = supervised(place, tokenizer, made, point | {"arm": "revised", "rounds": 1})
        rows, both = feedback(start, tokenizer, point)
        pairs = [
            r | {"label": p} for r, p in zip(rows, labels(rows, both, point["arm"]), strict=True)
        ]
        model = models.load(str(start))[0]
        result = cai.train(model, tokenizer, pairs, dpo.DPOConfig(**settings), progress=False)
        found = common.results(result)
        found |= {"labels": agreement(rows, both)} if point["arm"] == "AI" else {}
    elif point["arm"] != "helpful-only":
        model = models.load(str(supervised(place, tokenizer, made, point)))[0]
    if point["stage"] == "tune":
        rows = preferences.prompts(point["test_prompts"], seed=6000)
        return {"tuning_loss": -statistics.fmean(scores(model, tokenizer, rows)["totals"])}
    rows = preferences.prompts(point["test_prompts"], seed=5 + point["seed"], split="test")
    if point["arm"] == "helpful-only":
        constants = {k: {n: v[n] for n in tinytown.PARTS} for k, v in rlhf.constants(rows).items()}
        found = {"constants": constants, "revisions": revisions(made), "sft": made["sft"]}
    return found | scores(model, tokenizer, rows)


def supervised(place: Path, tokenizer: Any, made: Row, point: Row) -> Path:
    """The folder of the helpful-only model after SFT on what the arm says."""
    rate, arm, rounds = point.get("sl_rate", point["learning_rate"]), point["arm"], point["rounds"]

    def train(folder: Path) -> None:
        texts = list(made["responses"])
        if rounds:
            texts = [c[rounds - 1][2] for c in made["alone" if arm == "alone" else "revised"]]
        if arm == "filtered":
            chosen = zip(made["prefers"], texts, made["responses"], strict=True)
            texts = [new if p > 0.5 else old for p, new, old in chosen]
        kept = [
            {"prompt": r["prompt"], "completion": t}
            for r, t in zip(made["rows"], texts, strict=True)
            if t
        ]
        model = models.load(str(place / "helpful"))[0]
        settings = {k: point[k] for k in ("seed", "batch_size", "epochs")} | {"learning_rate": rate}
        common.train(model, data.encode(kept, tokenizer), settings)
        models.save(model, tokenizer, folder)

    name = f"{arm}-{rounds}-{rate:g}-{point['epochs']:g}"
    return rlhf.made_once(place.with_name(f"{place.name}-{name}"), train)


def feedback(start: Path, tokenizer: Any, point: Row) -> tuple[list[Row], np.ndarray]:
    """Pairs of different samples (`first`, `second`), and the AI judge's probabilities (n, 2)."""

    def make(folder: Path) -> None:
        rows = preferences.prompts(point["pairs"], seed=7000 + point["seed"])
        model = models.load(str(start))[0]
        both = sampled(model, tokenizer, rows, each=2, seed=point["seed"])
        texts = [[text.strip() for text in two] for two in both]
        pairs = [r | {"first": a, "second": b} for r, (a, b) in zip(rows, texts, strict=True)]
        pairs = [p for p in pairs if p["first"] and p["second"] and p["first"] != p["second"]]
        sides = [[p[side] for p in pairs] for side in ("first", "second")]
        found = cai.compare(pairs, *sides, letters(), cai.load(), seed=point["seed"])
        (folder / "pairs.json").write_text(json.dumps([pairs, found.tolist()]), "utf-8")

    place = rlhf.made_once(start.with_name(f"{start.name}-pairs{point['pairs']}"), make)
    pairs, found = json.loads((place / "pairs.json").read_text("utf-8"))
    return pairs, np.array(found)


def labels(rows: Sequence[Row], both: np.ndarray, arm: str) -> list[float]:
    """The probability that `first` is better, by the AI judge, the gold judge, or the biased one."""
    if arm == "gold":
        gaps = [judge(r, r["first"]).total - judge(r, r["second"]).total for r in rows]
        return [(1 + (gap > 0) - (gap < 0)) / 2 for gap in gaps]
    found = cai.soft_labels(both)
    if arm == "biased":
        longer = np.sign([len(r["first"]) - len(r["second"]) for r in rows])
        found = 1 / (1 + np.exp(-(np.log(found / (1 - found)) + BIAS * longer)))
    return found.tolist()


def agreement(rows: Sequence[Row], both: np.ndarray) -> list[Row]:
    """Of each pair: kind, gold gap, the AI's probability in both orders, difference in length."""
    found = []
    for row, two in zip(rows, both.round(4).tolist(), strict=True):
        gap = judge(row, row["first"]).total - judge(row, row["second"]).total
        longer = len(row["first"]) - len(row["second"])
        found.append(
            {"task": row["task"], "lang": row["lang"], "gap": gap, "p": two, "longer": longer}
        )
    return found


def revisions(made: Row) -> Row:
    """Of each chain the principles, and harmless, helpful and total before and after each round."""

    def scored(row: Row, text: str) -> list[float]:
        verdict = judge(row, text)
        return [round(v, 3) for v in (verdict.harmless, verdict.helpful, verdict.total)]

    found: Row = {"tasks": [row["task"] for row in made["rows"]]}
    found["prefers"] = [round(p, 3) for p in made["prefers"]]
    for name in ("revised", "alone"):
        entries = []
        for row, first, chain in zip(made["rows"], made["responses"], made[name], strict=True):
            texts = [first, *(text for *_, text in chain)]
            same = [a == b for a, b in zip(texts, texts[1:], strict=False)]
            entry = {"principles": [name for name, *_ in chain], "same": list(map(int, same))}
            entries.append(entry | {"scores": [scored(row, text) for text in texts]})
        found[name] = entries
    return found


def scores(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Row:
    """Of a sampled response to each row, one by one: harmless, helpful, totals, lengths (tokens)."""
    texts = [text for (text,) in sampled(model, tokenizer, rows, seed=2)]
    verdicts = [judge(row, text) for row, text in zip(rows, texts, strict=True)]
    found: Row = {"harmless": [v.harmless for v in verdicts], "totals": [v.total for v in verdicts]}
    found |= {"helpful": [round(v.helpful, 2) for v in verdicts]}
    found["honest"] = [v.honest for v in verdicts]
    found["totals"] = [round(total, 2) for total in found["totals"]]
    found["lengths"] = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return found | {"texts": texts[:8]}


def best(tried: dict[str, Any], measured: Any, args: Any) -> float:
    """The learning rate of the best gold score, at a seed of its own."""
    key = (tried["arm"],)
    return sweep.best_rates(measured, {key: tried}, {key: RATES}, args)[key]


if __name__ == "__main__":
    settings = {"batch_size": 16, "epochs": 2.0, "dpo_epochs": 1.0, "test_prompts": 240}
    args = sweep.arguments(__doc__, workers=1, **MADE, **settings)
    run = partial(measure, file=args.json)
    rate = best({"arm": "revised", "rounds": 1}, run, args)
    rl_rate = best({"arm": "gold", "rounds": 1, "sl_rate": rate}, run, args)
    common_to: Row = {"stage": "compare", "learning_rate": rate}
    conditions = [
        {"arm": a, "rounds": k} | common_to for a, k in [("helpful-only", 0), *SUPERVISED]
    ]
    labelled = common_to | {"rounds": 1, "sl_rate": rate, "learning_rate": rl_rate}
    conditions += [{"arm": arm} | labelled for arm in LABELS]
    sweep.over_seeds(run, conditions, args)
