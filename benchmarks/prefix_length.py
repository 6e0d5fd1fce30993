"""How long should a prefix be, and does an MLP help to train it? The recorded sweep of 04.

Examples, questions, the base and the search for learning rates are as in `lora_rank.py`. "plain"
trains the keys and values themselves, "mlp" the table and the MLP (width 256) that make them, and
"text" is plain, but starts from the keys and values of real words, the first tokens of the
training set.

    python benchmarks/prefix_length.py --json benchmarks/results/prefix_length.json
"""

import common
import numpy as np
import sweep
import torch

from labkit import models
from labkit.techniques import prefix

HIDDEN = 256  # of the MLP
LEARNING_RATES = {
    **{("plain", length): (0.3, 0.6) for length in (1, 4)},
    **{("plain", length): (0.15, 0.3) for length in (16, 64)},
    **{("mlp", length): (4e-3, 8e-3) for length in (16, 64)},
    ("text", 16): (0.15, 0.3),
}


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    train = common.training_set(tokenizer, point)
    kind, length = point["kind"], point["length"]
    words = np.concatenate([train[i].ids for i in range(min(len(train), length))])[:length]
    torch.manual_seed(point["seed"])
    config = prefix.PrefixConfig(length, HIDDEN if kind == "mlp" else 0)
    text = torch.from_numpy(words) if kind == "text" else None
    model = prefix.attach(model, config, text=text)
    return common.train(model, train, point) | common.scores(model, tokenizer, point)


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=5, **common.SETTINGS)
    sweep.over_seeds(common.baseline, [{"stage": "base"}], args)
    sweep.compare_tuned(measure, ("kind", "length"), LEARNING_RATES, None, args)
