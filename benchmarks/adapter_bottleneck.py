"""How wide must an adapter be, and how many does a layer need? The recorded sweep of 05_adapter.

Examples, questions, the base and the search for learning rates are as in `lora_rank.py`. Adapters
come after attention and MLP ("houlsby") or after the MLP only ("pfeiffer"). "random" is the
chapter's adapter, whose up projection starts random.

    python benchmarks/adapter_bottleneck.py --json benchmarks/results/adapter_bottleneck.json
"""

import math
from typing import Any

import common
import sweep
import torch

from labkit import evaluation, models
from labkit.techniques import adapter

LEARNING_RATES = {
    ("houlsby", 1): (4e-3, 8e-3),
    ("houlsby", 4): (4e-3, 8e-3),
    ("houlsby", 24): (2e-3, 4e-3),
    ("houlsby", 128): (1e-3, 2e-3),
    ("pfeiffer", 24): (2e-3, 4e-3),
    ("pfeiffer", 48): (2e-3, 4e-3),
    ("random", 24): (2e-3, 4e-3),
}


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    train = common.training_set(tokenizer, point)
    torch.manual_seed(point["seed"])
    random = point["placement"] == "random"
    placement = "houlsby" if random else point["placement"]
    model = adapter.attach(model, adapter.AdapterConfig(point["bottleneck"], placement))
    if random:
        randomize(model)
    few = [train[i] for i in range(min(len(train), 100))]
    found = {"start_loss": evaluation.held_out_loss(model, few)}
    found |= common.train(model, train, point)
    return found | common.scores(model, tokenizer, point)


def randomize(model: Any) -> None:
    """Up projections as `nn.Linear` starts them: uniform within 1 / √m."""
    for module in model.modules():
        if isinstance(module, adapter.Bottleneck):
            bound = 1 / math.sqrt(len(module.D))
            torch.nn.init.uniform_(module.U, -bound, bound)
            torch.nn.init.uniform_(module.c, -bound, bound)


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=5, **common.SETTINGS)
    sweep.over_seeds(common.baseline, [{"stage": "base"}], args)
    sweep.compare_tuned(measure, ("placement", "bottleneck"), LEARNING_RATES, None, args)
