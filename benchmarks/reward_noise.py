"""Is a reward model robust to label noise, and do all pairs of a ranking help? For 08_rlhf.

Rankings of 4-9 responses, in which neighbours of the gold judge's order are swapped with
probability `noise`; the same responses at every noise. A model learns from all pairs of each
ranking, or from one random pair of each: as many prompts and steps, fewer comparisons. It is
scored on rankings of held-out prompts without noise, by the 95 % Wilson interval of the pairs it
orders rightly, its margin, and its calibration. `flipped` is the share of all training pairs
that noise reversed.

    python benchmarks/reward_noise.py --json benchmarks/results/reward_noise.json
"""

from itertools import combinations

import common
import sweep

from labkit import models
from labkit.techniques import reward
from labkit.tinytown import rankings

NOISES = (0.0, 0.1, 0.2, 0.3, 0.4)


def measure(point: sweep.Row) -> sweep.Row:
    """The seed draws prompts, responses, noise and order."""
    model, tokenizer = models.load(point["base"])
    train = rankings(point["rows"], noise=point["noise"], seed=point["seed"])
    clean = rankings(point["rows"], noise=0.0, seed=point["seed"])
    config = common.config(reward.RewardConfig, point)
    learned, result = reward.train(model, tokenizer, train, config, progress=False)
    found = common.results(result) | {"flipped": flipped(train, clean)}
    test = rankings(point["test_rows"], noise=0.0, seed=0, split="test")
    scored = reward.evaluate(learned, test)
    return found | {"pairs_scored": len(scored.margins)} | common.agreement(scored)


def flipped(noisy: list[sweep.Row], clean: list[sweep.Row]) -> float:
    """The share of pairs that two rankings of the same responses order differently."""
    found: list[bool] = []
    for a, b in zip(noisy, clean, strict=True):
        pairs = combinations(zip(a["ranks"], b["ranks"], strict=True), 2)
        found += ((i < j) != (k < m) for (i, k), (j, m) in pairs)
    return sum(found) / len(found)


if __name__ == "__main__":
    settings = {"rows": 400, "epochs": 1.0, "learning_rate": 1e-3}
    args = sweep.arguments(__doc__, **common.SETTINGS | settings)
    conditions = [{"pairs": p, "noise": n} for n in NOISES for p in ("all", "one")]
    sweep.over_seeds(measure, conditions, args)
