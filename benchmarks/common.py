"""What several sweeps share: a training run on Tinytown, and the scores after it.

A seed draws everything anew: the training rows, what is initialized, the test questions. A quarter
of the test split, by question, is for choosing settings, and no comparison asks it.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any
from zlib import crc32

from labkit import data, evaluation, models, tinytown, training
from labkit.tinytown.tasks import in_own_form

Row = dict[str, Any]
SETTINGS = {"base": "tinytown", "rows": 1600, "test_rows": 300, "epochs": 2.0, "batch_size": 16}


def training_set(tokenizer: Any, point: Row) -> data.Encoded:
    return data.encode(data.load(limit=point["rows"], seed=point["seed"]), tokenizer)


def questions(point: Row, tuning: bool = False, families: Any = None) -> list[Row]:
    """`test_rows` rows of the test split: of the questions to tune on, or of the others."""
    n, drawn = point["test_rows"], 6 if tuning else 2
    rows = tinytown.instruction_rows("test", drawn * n, point["seed"], families=families)
    return [row for row in rows if for_tuning(row) == tuning][:n]


def for_tuning(row: Row) -> bool:
    """True for a quarter of the questions, whatever the words."""
    return crc32(row["key"].encode()) // 8 % 4 == 0


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


def baseline(point: Row, held_out: Sequence[str] = ()) -> Row:
    """The scores of the base as it is."""
    return scores(*models.load(point["base"]), point, held_out)


def scores(model: Any, tokenizer: Any, point: Row, held_out: Sequence[str] = ()) -> Row:
    """At the stage "tune" the response loss of the questions to tune on, nothing else.

    At others `loss`, of responses (nats per token), and accuracies: `accuracy` on the test split,
    `facts` about people never tuned on, those on other splits `held_out`; at the stage "base" each
    also in the form in which the base knows the questions, as `accuracy_own` and so on.
    """
    if point["stage"] == "tune":
        return {"tuning_loss": response_loss(model, tokenizer, questions(point, tuning=True))}
    n, seed = point["test_rows"], point["seed"]
    asked = {"accuracy": questions(point)}
    asked["facts"] = tinytown.instruction_rows("heldout_people", n, seed, families=["fact"])
    for name in held_out:
        asked[name] = tinytown.instruction_rows(f"heldout_{name}", n, seed)
    found = {"loss": response_loss(model, tokenizer, asked["accuracy"])}
    for name, rows in asked.items():
        found |= accuracy(name, model, tokenizer, rows)
        if point["stage"] == "base":
            found |= accuracy_own(name, model, tokenizer, rows)
    return found


def accuracy(name: str, model: Any, tokenizer: Any, rows: list[Row], template: str = "auto") -> Row:
    """The accuracy under `name`; `name_right` tells which rows were right (`marks`)."""
    found = evaluation.exact(model, tokenizer, rows, template=template)
    return {name: found.accuracy, f"{name}_right": marks(found)}


def accuracy_own(name: str, model: Any, tokenizer: Any, rows: list[Row]) -> Row:
    """`accuracy` in the form in which the base knows the questions, as `name_own`."""
    return accuracy(f"{name}_own", model, tokenizer, in_own_form(rows), "bare")


def marks(found: evaluation.Evaluation) -> str:
    """A word for each question, in the order of their keys, with a 1 or 0 for each of its rows."""
    words: dict[str, str] = {}
    for row, right in zip(found.rows, found.correct, strict=True):
        words[row["key"]] = words.get(row["key"], "") + str(int(right))
    return " ".join(words[key] for key in sorted(words))


def response_loss(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    return evaluation.held_out_loss(model, data.encode(rows, tokenizer))


def perplexity(model: Any, tokenizer: Any, texts: int = 12, first: int = 0) -> tuple[float, Row]:
    """Of held-out pretraining texts `first` to `first + texts` of each genre: mean, and by genre.

    The mean is geometric; texts are the same for every seed.
    """
    samples = {genre: found[first:][:texts] for genre, found in genre_samples().items()}
    genres = evaluation.perplexity_by(model, tokenizer, {g: t for g, t in samples.items() if t})
    return statistics.geometric_mean(genres.values()), genres


@cache
def genre_samples() -> dict[str, list[str]]:
    return tinytown.genre_samples(24)


def agreement(found: Any) -> Row:
    """How a reward model orders pairs: accuracy with its interval, margin, loss, reliability."""
    low, high = found.interval
    scores = {"accuracy": found.accuracy, "low": low, "high": high, "margin": found.margin}
    reliability = {"calibration_error": found.calibration_error(), "loss": found.loss}
    return scores | reliability | {"calibration": found.calibration()}
