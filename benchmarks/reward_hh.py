"""A reward model on real preferences, from nothing but a file of them: is it better than chance?

The file holds one pair per line, JSON in any format that `labkit.data` knows, such as hh-rlhf's
transcripts. Rows that begin with the same question stay together; each of the folds is held out
once, so every pair is judged by a model that has not seen it. In each fold everything is made from the other folds:
a tokenizer, a language model of the embedded architecture that has read the chosen transcripts,
and the reward model on top of it. Rows that cannot be learned from (an empty response, equal
responses) are left out and counted. The baseline is "the shorter response is better".

    python benchmarks/reward_hh.py --data hh_harmless_base_test.jsonl.gz --json reward_hh.json
"""

import contextlib
import json
import zlib
from collections.abc import Sequence
from typing import Any

import common
import pandas
import sweep
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

from labkit import data, evaluation, models, record, templates
from labkit.techniques import reward

Row = sweep.Row


def usable(rows: Sequence[Row]) -> list[Row]:
    """The rows that a reward model can learn from or be judged on."""
    kept = []
    for row in rows:
        with contextlib.suppress(ValueError):
            reward.best_first(row)
            kept.append(row)
    return kept


def fold_of(row: Row, folds: int) -> int:
    """The same for all rows that begin with the same question."""
    return zlib.crc32(templates.turns(row)[0]["content"].encode()) % folds


def language_model(rows: Sequence[Row], point: Row) -> tuple[Any, Any, float]:
    """A model of the embedded architecture that has read the chosen transcripts; its last loss."""
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    plain = [f"{templates.prompt_text(row)}\n{templates.response(row)}" for row in chosen]
    base, tokenizer = models.load("tinytown")
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = tokenizer.train_new_from_iterator(plain, point["vocab_size"], show_progress=False)
    base.config.vocab_size = point["vocab_size"]
    torch.manual_seed(point["fold"])
    model = AutoModelForCausalLM.from_config(base.config)
    rendered = ["".join(templates.render(row, tokenizer)) for row in chosen]
    texts = [{"text": text.removesuffix(tokenizer.eos_token)} for text in rendered]
    encoded = data.encode(texts, tokenizer, max_length=point["max_length"])
    reading = {"learning_rate": 2e-3, "epochs": point["reading_epochs"], "seed": point["fold"]}
    found = common.train(model, encoded, reading)
    return model.eval(), tokenizer, found["train_loss"]


def measure(point: Row) -> Row:
    """One fold: everything trained on the others, and scored on this one."""
    pairs = pandas.read_json(point["data"], lines=True, dtype=False).to_dict("records")
    rows = usable(data.convert(pairs, point["data"]))[: point["limit"] or None]
    held_out = [row for row in rows if fold_of(row, point["folds"]) == point["fold"]]
    train = [row for row in rows if fold_of(row, point["folds"]) != point["fold"]]
    model, tokenizer, reading_loss = language_model(train, point)
    settings = {"weight_decay": 0.1, "batch_size": 32, "seed": point["fold"]}
    config = common.config(reward.RewardConfig, point, **settings)
    learned, result = reward.train(model, tokenizer, train, config, progress=False)
    margins = reward.evaluate(learned, held_out).margins
    shorter = sum(len(best) < len(worst) for best, worst in map(reward.best_first, held_out))
    found = {"rows": len(rows), "train_rows": len(train), "test_rows": len(held_out)}
    found |= {
        "shorter": shorter,
        "reading_loss": reading_loss,
        "margins": [round(margin, 5) for margin in margins],
    }
    return found | common.results(result)


def summary(runs: Sequence[Row]) -> Row:
    """All folds together: accuracy with its interval, and whether that lies above chance."""
    margins = [margin for run in runs for margin in run["margins"]]
    found = common.agreement(reward.Agreement(margins, sum(run["test_rows"] for run in runs)))
    found |= {"pairs": len(margins), "above_chance": found["low"] > 0.5}
    cases = sum(run["shorter"] for run in runs), sum(run["test_rows"] for run in runs)
    interval = evaluation.wilson(*cases)
    return found | {"shorter_is_better": cases[0] / cases[1], "shorter_interval": interval}


if __name__ == "__main__":
    sizes = {"limit": 0, "folds": 4, "vocab_size": 2048, "max_length": 128}  # limit 0: all rows
    training = {"reading_epochs": 1.0, "epochs": 1.0, "learning_rate": 5e-4}
    args = sweep.arguments(__doc__, seeds=0, data=str, **sizes, **training)
    points = [{"fold": fold} | args.settings for fold in range(args.folds)]
    runs = sweep.run(measure, points, args.json, args.workers)
    content = json.loads(args.json.read_text("utf-8")) | {"summary": summary(runs)}
    record.write_text(args.json, json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["summary"], indent=1))
