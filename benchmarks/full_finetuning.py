"""What should full fine-tuning be given, and what does it forget? The sweeps of 01_full_finetuning.

Every run is scored on test questions of its own mixture and by perplexity on held-out pretraining
text, genre by genre; a seed draws examples, initialization and questions. Two mixtures: `all` holds
every task, facts of the town among them, so that it rehearses some of what pretraining taught;
`narrow` holds three tasks that mention nothing of the town. Stages:

- `base`: nothing is trained; asked behind the chat template, and as the base knows it (`_own`).
- `rate`: learning rates from 1e-5 to 1e-2 (pretraining's was 3e-3), on `all`; the low ones also for
  four times as many epochs, since few steps at a low rate are no fair trial of it.
- `dial`: batch size (for as many steps as the default has), epochs, warmup and weight decay around
  the default, one at a time, on `all`; each batch size and number of epochs at a learning rate of
  its own, warmup and decay at the default's.
- `remedy`: on `narrow`, because forgetting should show most where nothing is rehearsed. Plain
  fine-tuning, the L2-SP penalty and replay at the rate found for plain, lower rates, and frozen
  layers and LoRA at rates of their own. `tuning_…` are scores on other questions and texts than
  those of the comparison, to choose the strength of a remedy by.
- `tune`: the search for those rates (`sweep.best_rates`).

    python benchmarks/full_finetuning.py --json benchmarks/results/full_finetuning.json
"""

import math
from itertools import islice
from typing import Any

import common
import sweep
import torch

from labkit import data, models, tinytown
from labkit.techniques import full, lora

NARROW = ("sentiment", "arithmetic", "polite")
TRAINING = {"batch_size": 16, "epochs": 3.0, "max_steps": -1}
TRAINING |= {"warmup_ratio": 0.1, "weight_decay": 0.01}
TECHNIQUE = {"alpha": 0.0, "replay": 0.0, "frozen_layers": 0, "frozen_embeddings": False, "rank": 0}
ALL: sweep.Row = {"mixture": "all"} | TRAINING | TECHNIQUE
NARROWED: sweep.Row = ALL | {"mixture": "narrow"}
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LONGER = ALL | {"epochs": 4 * ALL["epochs"]}
BATCH_SIZES = (2, 4, 32, 64)
EPOCHS = (1.0, 10.0)
AT_DEFAULT = {"warmup_ratio": (0.0, 0.2, 0.5), "weight_decay": (0.0, 0.1, 1.0)}
FROZEN, LORA = {"frozen_layers": 2, "frozen_embeddings": True}, {"rank": 8}
PENALTIES = [{"alpha": alpha} for alpha in (1e3, 1e4, 1e5, 1e6)]
REPLAYS = [{"replay": share} for share in (0.05, 0.2)]


def dials(rows: int) -> dict[sweep.Key, sweep.Row]:
    """The default, and what differs from it and has a learning rate of its own."""
    steps = int(ALL["epochs"]) * math.ceil(rows / ALL["batch_size"])
    found = {("default", 0): ALL}
    for size in BATCH_SIZES:
        found["batch_size", size] = ALL | {"batch_size": size, "max_steps": steps}
    return found | {("epochs", epochs): ALL | {"epochs": epochs} for epochs in EPOCHS}


def conditions(args: Any) -> list[sweep.Row]:
    """All that is compared; looks for the learning rates first."""
    own = {key: {"stage": "dial"} | row for key, row in dials(args.rows).items()}
    own |= {("plain", 0): {"stage": "remedy"} | NARROWED}
    own |= {("frozen layers", 2): own["plain", 0] | FROZEN, ("LoRA", 8): own["plain", 0] | LORA}
    own = {key: row for key, row in own.items() if sweep.selected([row], args.only)}
    rates = {key: (2e-3, 4e-3) if key[0] == "LoRA" else (2.5e-4, 5e-4) for key in own}
    best = sweep.best_rates(measure, own, rates, args)
    found = [{"stage": "base", "mixture": mixture} for mixture in ("all", "narrow")]
    found += [ALL | {"stage": "rate", "learning_rate": rate} for rate in LEARNING_RATES]
    found += [LONGER | {"stage": "rate", "learning_rate": rate} for rate in LEARNING_RATES[1:5]]
    found += [row | {"name": k[0], "learning_rate": best[k]} for k, row in own.items()]
    if default := best.get(("default", 0)):
        at = {"stage": "dial", "learning_rate": default} | ALL
        for name, values in AT_DEFAULT.items():
            found += [at | {"name": name, name: value} for value in values]
    if plain := best.get(("plain", 0)):
        at = own["plain", 0] | {"learning_rate": plain}
        found += [at | {"name": "L2-SP"} | penalty for penalty in PENALTIES]
        found += [at | {"name": "replay"} | replay for replay in REPLAYS]
        lower = ({"learning_rate": plain / by} for by in (3, 10))
        found += [at | {"name": "lower learning rate"} | rate for rate in lower]
    return found


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    stage, families = point["stage"], NARROW if point["mixture"] == "narrow" else None
    found: sweep.Row = {}
    if stage != "base":
        model, found = train(model, tokenizer, point, families)
    others = common.questions(point, tuning=True, families=families)
    found["tuning_loss"] = common.response_loss(model, tokenizer, others)
    if stage == "tune":
        return found
    questions, texts = common.questions(point, families=families), point["genre_rows"]
    found |= common.accuracy("accuracy", model, tokenizer, questions)
    found["loss"] = common.response_loss(model, tokenizer, questions)
    found["perplexity"], genres = common.perplexity(model, tokenizer, texts)
    if stage == "base":
        found |= common.accuracy_own("accuracy", model, tokenizer, questions)
    if stage == "remedy":
        found |= common.accuracy("tuning_accuracy", model, tokenizer, others)
        found["tuning_perplexity"], _ = common.perplexity(model, tokenizer, texts, first=texts)
    return found | {"genres": {name: round(value, 4) for name, value in genres.items()}}


def train(model: Any, tokenizer: Any, point: sweep.Row, families: Any) -> tuple[Any, sweep.Row]:
    config, seed = common.config(full.FullConfig, point), point["seed"]
    torch.manual_seed(seed)
    if rank := point["rank"]:
        model = lora.attach(model, lora.LoraConfig(rank, 2.0 * rank))
    else:
        model = full.attach(model, config)
    rows = tinytown.instruction_rows("train", point["rows"], seed, families=families)
    part = islice(tinytown.documents(0), seed * len(rows), (seed + 1) * len(rows))
    pretraining = [text for _, text in part] if config.replay else []
    mixed = full.mix_replay(rows, pretraining, config.replay, seed)
    encoded = data.encode(mixed, tokenizer)
    return model, common.train(model, encoded, point, extra_loss=full.penalty(model, config))


if __name__ == "__main__":
    args = sweep.arguments(__doc__, base="tinytown", rows=400, test_rows=300, genre_rows=12)
    sweep.over_seeds(measure, conditions(args), args)
