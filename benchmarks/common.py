"""What several sweeps share: a training run on Tinytown, and the scores after it."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from labkit import data, evaluation, models, tinytown, training

Row = dict[str, Any]
SETTINGS = {"base": "tinytown", "rows": 2000, "test_rows": 200, "epochs": 2.0, "batch_size": 16}


def training_set(tokenizer: Any, rows: int) -> data.Encoded:
    """The same examples for every seed."""
    return data.encode(data.load(limit=rows, seed=0), tokenizer, max_length=256)


def config(kind: Any, point: Row, **more: Any) -> Any:
    """The configuration `kind` with those of its fields that `point` has."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in point.items() if name in names} | more)


def train(model: Any, examples: Sequence[Any], point: Row, **options: Any) -> Row:
    """Trains `model` with the settings of `training.TrainConfig` that `point` has; see `fit`."""
    settings = config(training.TrainConfig, point)
    result = training.fit(model, examples, training.sft_loss, settings, progress=False, **options)
    return results(result) | {"trainable": models.parameter_counts(model).trainable}


def results(result: training.TrainResult) -> Row:
    """Of a training run, as it is recorded."""
    found: Row = {"train_loss": result.loss, "steps": result.steps, "tokens": result.tokens}
    speed, seconds = round(result.tokens_per_second), round(result.seconds, 2)
    return found | {"tokens_per_second": speed, "train_seconds": seconds}


def scores(model: Any, tokenizer: Any, n: int) -> Row:
    """Accuracy on `test` and on facts about held-out people; response losses (nats per token).

    `tuning_loss` is that of other questions of the test split, for choosing a learning rate.
    """
    questions = data.load(split="test", limit=n)
    prompts = {row["prompt"] for row in questions}
    facts = tinytown.instruction_rows("heldout_people", n, families=["fact"])
    others = [r for r in data.load(split="test", limit=3 * n, seed=1) if r["prompt"] not in prompts]
    return {
        "accuracy": accuracy(model, tokenizer, questions),
        "facts": accuracy(model, tokenizer, facts),
        "loss": response_loss(model, tokenizer, questions),
        "tuning_loss": response_loss(model, tokenizer, others[:n]),
    }


def accuracy(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    return evaluation.exact(model, tokenizer, rows, max_new_tokens=32).accuracy


def response_loss(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    return evaluation.held_out_loss(model, data.encode(rows, tokenizer, max_length=256))


def perplexity(model: Any, tokenizer: Any, texts: int = 12) -> tuple[float, Row]:
    """Of so many held-out pretraining texts per genre: geometric mean, and genre by genre."""
    genres = evaluation.perplexity_by(model, tokenizer, tinytown.genre_samples(texts))
    return statistics.geometric_mean(genres.values()), genres


def agreement(found: Any) -> Row:
    """How a reward model orders pairs: accuracy with its interval, margin, loss, reliability."""
    low, high = found.interval
    scores = {"accuracy": found.accuracy, "low": low, "high": high, "margin": found.margin}
    reliability = {"calibration_error": found.calibration_error(), "loss": found.loss}
    return scores | reliability | {"calibration": found.calibration()}
