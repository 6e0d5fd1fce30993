"""Is a reward model robust to label noise, and do all pairs of a ranking help? For 08_rlhf.

Rankings of 4-9 responses, in which neighbours of the gold judge's order are swapped with
probability `noise`; the same responses at every noise. A model learns from all pairs of each
ranking, or from one random pair of each: as many prompts and steps, fewer comparisons. It is
scored on rankings of held-out prompts without noise, by the 95 % Wilson interval of the pairs it
orders rightly, its margin, and its calibration. `flipped` is the share of all training pairs
that noise reversed.

    python benchmarks/reward_noise.py --json benchmarks/results/reward_noise.json
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import common
import sweep

from labkit import models
from labkit.techniques import reward
from labkit.tinytown import rankings

NOISES = (0.0, 0.1, 0.2, 0.3, 0.4)
PAIRS = ("all", "one")


def measure(point: sweep.Row) -> sweep.Row:
    """One run: trained and scored. The seed draws prompts, responses, noise and order."""
    model, tokenizer = models.load(point["base"])
    train = rankings(point["rows"], noise=point["noise"], seed=point["seed"])
    clean = rankings(point["rows"], noise=0.0, seed=point["seed"])
    names = ("pairs", "learning_rate", "epochs", "batch_size", "seed")
    config = reward.RewardConfig(**{name: point[name] for name in names})
    learned, result = reward.train(model, tokenizer, train, config, progress=False)
    found = common.results(result) | {"flipped": flipped(train, clean)}
    test = rankings(point["test_rows"], noise=0.0, seed=0, split="test")
    return found | scores(reward.evaluate(learned, test))


def flipped(noisy: list[sweep.Row], clean: list[sweep.Row]) -> float:
    """The share of pairs that two rankings of the same responses order differently."""
    reversed_ = [
        (a["ranks"][i] < a["ranks"][j]) != (b["ranks"][i] < b["ranks"][j])
        for a, b in zip(noisy, clean, strict=True)
        for i, j in combinations(range(len(a["ranks"])), 2)
    ]
    return sum(reversed_) / len(reversed_)


def scores(found: reward.Agreement) -> dict[str, Any]:
    """Agreement with held-out rankings, and its reliability bins."""
    low, high = found.interval
    return {
        "pairs_scored": len(found.margins),
        "accuracy": found.accuracy,
        "low": low,
        "high": high,
        "margin": found.margin,
        "loss": found.loss,
        "calibration": found.calibration(),
        "calibration_error": found.calibration_error(),
    }


def main() -> None:
    args = sweep.arguments(
        __doc__, base="tinytown", rows=400, test_rows=200, epochs=1.0, learning_rate=1e-3,
        batch_size=16,
    )  # fmt: skip
    points = [
        {"pairs": pairs, "noise": noise, "seed": seed} | args.settings
        for seed in range(args.seeds)
        for noise in NOISES
        for pairs in PAIRS
    ]
    sweep.run(measure, points, args.json, args.workers, args.only)


if __name__ == "__main__":
    main()
