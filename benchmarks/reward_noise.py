"""Is a reward model robust to label noise, and do all pairs of a ranking help? For 08_reward_model.

Rankings of K written responses by the gold judge's order, equal scores in random order, in which
neighbours are swapped with probability `noise`; the same responses at every noise. A larger K has
fewer prompts and more pairs: each K learns from as many texts, so from about as many tokens and as
many steps, at a learning rate of its own (as in `lora_rank.py`), found at the noise TUNED. A seed
draws prompts, responses, noise and test rankings.

A model is scored on rankings of 4-9 responses to held-out prompts, without noise and ties, by the
95 % Wilson interval of the pairs it orders rightly, its margin, and its calibration. `flipped` is
the share of wrong labels among the training pairs without ties: for one `noise` it is smaller the
larger K is. The stage "base" orders by the base's mean log-probability per token of a response,
behind the chat template and (`_own`) in the form that it knows; `shorter` prefers the shorter.
Each also has `_right`, the share of pairs in order for each test ranking: differences are paired.

    python benchmarks/reward_noise.py --json benchmarks/results/reward_noise.json
"""

import math
from itertools import combinations
from random import Random
from typing import Any

import common
import sweep
import torch

from labkit import data, logprobs, models, tinytown
from labkit.batching import pack
from labkit.evaluation import Agreement
from labkit.techniques import reward
from labkit.tinytown import preferences, rank_samples, rankings

SIZES, NOISES, TUNED = (2, 4, 9), (0.0, 0.1, 0.2, 0.4), 0.1
LEARNING_RATES = {(k, TUNED): (5e-4, 1e-3) for k in SIZES}
CONDITIONS: Any = {(k, noise): (k, TUNED) for noise in NOISES for k in SIZES}


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    k, seed = point["k"], point["seed"]
    train = ranked(point["texts"] // k, k, point["noise"], seed)
    config = common.config(reward.RewardConfig, point, batch_size=point["step_texts"] // k)
    learned, result = reward.train(model, tokenizer, train, config, progress=False)
    found = common.results(result) | {"rankings": len(train), "flipped": flipped(train)}
    if point["stage"] == "tune":
        others = held_out(point["test_rows"] // 2, seed, tuning=True)
        return found | {"tuning_loss": reward.evaluate(learned, others).loss}
    tests = held_out(point["test_rows"], seed)
    scored = reward.evaluate(learned, tests)
    found |= {"pairs_scored": len(scored.margins), "accuracy_right": right(tests, scored)}
    return found | common.agreement(scored)


def ranked(n: int, k: int, noise: float, seed: int) -> list[sweep.Row]:
    """`n` rankings of exactly `k`; of nine or more responses `rank_samples` keeps four to nine."""
    rng, found = Random(seed), []
    for row in preferences.prompts(n * (8 if k > 4 else 1), seed):
        found.append((row, preferences.candidates(row, rng)[:k]))
    rows, samples = zip(*found, strict=True)
    return [r for r in rank_samples(rows, samples, noise, seed) if len(r["responses"]) == k][:n]


def flipped(rows: list[sweep.Row]) -> float:
    """The share of pairs of different scores in which the worse response stands first."""
    wrong = [
        (i < j) != (a > b)
        for row in rows
        for (i, a), (j, b) in combinations(zip(row["ranks"], row["scores"], strict=True), 2)
        if a != b
    ]
    return sum(wrong) / len(wrong)


def held_out(n: int, seed: int, tuning: bool = False) -> list[sweep.Row]:
    """`n` rankings of test prompts with one response for each score."""
    found = []
    for row in rankings(n * (6 if tuning else 2), 0.0, seed, "test"):
        if common.for_tuning(row) == tuning:
            kept = {score: i for i, score in enumerate(row["scores"])}.values()
            columns = {name: [row[name][i] for i in kept] for name in ("responses", "ranks")}
            found.append(row | columns)
    return found[:n]


def baseline(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    rows = held_out(point["test_rows"], point["seed"])
    behind_chat = agreement(rows, likelihoods(model, tokenizer, rows, "auto"))
    own = agreement(rows, likelihoods(model, tokenizer, tinytown.in_own_form(rows), "bare"))
    short = agreement(rows, [-len(text) for row in rows for text in row["responses"]])
    found = common.agreement(behind_chat)
    for name, scored in {"accuracy": behind_chat, "accuracy_own": own, "shorter": short}.items():
        found |= {name: scored.accuracy, f"{name}_right": right(rows, scored)}
    return found


def agreement(rows: list[sweep.Row], scores: list[float]) -> Agreement:
    """Of scores for each response of each row, in order, with the rows' ranks."""
    values, margins = iter(scores), []
    for row in rows:
        best_first = [s for _, s in sorted((rank, next(values)) for rank in row["ranks"])]
        margins += [better - worse for better, worse in combinations(best_first, 2)]
    return Agreement(margins, len(rows))


def right(rows: list[sweep.Row], found: Agreement) -> list[float]:
    """The share of pairs in order, for each of the rankings `rows`."""
    margins, shares = iter(found.margins), []
    for row in rows:
        count = math.comb(len(row["responses"]), 2)
        shares.append(round(sum(next(margins) > 0 for _ in range(count)) / count, 4))
    if next(margins, None) is not None:
        raise RuntimeError("expected a margin for each pair of each ranking, got more")
    return shares


@torch.no_grad()
def likelihoods(model: Any, tokenizer: Any, rows: list[sweep.Row], template: str) -> list[float]:
    texts = [row | {"completion": text} for row in rows for text in row["responses"]]
    encoded, found = data.encode(texts, tokenizer, template=template), []
    for batch in (pack(encoded[i : i + 64], packing=False) for i in range(0, len(encoded), 64)):
        batch = batch.to(model.device)
        found += logprobs.mean_by_example(logprobs.response_logps(model, batch), batch).tolist()
    return found


if __name__ == "__main__":
    settings = {"base": "tinytown", "texts": 1728, "step_texts": 72, "test_rows": 200}
    args = sweep.arguments(__doc__, **settings)
    sweep.over_seeds(baseline, [{"stage": "base"}], args)
    sweep.compare_tuned(measure, ("k", "noise"), LEARNING_RATES, CONDITIONS, args)
