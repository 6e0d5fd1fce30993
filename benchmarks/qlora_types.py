"""What does a base of four bits cost, by data type and block size? The recorded sweep of 03_qlora.

Every run puts the base's linear layers into one data type with one block size (constants in 8
bits), trains LoRA on it and scores it; "none" is LoRA on the weights as they are. All runs see the
same rows for the same steps at the same settings, and are scored on the same questions. What is
trained on is Ŵ in full precision, which is what a layer in four bits computes with: forward and
gradients are equal, as the tests show, and every type and size can be had. Recorded as well:
the error of the weights, |Ŵ - W|² over |W|² under the root, and the perplexity of the base on
held-out pretraining text once it is quantized, before anything is trained.

    python benchmarks/qlora_types.py --json benchmarks/results/qlora_types.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import grid
import torch

from labkit import data, evaluation, models, quantization, training
from labkit.techniques import lora

TYPES = ("nf4", "fp4", "int4")
BLOCK_SIZES = (64, 512, 4096)
RANK = 8


def measure(
    data_type: str, block_size: int, seed: int, base: str, rows: int, test_rows: int,
    epochs: float, batch_size: int, learning_rate: float,
) -> dict[str, Any]:  # fmt: skip
    """One run: quantized, measured, trained, scored."""
    started = time.perf_counter()
    model, tokenizer = models.load(base)
    found = {"error": 0.0, "bits": 32.0}
    if data_type != "none":
        found["error"] = round_trip(model, data_type, block_size)
        found["bits"] = quantization.bits_per_weight(block_size)
    found["perplexity"] = perplexity(model, tokenizer)
    torch.manual_seed(seed)
    model = lora.attach(model, lora.LoraConfig(rank=RANK, alpha=2.0 * RANK))
    config = training.TrainConfig(
        learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed
    )
    train = data.encode(data.load(limit=rows, seed=0), tokenizer, max_length=256)
    result = training.sft(model, tokenizer, train.dataset, config, progress=False)
    found |= {"train_loss": result.loss, "steps": result.steps}
    found |= score(model, tokenizer, test_rows)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


@torch.no_grad()
def round_trip(model: Any, data_type: str, block_size: int) -> float:
    """Puts Ŵ in the place of every W, and returns the relative error over all of them."""
    table, off, size = quantization.TABLES[data_type](), 0.0, 0.0
    for layer in lora.find_targets(model).values():
        weight = layer.weight
        stored = quantization.store(weight, table, block_size, double=True)
        rebuilt = quantization.rebuild(stored, weight.shape, table, block_size)
        off += (rebuilt - weight).double().square().sum().item()
        size += weight.double().square().sum().item()
        weight.copy_(rebuilt)
    return float((off / size) ** 0.5)


def perplexity(model: Any, tokenizer: Any) -> float:
    """On held-out pretraining text: the geometric mean over the genres."""
    from labkit.tinytown import genre_samples

    genres = evaluation.perplexity_by(model, tokenizer, genre_samples(12))
    return statistics.geometric_mean(genres.values())


def score(model: Any, tokenizer: Any, n: int) -> dict[str, float]:
    """Accuracy on `test` and on facts about held-out people; response loss (nats a token)."""
    from labkit.tinytown import instruction_rows

    questions = data.load(split="test", limit=n)
    facts = instruction_rows("heldout_people", n, families=["fact"])
    encoded = data.encode(questions, tokenizer, max_length=256)
    return {
        "accuracy": evaluation.exact(model, tokenizer, questions).accuracy,
        "facts": evaluation.exact(model, tokenizer, facts).accuracy,
        "loss": evaluation.held_out_loss(model, encoded.dataset),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--base", default="tinytown")
    p.add_argument("--rows", type=int, default=2000)
    p.add_argument("--test-rows", type=int, default=200)
    p.add_argument("--epochs", type=float, default=2.0)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--learning-rate", type=float, default=4e-3)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    shared = dict(base=args.base, rows=args.rows, test_rows=args.test_rows, epochs=args.epochs)
    shared |= dict(batch_size=args.batch_size, learning_rate=args.learning_rate)
    arms = [("none", 0), *((name, size) for size in BLOCK_SIZES for name in TYPES)]
    points = [
        dict(data_type=name, block_size=size, seed=seed, **shared)
        for seed in range(args.seeds)
        for name, size in arms
    ]
    grid.run_grid(measure, points, args.json, args.workers)


if __name__ == "__main__":
    main()
