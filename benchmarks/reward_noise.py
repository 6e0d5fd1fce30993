"""How much wrong labels does a reward model stand, and do all pairs of a ranking help? For 08_rlhf.

Rankings of 4-9 responses, in which neighbours of the gold judge's order are swapped with
probability `noise`; the same responses at every noise. A model learns from all pairs of each
ranking, or from one random pair of each: as many prompts and steps, fewer comparisons. It is
scored on rankings of held-out prompts without noise, by the 95 % Wilson interval of the pairs it
orders rightly, its margin, and its calibration. `flipped` is the share of all training pairs
that noise turned round.

    python benchmarks/reward_noise.py --json benchmarks/results/reward_noise.json
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import grid

from labkit import models
from labkit.techniques import reward
from labkit.tinytown import rankings

NOISES = (0.0, 0.1, 0.2, 0.3, 0.4)


def measure(
    pairs: str, noise: float, seed: int, base: str, rows: int, test_rows: int,
    learning_rate: float, epochs: float, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """One run: trained and scored. The seed draws prompts, responses, noise and order."""
    started = time.perf_counter()
    model, tokenizer = models.load(base)
    train = rankings(rows, noise=noise, seed=seed)
    config = reward.RewardConfig(
        pairs=pairs, learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed
    )
    learned, result = reward.train(model, tokenizer, train, config, progress=False)
    found = {"flipped": flipped(train, rankings(rows, noise=0.0, seed=seed))}
    found |= {"steps": result.steps, "tokens": result.tokens, "train_loss": result.loss}
    found |= {"train_seconds": round(result.seconds, 2)}
    found |= score(learned, rankings(test_rows, noise=0.0, seed=0, split="test"))
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def flipped(noisy: list[dict[str, Any]], clean: list[dict[str, Any]]) -> float:
    """The share of pairs that two rankings of the same responses order differently."""
    turned = [
        (a["ranks"][i] < a["ranks"][j]) != (b["ranks"][i] < b["ranks"][j])
        for a, b in zip(noisy, clean, strict=True)
        for i, j in combinations(range(len(a["ranks"])), 2)
    ]
    return sum(turned) / len(turned)


def score(model: reward.RewardModel, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement with held-out rankings, and its reliability bins."""
    found = reward.evaluate(model, rows)
    low, high = found.interval
    return {
        "accuracy": found.accuracy, "low": low, "high": high, "pairs_scored": len(found.margins),
        "margin": found.margin, "loss": found.loss, "calibration": found.calibration(),
        "calibration_error": found.calibration_error(),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--base", default="tinytown", help="the model that gets the head")
    p.add_argument("--rows", type=int, default=800)
    p.add_argument("--test-rows", type=int, default=300)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--epochs", type=float, default=1.0)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    shared = dict(base=args.base, rows=args.rows, test_rows=args.test_rows, epochs=args.epochs)
    shared |= dict(learning_rate=args.learning_rate, batch_size=args.batch_size)
    points = [
        dict(pairs=pairs, noise=noise, seed=seed, **shared)
        for seed in range(args.seeds)
        for noise in NOISES
        for pairs in reward.PAIRS
    ]
    grid.run_grid(measure, points, args.json, args.workers)


if __name__ == "__main__":
    main()
