"""What does variety in the instructions buy? The recorded sweep of 06_instruction_tuning.

Under every condition the base trains on the same number of examples and answers the same prompts:

- 1, 2, 3, 4 phrasings: at most so many ways to ask, for each of 16 tasks and 2 languages
- 4, 8 families: fewer tasks, drawn by the seed, in all phrasings and both languages
- English only: all tasks and phrasings
- chapter's loss: all examples, with the loss of 5.5.2: prompts are learned too, no EOS is

Conditions with less to draw from repeat their examples, so the steps are equal. Exact match: the
whole response must be right, and must end. Lenient match: the right answer occurs somewhere in it.

    python benchmarks/instruction_tuning.py --json benchmarks/results/instruction_tuning.json
"""

import random
from typing import Any

import common
import sweep

from labkit import evaluation, models
from labkit.techniques import instruction
from labkit.tinytown import instruction_rows

CONDITIONS: dict[str, dict[str, Any]] = {"1 phrasing": {"phrasings": 1}}
CONDITIONS |= {f"{n} phrasings": {"phrasings": n} for n in (2, 3, 4)}
CONDITIONS |= {f"{n} families": {"families": n} for n in (4, 8)}
CONDITIONS |= {"English only": {"languages": ("en",)}, "chapter's loss": {}}
POOL = 12_000  # examples that a condition chooses its own from


def training_rows(condition: str, count: int, seed: int) -> list[sweep.Row]:
    pool = instruction_rows("train", max(POOL, count), seed)
    limits = dict(CONDITIONS[condition])
    if "families" in limits:
        names = sorted({row["task"] for row in pool})
        limits["families"] = random.Random(seed).sample(names, limits["families"])
    return instruction.vary(pool, count, **limits)


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    chapter = point["arm"] == "chapter's loss"
    config = instruction.InstructionConfig(learn_prompt=chapter, learn_eos=not chapter)
    rows = training_rows(point["arm"], point["rows"], point["seed"])
    found = common.train(model, instruction.encode(rows, tokenizer, config), point)
    found |= {"distinct": len({row["prompt"] for row in rows})}
    found |= {"families": sorted({row["task"] for row in rows})}
    return found | scores(model, tokenizer, point["test_rows"])


def scores(model: Any, tokenizer: Any, n: int) -> sweep.Row:
    """Exact and lenient matches and response loss on each held-out split, and by language."""
    found = {}
    for split in ("test", "heldout_people", "heldout_phrasings", "heldout_families"):
        families = ["fact"] if split == "heldout_people" else None
        rows = instruction_rows(split, n, families=families)
        result = evaluation.exact(model, tokenizer, rows, max_new_tokens=80)
        lenient = [instruction.contains(r, a) for r, a in zip(rows, result.responses, strict=True)]
        encoded = instruction.encode(rows, tokenizer, instruction.InstructionConfig())
        found |= {split: result.accuracy, f"{split}_loose": sum(lenient) / len(lenient)}
        found |= {f"{split}_{lang}": v[0] for lang, v in result.by("lang").items()}
        found[f"{split}_loss"] = evaluation.held_out_loss(model, encoded)
    found["end_probability"] = instruction.end_probability(model, encoded)
    return found


if __name__ == "__main__":
    settings = {"base": "tinytown", "rows": 2500, "test_rows": 200}
    args = sweep.arguments(__doc__, **settings, learning_rate=5e-4, batch_size=16)
    sweep.over_seeds(measure, [{"arm": name} for name in CONDITIONS], args)
