"""How long should a prefix be, and does an MLP help to train it? The recorded sweep of 04.

Every point trains on the same examples for the same steps and is scored on the same questions as
in `lora_rank.py`. "plain" trains the keys and values themselves, "mlp" the table and the MLP
(width 256) that make them, and "text" is plain, but starts from the keys and values of real words,
the first tokens of the training set. Each kind gets learning rates of its own, found as there.
Three are tried for plain prefixes of 4, 16 and 64 tokens and for the other two kinds at 16; a
length that is not tuned takes that of the nearest one.

    python benchmarks/prefix_length.py --json benchmarks/results/prefix_length.json
"""

from __future__ import annotations

import common
import numpy as np
import sweep
import torch

from labkit import models
from labkit.techniques import prefix

HIDDEN = 256  # of the MLP
LEARNING_RATES = {
    ("plain", 4): (0.15, 0.3, 0.6),
    ("plain", 16): (0.15, 0.3, 0.6),
    ("plain", 64): (0.15, 0.3, 0.6),
    ("mlp", 16): (2e-3, 4e-3, 8e-3),
    ("text", 16): (0.15, 0.3, 0.6),
}
CONDITIONS = {  # and where their learning rates come from
    ("plain", 1): ("plain", 4),
    ("plain", 4): ("plain", 4),
    ("plain", 16): ("plain", 16),
    ("plain", 64): ("plain", 64),
    ("mlp", 4): ("mlp", 16),
    ("mlp", 16): ("mlp", 16),
    ("mlp", 64): ("mlp", 16),
    ("text", 16): ("text", 16),
}


def measure(point: sweep.Row) -> sweep.Row:
    """One run: trained and scored."""
    model, tokenizer = models.load(point["base"])
    train = common.training_set(tokenizer, point["rows"])
    kind, length = point["kind"], point["length"]
    first = np.concatenate([train[i].ids for i in range(min(len(train), length))])[:length]
    torch.manual_seed(point["seed"])
    config = prefix.PrefixConfig(length, HIDDEN if kind == "mlp" else 0)
    text = torch.from_numpy(first) if kind == "text" else None
    model = prefix.attach(model, config, text=text)
    return common.train(model, train, point) | common.scores(model, tokenizer, point["test_rows"])


def main() -> None:
    args = sweep.arguments(
        __doc__, base="tinytown", rows=2000, test_rows=200, epochs=2.0, batch_size=16
    )
    sweep.compare_tuned(measure, ("kind", "length"), LEARNING_RATES, CONDITIONS, args)


if __name__ == "__main__":
    main()
