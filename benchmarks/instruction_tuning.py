"""What does variety in the instructions buy? The recorded sweep of 06_instruction_tuning.

Under every condition the base trains on the same number of examples, at a learning rate of its own
(as in `lora_rank.py`), and answers the same prompts, which the seed draws, as the examples:

- everything: 16 tasks, 2 languages, all of their five to eight phrasings
- 1, 2, 4 phrasings: at most so many ways to ask, for each task and language
- 4, 8 families: fewer tasks, drawn by the seed, in all phrasings and both languages
- English only: all tasks and phrasings
- prompt learned, no EOS: `everything`, with one of the two changes of the loss of 5.5.2
- chapter's loss: with both
- base: not trained; also asked in the form in which it knows the questions (`_own`)

Conditions with less to draw from repeat their examples, so the steps are equal. Exact match: the
whole response must be right, and must end. Lenient match: the right answer occurs somewhere in it.

    python benchmarks/instruction_tuning.py --json benchmarks/results/instruction_tuning.json
"""

import random
from functools import cache
from typing import Any

import common
import sweep
from common import accuracy_own, marks

from labkit import evaluation, models
from labkit.techniques import instruction
from labkit.tinytown import instruction_rows
from labkit.tinytown.world import LANGUAGES

CONDITIONS: dict[str, dict[str, Any]] = {"everything": {}, "1 phrasing": {"phrasings": 1}}
CONDITIONS |= {f"{n} phrasings": {"phrasings": n} for n in (2, 4)}
CONDITIONS |= {f"{n} families": {"families": n} for n in (4, 8)}
CONDITIONS |= {"English only": {"languages": ("en",)}}
LOSSES = {"prompt learned": (True, True), "no EOS": (False, False), "chapter's loss": (True, False)}
CONDITIONS |= {name: {} for name in LOSSES}
LEARNING_RATES = {(name,): (2.5e-4, 5e-4) for name in CONDITIONS}


@cache
def pool(seed: int) -> list[sweep.Row]:
    """What a condition chooses its examples from."""
    return instruction_rows("train", 12_000, seed)


def training_rows(condition: str, count: int, seed: int) -> list[sweep.Row]:
    limits = dict(CONDITIONS[condition])
    if "families" in limits:
        names = sorted({row["task"] for row in pool(seed)})
        limits["families"] = random.Random(seed).sample(names, limits["families"])
    return instruction.vary(pool(seed), count, **limits)


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    if point["arm"] == "base":
        return scores(model, tokenizer, point)
    prompts, ends = LOSSES.get(point["arm"], (False, True))
    config = instruction.InstructionConfig(learn_prompt=prompts, learn_eos=ends)
    rows = training_rows(point["arm"], point["rows"], point["seed"])
    found = common.train(model, instruction.encode(rows, tokenizer, config), point)
    found |= {"distinct": len({row["prompt"] for row in rows})}
    found |= {"families": sorted({row["task"] for row in rows})}
    if point["stage"] == "compare":
        return found | scores(model, tokenizer, point)
    own = instruction.InstructionConfig(learn_eos=ends)
    encoded = instruction.encode(common.questions(point, tuning=True), tokenizer, own)
    return found | {"tuning_loss": evaluation.held_out_loss(model, encoded)}


def scores(model: Any, tokenizer: Any, point: sweep.Row) -> sweep.Row:
    """Exact and lenient matches and response loss on each held-out split, and by language."""
    found, n, seed = {}, point["test_rows"], point["seed"]
    asked = {"test": common.questions(point)}
    asked["heldout_people"] = instruction_rows("heldout_people", n, seed, families=["fact"])
    for split in ("heldout_phrasings", "heldout_families"):
        asked[split] = instruction_rows(split, n, seed)
    for split, rows in asked.items():
        result = evaluation.exact(model, tokenizer, rows)
        lenient = [instruction.contains(r, a) for r, a in zip(rows, result.responses, strict=True)]
        encoded = instruction.encode(rows, tokenizer, instruction.InstructionConfig())
        found |= {split: result.accuracy, f"{split}_right": marks(result)}
        found[f"{split}_loose"] = sum(lenient) / len(lenient)
        for lang in LANGUAGES:
            answers = zip(rows, result.responses, strict=True)
            part, texts = zip(*((r, text) for r, text in answers if r["lang"] == lang), strict=True)
            scored = evaluation.score(list(part), list(texts))
            found |= {f"{split}_{lang}": scored.accuracy, f"{split}_{lang}_right": marks(scored)}
            if point["arm"] == "base":
                found |= accuracy_own(f"{split}_{lang}", model, tokenizer, list(part))
        found[f"{split}_loss"] = evaluation.held_out_loss(model, encoded)
        if point["arm"] == "base":
            found |= accuracy_own(split, model, tokenizer, rows)
    found["end_probability"] = instruction.end_probability(model, encoded)
    return found


if __name__ == "__main__":
    settings = {"base": "tinytown", "rows": 2000, "test_rows": 200}
    args = sweep.arguments(__doc__, **settings, batch_size=16)
    sweep.over_seeds(measure, [{"stage": "base", "arm": "base"}], args)
    sweep.compare_tuned(measure, ("arm",), LEARNING_RATES, None, args)
