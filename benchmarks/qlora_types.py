"""What does a base of four bits cost, by data type and block size? The recorded sweep of 03_qlora.

Every run puts the base's linear layers into one data type with one block size (scales in 8 bits),
trains LoRA on it and scores it; "none" is LoRA on the weights as they are. Examples, questions, the
base and the search for learning rates are as in `lora_rank.py`. What is trained on is Ŵ in full
precision, which is what a layer in four bits computes with: forward and gradients are equal, as
the tests show, and every type and size can be had. Recorded as well: the error of the weights,
|Ŵ - W|² over |W|² under the root, and the perplexity of the base on held-out pretraining text once
it is quantized, before anything is trained.

    python benchmarks/qlora_types.py --json benchmarks/results/qlora_types.json
"""

from typing import Any

import common
import sweep
import torch

from labkit import models
from labkit.techniques import lora, quantization

TYPES = [("none", 0), *((name, size) for size in (64, 4096) for name in ("nf4", "fp4", "int4"))]
LEARNING_RATES = dict.fromkeys(TYPES, (2e-3, 4e-3))


def measure(point: sweep.Row) -> sweep.Row:
    model, tokenizer = models.load(point["base"])
    found = {"error": 0.0, "bits": 32.0}
    if point["data_type"] != "none":
        found["error"] = quantize(model, point["data_type"], point["block_size"])
        found["bits"] = quantization.bits_per_weight(point["block_size"])
    if point["stage"] == "compare":
        found["perplexity"], _ = common.perplexity(model, tokenizer)
    torch.manual_seed(point["seed"])
    model = lora.attach(model, lora.LoraConfig(rank=8, alpha=16.0))
    found |= common.train(model, common.training_set(tokenizer, point), point)
    return found | common.scores(model, tokenizer, point)


@torch.no_grad()
def quantize(model: Any, data_type: str, block_size: int) -> float:
    """Puts Ŵ in the place of every W, and returns the relative error over all of them."""
    table, error, size = quantization.TABLES[data_type], 0.0, 0.0
    for layer in lora.find_targets(model).values():
        weight = layer.weight
        quantized = quantization.quantize(weight, table, block_size, double=True)
        approximate = quantization.dequantize(quantized, weight.shape, table, block_size)
        error += (approximate - weight).double().square().sum().item()
        size += weight.double().square().sum().item()
        weight.copy_(approximate)
    return float((error / size) ** 0.5)


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=5, **common.SETTINGS)
    sweep.over_seeds(common.baseline, [{"stage": "base"}], args)
    fields = ("data_type", "block_size")
    sweep.compare_tuned(measure, fields, LEARNING_RATES, None, args)
