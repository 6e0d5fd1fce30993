"""What should full fine-tuning be given, and what does it forget? The sweeps of 01_full_finetuning.

Every run trains on the same number of examples and is scored on test questions of its own mixture
and by perplexity on held-out pretraining text, genre by genre. Two mixtures: `all` holds every
task, facts of the town among them, so that it rehearses some of what pretraining taught;
`narrow` holds three tasks that mention nothing of the town. Four stages:

- `base`: nothing is trained, the untouched baseline.
- `rate`: learning rates from 1e-5 to 1e-2 (pretraining's was 3e-3), on `all`.
- `dial`: batch size, epochs, warmup, weight decay around the default, one at a time, on `all`.
- `remedy`: on `narrow`, because forgetting should show most where nothing is rehearsed, at the
  default settings. Both were fixed before any remedy was run. Plain fine-tuning next to the L2-SP
  penalty, replay, lower learning rates, frozen lower layers, and LoRA.

    python benchmarks/full_finetuning.py --json benchmarks/results/full_finetuning.json
"""

from itertools import islice
from typing import Any

import common
import sweep
import torch

from labkit import data, models, tinytown
from labkit.techniques import full, lora

NARROW = ("sentiment", "arithmetic", "polite")
TRAINING = {"learning_rate": 1e-3, "batch_size": 16, "epochs": 3.0}
TRAINING |= {"warmup_ratio": 0.1, "weight_decay": 0.01}
TECHNIQUE = {"alpha": 0.0, "replay": 0.0, "frozen_layers": 0, "frozen_embeddings": False, "rank": 0}
DEFAULT: sweep.Row = TRAINING | TECHNIQUE
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ABLATIONS = {"batch_size": (4, 32, 128), "epochs": (1.0, 10.0)}
ABLATIONS |= {"warmup_ratio": (0.0, 0.2, 0.5), "weight_decay": (0.0, 0.1, 1.0)}
REMEDIES: tuple[sweep.Row, ...] = (
    {},
    *({"alpha": alpha} for alpha in (1e2, 1e3, 1e4, 1e5, 1e6)),
    *({"replay": share} for share in (0.05, 0.2)),
    *({"learning_rate": learning_rate} for learning_rate in (1e-4, 3e-4)),
    {"frozen_layers": 2, "frozen_embeddings": True},
    {"rank": 8, "learning_rate": 4e-3},
)
CONDITIONS: list[sweep.Row] = [
    *({"stage": "base", "mixture": mixture, "seed": 0} for mixture in ("all", "narrow")),
    *({"stage": "rate", "mixture": "all", "learning_rate": lr} for lr in LEARNING_RATES),
    *({"stage": "dial", "mixture": "all", n: v} for n, vs in ABLATIONS.items() for v in vs),
    *({"stage": "remedy", "mixture": "narrow"} | remedy for remedy in REMEDIES),
]


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    found: sweep.Row = {}
    if point["stage"] != "base":
        model, found = train(model, tokenizer, point)
    questions = instruction_rows("test", point["mixture"], point["test_rows"])
    found["accuracy"] = common.accuracy(model, tokenizer, questions)
    found["loss"] = common.response_loss(model, tokenizer, questions)
    found["perplexity"], genres = common.perplexity(model, tokenizer, point["genre_rows"])
    return found | {"genres": {name: round(value, 4) for name, value in genres.items()}}


def train(model: Any, tokenizer: Any, point: sweep.Row) -> tuple[Any, sweep.Row]:
    """The model, trained on examples that are the same for every seed."""
    config = common.config(full.FullConfig, point)
    torch.manual_seed(point["seed"])
    if rank := point["rank"]:
        model = lora.attach(model, lora.LoraConfig(rank, 2.0 * rank))
    else:
        model = full.attach(model, config)
    rows = instruction_rows("train", point["mixture"], point["rows"])
    pretraining = [text for _, text in islice(tinytown.documents(seed=0), point["rows"])]
    mixed = full.mix_replay(rows, pretraining, config.replay)
    encoded = data.encode(mixed, tokenizer, max_length=256)
    return model, common.train(model, encoded, point, extra_loss=full.penalty(model, config))


def instruction_rows(split: str, mixture: str, n: int) -> list[sweep.Row]:
    return tinytown.instruction_rows(split, n, families=NARROW if mixture == "narrow" else None)


if __name__ == "__main__":
    args = sweep.arguments(__doc__, base="tinytown", rows=500, test_rows=150, genre_rows=12)
    sweep.over_seeds(measure, [DEFAULT | condition for condition in CONDITIONS], args)
