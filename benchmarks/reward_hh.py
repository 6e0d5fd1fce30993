"""A reward model on real preferences, from nothing but a file of them: is it better than chance?

The file holds pairs in any format that `labkit.data` knows, such as hh-rlhf's transcripts. Rows
that begin with the same question stay together; each of the folds is held out once, so every pair
is judged by a model that has not seen it. In each fold everything is made from the other folds:
a tokenizer, a language model of the embedded architecture that has read the chosen transcripts,
and the reward model on top of it. Rows that cannot be learned from (an empty reply, equal
replies) are left out and counted. Beside the model stands "the shorter reply is better".

    python benchmarks/reward_hh.py --data hh_harmless_base_test.jsonl.gz --json reward_hh.json
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grid
import torch

from labkit import data, evaluation, files, templates, tracking, training
from labkit.techniques import reward
from labkit.tinytown import pretrain

Row = dict[str, Any]


def usable(rows: Sequence[Row]) -> list[Row]:
    """The rows that a reward model can learn from or be judged on."""
    kept = []
    for row in rows:
        try:
            reward.best_first(row)
        except ValueError:
            continue
        kept.append(row)
    return kept


def fold_of(row: Row, folds: int) -> int:
    """The same for all rows that begin with the same question."""
    return zlib.crc32(templates.turns(row)[0]["content"].encode()) % folds


def tokenizer_for(texts: Sequence[str], vocab_size: int) -> Any:
    """The embedded model's kind of tokenizer, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=pretrain.SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pretrain.PAD, eos_token=pretrain.END,
        additional_special_tokens=pretrain.SPECIAL[2:], chat_template=pretrain.CHAT_TEMPLATE,
    )  # fmt: skip


def language_model(rows: Sequence[Row], args: Row, seed: int) -> tuple[Any, Any, float]:
    """A model of the embedded architecture that has read the chosen transcripts; its last loss."""
    from transformers import AutoModelForCausalLM

    replies = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    plain = [f"{templates.prompt_text(row)}\n{templates.response(row)}" for row in replies]
    tokenizer = tokenizer_for(plain, args["vocab_size"])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(pretrain.base_config(args["vocab_size"]))
    if not args["reading_epochs"]:
        return model.eval(), tokenizer, float("nan")
    rendered = ["".join(templates.render(row, tokenizer)) for row in replies]
    texts = [{"text": text.removesuffix(pretrain.END)} for text in rendered]
    config = training.TrainConfig(learning_rate=2e-3, epochs=args["reading_epochs"], seed=seed)
    encoded = data.encode(texts, tokenizer, max_length=args["max_length"])
    result = training.sft(model, tokenizer, encoded.dataset, config, progress=False)
    return model.eval(), tokenizer, result.loss


def measure(fold: int, **args: Any) -> dict[str, Any]:
    """One fold: everything trained on the others, and scored on this one."""
    started = time.perf_counter()
    rows = usable(data.convert(files.read(args["data"]), args["data"]))
    if args["limit"]:
        rows = rows[: args["limit"]]
    held_out = [row for row in rows if fold_of(row, args["folds"]) == fold]
    train = [row for row in rows if fold_of(row, args["folds"]) != fold]
    model, tokenizer, reading_loss = language_model(train, args, seed=fold)
    config = reward.RewardConfig(
        learning_rate=args["learning_rate"], epochs=args["epochs"], weight_decay=0.1,
        max_length=args["max_length"], batch_size=32, seed=fold,
    )  # fmt: skip
    learned, result = reward.train(model, tokenizer, train, config, progress=False)
    margins = reward.evaluate(learned, held_out).margins
    shorter = [len(best) < len(worst) for best, worst in map(reward.best_first, held_out)]
    return {
        "rows": len(rows), "train_rows": len(train), "test_rows": len(held_out),
        "reading_loss": reading_loss, "train_loss": result.loss, "steps": result.steps,
        "tokens_per_second": round(result.tokens_per_second), "shorter": sum(shorter),
        "margins": [round(margin, 5) for margin in margins],
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All folds together: accuracy with its interval, and whether that lies above chance."""
    found = reward.Agreement([m for run in runs for m in run["margins"]],
                             sum(run["test_rows"] for run in runs))  # fmt: skip
    low, high = found.interval
    shorter = sum(run["shorter"] for run in runs)
    return {
        "pairs": len(found.margins), "accuracy": found.accuracy, "low": low, "high": high,
        "above_chance": low > 0.5, "margin": found.margin, "loss": found.loss,
        "calibration": found.calibration(), "calibration_error": found.calibration_error(),
        "shorter_is_better": shorter / found.rankings,
        "shorter_interval": evaluation.wilson(shorter, found.rankings),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", required=True, help="a file of preference pairs")
    p.add_argument("--limit", type=int, default=0, help="so many rows only (0: all)")
    p.add_argument("--folds", type=int, default=4)
    p.add_argument("--vocab-size", type=int, default=2048)
    p.add_argument("--max-length", type=int, default=128)
    p.add_argument("--reading-epochs", type=float, default=1.0)
    p.add_argument("--epochs", type=float, default=1.0)
    p.add_argument("--learning-rate", type=float, default=5e-4)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    shared = {k: v for k, v in vars(args).items() if k not in ("json", "workers")}
    points = [{"fold": fold, **shared} for fold in range(args.folds)]
    runs = grid.run_grid(measure, points, args.json, args.workers)
    if others := [run for run in runs if not shared.items() <= run.items()]:
        p.error(f"{args.json} holds {len(others)} runs with other settings; name another file")
    found = summary(runs)
    record = json.loads(args.json.read_text()) | {"summary": found}
    tracking.write_text(args.json, json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
