"""How much of full fine-tuning does LoRA reach, rank by rank? The recorded sweep of 02_lora.

A seed draws training examples, initialization and test questions; under it every point trains on
the same examples for the same steps and is asked the same questions. Every rank has its own
learning rate: the one with the least response loss on questions that the comparison does not ask,
with a seed that it does not use (`sweep.compare_tuned`). LoRA is on all linear layers, alpha =
2 r. Full runs also record how much of the update's energy (squared singular values) the first r
directions hold. The stage "base" is the base untrained, behind the chat template and in its own
form.

    python benchmarks/lora_rank.py --json benchmarks/results/lora_rank.json
"""

import common
import sweep
import torch

from labkit import models, spectra
from labkit.techniques import lora

FULL = 0  # the rank that stands for full fine-tuning
RANKS = (1, 2, 4, 8, 16, 32, 64)
LEARNING_RATES = {(FULL,): (2.5e-4, 5e-4), (1,): (4e-3, 8e-3), (2,): (4e-3, 8e-3)}
LEARNING_RATES |= {(4,): (2e-3, 4e-3), (8,): (2e-3, 4e-3), (16,): (1e-3, 2e-3)}
LEARNING_RATES |= {(32,): (1e-3, 2e-3), (64,): (5e-4, 1e-3)}


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    full, rank = point["rank"] == FULL, point["rank"]
    origin = spectra.weights(model) if full and point["stage"] == "compare" else None
    if not full:
        torch.manual_seed(point["seed"])
        model = lora.attach(model, lora.LoraConfig(rank=rank, alpha=2.0 * rank))
    found = common.train(model, common.training_set(tokenizer, point), point)
    found |= common.scores(model, tokenizer, point)
    if origin is not None:
        found["energy"] = spectra.mean_energy(spectra.updates(model, origin), RANKS)
    return found


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=5, **common.SETTINGS)
    sweep.over_seeds(common.baseline, [{"stage": "base"}], args)
    sweep.compare_tuned(measure, ("rank",), LEARNING_RATES, None, args)
