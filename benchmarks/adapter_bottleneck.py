"""How wide must an adapter be, and how many does a layer need? The recorded sweep of 05_adapter.

Every point trains on the same examples for the same steps and is scored on the same questions as
in `lora_rank.py`. Adapters come after attention and MLP ("houlsby") or after the MLP only
("pfeiffer"). Learning rates are found as there, at a width of 4, 24 and 128 after both, and at 24
after the MLP only; 1 takes that of 4, and a Pfeiffer adapter that of 24. "random" is the chapter's
adapter, whose up projection starts random: trained at the learning rate of the adapter that starts
as the identity.

    python benchmarks/adapter_bottleneck.py --json benchmarks/results/adapter_bottleneck.json
"""

from __future__ import annotations

import math
from typing import Any

import common
import sweep
import torch

from labkit import evaluation, models
from labkit.techniques import adapter

LEARNING_RATES = {
    ("houlsby", 4): (4e-3, 8e-3, 16e-3),
    ("houlsby", 24): (2e-3, 4e-3, 8e-3),
    ("houlsby", 128): (1e-3, 2e-3, 4e-3),
    ("pfeiffer", 24): (2e-3, 4e-3, 8e-3),
}
CONDITIONS = {  # and where their learning rates come from
    ("houlsby", 1): ("houlsby", 4),
    ("houlsby", 4): ("houlsby", 4),
    ("houlsby", 24): ("houlsby", 24),
    ("houlsby", 128): ("houlsby", 128),
    ("pfeiffer", 24): ("pfeiffer", 24),
    ("pfeiffer", 48): ("pfeiffer", 24),
    ("random", 24): ("houlsby", 24),
}


def measure(point: sweep.Row) -> sweep.Row:
    """One run: trained and scored."""
    model, tokenizer = models.load(point["base"])
    train = common.training_set(tokenizer, point["rows"])
    torch.manual_seed(point["seed"])
    random = point["placement"] == "random"
    placement = "houlsby" if random else point["placement"]
    model = adapter.attach(model, adapter.AdapterConfig(point["bottleneck"], placement))
    if random:
        randomize(model)
    few = [train[i] for i in range(min(len(train), 100))]
    found = {"start_loss": evaluation.held_out_loss(model, few)}
    found |= common.train(model, train, point)
    return found | common.scores(model, tokenizer, point["test_rows"])


def randomize(model: Any) -> None:
    """Up projections as `nn.Linear` starts them: uniform within 1 / √m."""
    for module in model.modules():
        if isinstance(module, adapter.Bottleneck):
            bound = 1 / math.sqrt(len(module.D))
            torch.nn.init.uniform_(module.U, -bound, bound)
            torch.nn.init.uniform_(module.c, -bound, bound)


def main() -> None:
    args = sweep.arguments(
        __doc__, base="tinytown", rows=2000, test_rows=200, epochs=2.0, batch_size=16
    )
    sweep.compare_tuned(measure, ("placement", "bottleneck"), LEARNING_RATES, CONDITIONS, args)


if __name__ == "__main__":
    main()
