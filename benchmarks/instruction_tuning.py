"""What does variety in the instructions buy? The recorded sweep of 06_instruction_tuning.

Every arm trains the base for the same number of rows and is asked the same questions:

- 1, 2, 3, 4 phrasings: at most so many ways to ask, for each of 16 tasks and 2 languages
- 4, 8 families: fewer tasks, drawn by the seed, in all phrasings and both languages
- English only: all tasks and phrasings
- chapter's loss: all rows, with the loss of 5.5.2: prompts are learned too, no end token is

Arms with less to draw from repeat their rows, so the steps are equal. Strict marks: the whole
response must be right, and must end. Loose marks: the right answer stands somewhere in it.

    python benchmarks/instruction_tuning.py --json benchmarks/results/instruction_tuning.json
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import grid

from labkit import evaluation, models, training
from labkit.techniques import instruction
from labkit.tinytown import instruction_rows

ARMS = {
    "1 phrasing": {"phrasings": 1},
    "2 phrasings": {"phrasings": 2},
    "3 phrasings": {"phrasings": 3},
    "4 phrasings": {"phrasings": 4},
    "4 families": {"families": 4},
    "8 families": {"families": 8},
    "English only": {"languages": ("en",)},
    "chapter's loss": {},
}
POOL = 12_000  # rows that an arm chooses its own from


def chosen_rows(arm: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """The rows an arm trains on."""
    pool = instruction_rows("train", max(POOL, rows), seed)
    limits: dict[str, Any] = dict(ARMS[arm])
    if "families" in limits:
        names = sorted({row["task"] for row in pool})
        limits["families"] = random.Random(seed).sample(names, limits["families"])
    return instruction.vary(pool, rows, **limits)


def measure(arm: str, seed: int, base: str, rows: int, test_rows: int, learning_rate: float,
            batch_size: int) -> dict[str, Any]:  # fmt: skip
    """One run: trained and scored."""
    started = time.perf_counter()
    model, tokenizer = models.load(base)
    broken = arm == "chapter's loss"
    config = instruction.InstructionConfig(learn_prompt=broken, learn_end=not broken)
    chosen = chosen_rows(arm, rows, seed)
    train = instruction.encode(chosen, tokenizer, config)
    options = training.TrainConfig(learning_rate=learning_rate, batch_size=batch_size, seed=seed)
    result = training.sft(model, tokenizer, train.dataset, options, progress=False)
    found = {"distinct": len({row["prompt"] for row in chosen}), "train_loss": result.loss}
    found |= {"families": sorted({row["task"] for row in chosen}), "steps": result.steps}
    found |= {"train_seconds": round(result.seconds, 2)} | score(model, tokenizer, test_rows)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def score(model: Any, tokenizer: Any, n: int) -> dict[str, float]:
    """Strict and loose accuracy and response loss on each held-out split, and by language."""
    found = {}
    for split in ("test", "heldout_people", "heldout_phrasings", "heldout_families"):
        families = ["fact"] if split == "heldout_people" else None
        rows = instruction_rows(split, n, families=families)
        result = evaluation.exact(model, tokenizer, rows, max_new_tokens=80)
        loose = [instruction.contains(r, a) for r, a in zip(rows, result.responses, strict=True)]
        encoded = instruction.encode(rows, tokenizer, instruction.InstructionConfig())
        found |= {split: result.accuracy, f"{split}_loose": sum(loose) / len(loose)}
        found |= {f"{split}_{lang}": v[0] for lang, v in result.by("lang").items()}
        found[f"{split}_loss"] = evaluation.held_out_loss(model, encoded.dataset)
    found["end_probability"] = instruction.end_probability(model, encoded)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--base", default="tinytown")
    p.add_argument("--rows", type=int, default=2500)
    p.add_argument("--test-rows", type=int, default=200)
    p.add_argument("--learning-rate", type=float, default=5e-4)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    shared = dict(base=args.base, rows=args.rows, test_rows=args.test_rows)
    shared |= dict(learning_rate=args.learning_rate, batch_size=args.batch_size)
    points = [dict(arm=arm, seed=seed, **shared) for seed in range(args.seeds) for arm in ARMS]
    grid.run_grid(measure, points, args.json, args.workers)


if __name__ == "__main__":
    main()
