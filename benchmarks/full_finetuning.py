"""What should full fine-tuning be given, and what does it forget? The sweeps of 01_full_finetuning.

Every run trains on the same number of rows and is scored on test questions of its own mixture
and by perplexity on held-out pretraining text, genre by genre. Two mixtures: `all` holds every
task, facts of the town among them, so that it rehearses some of what pretraining taught;
`narrow` holds three tasks that mention nothing of the town. Four stages:

- `base`: nothing is trained, the untouched baseline.
- `rate`: learning rates from 1e-5 to 1e-2 (pretraining's was 3e-3), on `all`.
- `dial`: batch size, epochs, warmup, weight decay around the default, one at a time, on `all`.
- `remedy`: on `narrow`, because forgetting should show most where nothing is rehearsed, at the
  default settings. Both were fixed before any remedy was run. Plain fine-tuning beside the pull
  to the old weights, replay, lower rates, frozen lower layers, and LoRA.

    python benchmarks/full_finetuning.py --json benchmarks/results/full_finetuning.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import grid

from labkit import data, evaluation, models, training
from labkit.techniques import full, lora

NARROW = ("sentiment", "arithmetic", "polite")
DEFAULT = {"learning_rate": 1e-3, "batch_size": 16, "epochs": 3.0, "warmup_ratio": 0.1,
           "weight_decay": 0.01, "alpha": 0.0, "replay": 0.0, "frozen_layers": 0,
           "frozen_embeddings": False, "rank": 0}  # fmt: skip
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
DIALS = {
    "batch_size": (4, 32, 128),
    "epochs": (1.0, 10.0),
    "warmup_ratio": (0.0, 0.2, 0.5),
    "weight_decay": (0.0, 0.1, 1.0),
}
REMEDIES: tuple[dict[str, Any], ...] = (
    {},
    *({"alpha": alpha} for alpha in (1e2, 1e3, 1e4, 1e5, 1e6)),
    *({"replay": share} for share in (0.05, 0.2)),
    *({"learning_rate": rate} for rate in (1e-4, 3e-4)),
    {"frozen_layers": 2, "frozen_embeddings": True},
    {"rank": 8, "learning_rate": 4e-3},
)


def measure(
    stage: str, mixture: str, seed: int, base: str, rows: int, test_rows: int, genre_rows: int,
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """One run: trained (unless `stage` is "base") and scored."""
    started = time.perf_counter()
    model, tokenizer = models.load(base)
    found: dict[str, Any] = {}
    if stage != "base":
        model, found = train(model, tokenizer, mixture, rows, seed, settings)
    found |= score(model, tokenizer, mixture, test_rows, genre_rows)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def train(
    model: Any, tokenizer: Any, mixture: str, rows: int, seed: int, settings: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model, trained as `settings` say on rows that are the same for every seed."""
    config = full.FullConfig(**{name: settings[name] for name in
        ("alpha", "replay", "frozen_layers", "frozen_embeddings")})  # fmt: skip
    if settings["rank"]:
        model = lora.attach(model, lora.LoraConfig(settings["rank"], 2.0 * settings["rank"]))
    else:
        model = full.attach(model, config)
    mixed = full.mix_replay(tuning_rows("train", mixture, rows), old_texts(rows), config.replay)
    encoded = data.encode(mixed, tokenizer, max_length=256)
    names = ("learning_rate", "batch_size", "epochs", "warmup_ratio", "weight_decay")
    options = training.TrainConfig(seed=seed, **{name: settings[name] for name in names})
    result = training.sft(model, tokenizer, encoded.dataset, options, progress=False,
                          extra_loss=full.pull(model, config))  # fmt: skip
    return model, {"train_loss": result.loss, "steps": result.steps, "tokens": result.tokens,
                   "trainable": models.parameter_counts(model).trainable,
                   "train_seconds": round(result.seconds, 2)}  # fmt: skip


def tuning_rows(split: str, mixture: str, n: int) -> list[dict[str, Any]]:
    from labkit.tinytown import instruction_rows

    return instruction_rows(split, n, families=NARROW if mixture == "narrow" else None)


def old_texts(n: int) -> list[str]:
    """The first n texts that the base model was pretrained on."""
    from labkit.tinytown import documents

    return [text for _, text in islice(documents(seed=0), n)]


def score(
    model: Any, tokenizer: Any, mixture: str, test_rows: int, genre_rows: int
) -> dict[str, Any]:
    """Right answers and response loss; perplexity by genre and its geometric mean."""
    from labkit.tinytown import genre_samples

    questions = tuning_rows("test", mixture, test_rows)
    encoded = data.encode(questions, tokenizer, max_length=256)
    genres = evaluation.perplexity_by(model, tokenizer, genre_samples(genre_rows))
    return {
        "accuracy": evaluation.exact(model, tokenizer, questions).accuracy,
        "loss": evaluation.held_out_loss(model, encoded.dataset),
        "perplexity": statistics.geometric_mean(genres.values()),
        "genres": {name: round(value, 4) for name, value in genres.items()},
    }


def plan() -> list[dict[str, Any]]:
    """All points without seed and sizes: stage, mixture, and the dials that differ."""
    points = [{"stage": "base", "mixture": mixture} for mixture in ("all", "narrow")]
    points += [{"stage": "rate", "mixture": "all", "learning_rate": rate} for rate in RATES]
    points += [{"stage": "dial", "mixture": "all", dial: value}
               for dial, values in DIALS.items() for value in values]  # fmt: skip
    return points + [{"stage": "remedy", "mixture": "narrow"} | remedy for remedy in REMEDIES]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--base", default="tinytown")
    p.add_argument("--rows", type=int, default=500)
    p.add_argument("--test-rows", type=int, default=150)
    p.add_argument("--genre-rows", type=int, default=12)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--only", choices=("base", "rate", "dial", "remedy"), help="one stage alone")
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    sizes = dict(base=args.base, rows=args.rows, test_rows=args.test_rows)
    sizes |= dict(genre_rows=args.genre_rows)
    points = [
        DEFAULT | point | {"seed": seed} | sizes
        for seed in range(args.seeds)
        for point in plan()
        if args.only in (None, point["stage"]) and (point["stage"] != "base" or seed == 0)
    ]
    grid.run_grid(measure, points, args.json, args.workers)


if __name__ == "__main__":
    main()
