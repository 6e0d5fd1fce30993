"""How much of full fine-tuning does LoRA reach, rank by rank? The recorded sweep of 02_lora.

Every point trains on the same rows for the same steps and is scored on the same questions. Each
method gets its own learning rate: the one with the least response loss on other questions of the
test split, with a seed that the comparison does not use. Three rates are tried for full
fine-tuning and for LoRA (all linear layers, alpha = 2 r) at r = 2, 8, 16 and 64; r = 1, 4 and 32
take the rate of 2, 8 and 16. Where the best is the end of its list, the list goes on by a factor
of two, at most twice. Full runs also record how much of the update's energy (squared singular
values) the first r directions hold. `stage` says whether a run is part of the comparison.

    python benchmarks/lora_rank.py --json benchmarks/results/lora_rank.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import grid
import torch

from labkit import data, evaluation, models, spectra, training
from labkit.techniques import lora

FULL = 0  # the rank that stands for full fine-tuning
RANKS = (1, 2, 4, 8, 16, 32, 64)
RATES = {
    FULL: (2.5e-4, 5e-4, 1e-3),
    2: (4e-3, 8e-3, 16e-3),
    8: (2e-3, 4e-3, 8e-3),
    16: (2e-3, 4e-3, 8e-3),
    64: (5e-4, 1e-3, 2e-3),
}
STAND_IN = {1: 2, 4: 8, 32: 16}
TUNING_SEED = 100


def measure(
    stage: str, rank: int, learning_rate: float, seed: int, base: str, rows: int, test_rows: int,
    epochs: float, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """One run: trained and scored. Rank 0 is full fine-tuning."""
    started = time.perf_counter()
    model, tokenizer = models.load(base)
    origin = spectra.weights(model) if rank == FULL and stage == "compare" else None
    if rank != FULL:
        torch.manual_seed(seed)
        model = lora.attach(model, lora.LoraConfig(rank=rank, alpha=2.0 * rank))
    config = training.TrainConfig(
        learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed
    )
    train = data.encode(data.load(limit=rows, seed=0), tokenizer, max_length=256)
    result = training.sft(model, tokenizer, train.dataset, config, progress=False)
    found = {"trainable": models.parameter_counts(model).trainable, "train_loss": result.loss}
    found |= {"steps": result.steps, "train_seconds": round(result.seconds, 2)}
    found |= score(model, tokenizer, test_rows)
    if origin is not None:
        found["energy"] = spectra.mean_energy(spectra.updates(model, origin), RANKS)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def score(model: Any, tokenizer: Any, n: int) -> dict[str, float]:
    """Accuracy on `test` and on facts about held-out people; response losses (nats a token)."""
    from labkit.tinytown import instruction_rows

    questions = data.load(split="test", limit=n)
    facts = instruction_rows("heldout_people", n, families=["fact"])
    found = {
        "accuracy": evaluation.exact(model, tokenizer, questions).accuracy,
        "facts": evaluation.exact(model, tokenizer, facts).accuracy,
    }
    asked = {row["prompt"] for row in questions}
    others = [r for r in data.load(split="test", limit=3 * n, seed=1) if r["prompt"] not in asked]
    for name, rows in {"loss": questions, "tuning_loss": others[:n]}.items():
        encoded = data.encode(rows, tokenizer, max_length=256)
        found[name] = evaluation.held_out_loss(model, encoded.dataset)
    return found


def tuned(runs: list[dict[str, Any]], rank: int) -> dict[float, float]:
    """{learning rate: loss} of the tuning runs at `rank`, in the order of the rates."""
    chosen = (run for run in runs if run["stage"] == "tune" and run["rank"] == rank)
    return dict(sorted((run["learning_rate"], run["tuning_loss"]) for run in chosen))


def beyond(losses: dict[float, float]) -> float | None:
    """The next rate to try if the best one is the first or the last of those tried."""
    rates, best = list(losses), min(losses, key=losses.__getitem__)
    return best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None


def best_rate(runs: list[dict[str, Any]], rank: int) -> float:
    """The tuned rate for `rank`, or for the rank that stands for it."""
    losses = tuned(runs, STAND_IN.get(rank, rank))
    return min(losses, key=losses.__getitem__)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--base", default="tinytown")
    p.add_argument("--rows", type=int, default=2000)
    p.add_argument("--test-rows", type=int, default=200)
    p.add_argument("--epochs", type=float, default=2.0)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    shared = dict(base=args.base, rows=args.rows, test_rows=args.test_rows)
    shared |= dict(epochs=args.epochs, batch_size=args.batch_size)

    def point(stage: str, rank: int, rate: float, seed: int) -> dict[str, Any]:
        return dict(stage=stage, rank=rank, learning_rate=rate, seed=seed, **shared)

    tuning = [point("tune", k, rate, TUNING_SEED) for k, rates in RATES.items() for rate in rates]
    settings = shared.items()
    runs = grid.run_grid(measure, tuning, args.json, args.workers)
    if others := [run for run in runs if not settings <= run.items()]:
        p.error(f"{args.json} holds {len(others)} runs with other settings; name another file")
    for _ in range(2):
        more = [(rank, beyond(tuned(runs, rank))) for rank in RATES]
        tuning = [point("tune", rank, rate, TUNING_SEED) for rank, rate in more if rate]
        if tuning:
            runs = grid.run_grid(measure, tuning, args.json, args.workers)
    compare = [
        point("compare", rank, best_rate(runs, rank), seed)
        for seed in range(args.seeds)
        for rank in (FULL, *RANKS)
    ]
    grid.run_grid(measure, compare, args.json, args.workers)


if __name__ == "__main__":
    main()
