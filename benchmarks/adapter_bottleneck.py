"""How wide must an adapter be, and how many does a layer need? The recorded sweep of 05_adapter.

Every point trains on the same rows for the same steps and is scored on the same questions as in
`lora_rank.py`. Adapters stand after attention and MLP ("houlsby") or after the MLP only
("pfeiffer"). The learning rate is the one with the least response loss on other questions of the
test split, with a seed that the comparison does not use: three rates are tried at a width of 4,
24 and 128 after both, and at 24 after the MLP only; 1 takes the rate of 4, and a Pfeiffer adapter
that of 24. Where the best is the end of its list, the list goes on by a factor of two, at most
twice. "random" is the chapter's adapter, whose up projection starts random: trained at the rate
of the adapter that starts as the identity.

    python benchmarks/adapter_bottleneck.py --json benchmarks/results/adapter_bottleneck.json
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import grid
import torch
from lora_rank import TUNING_SEED, beyond, score

from labkit import data, evaluation, models, training
from labkit.techniques import adapter

RATES = {
    ("houlsby", 4): (4e-3, 8e-3, 16e-3),
    ("houlsby", 24): (2e-3, 4e-3, 8e-3),
    ("houlsby", 128): (1e-3, 2e-3, 4e-3),
    ("pfeiffer", 24): (2e-3, 4e-3, 8e-3),
}
COMPARED = {
    ("houlsby", 1): ("houlsby", 4),
    ("houlsby", 4): ("houlsby", 4),
    ("houlsby", 24): ("houlsby", 24),
    ("houlsby", 128): ("houlsby", 128),
    ("pfeiffer", 24): ("pfeiffer", 24),
    ("pfeiffer", 48): ("pfeiffer", 24),
    ("random", 24): ("houlsby", 24),
}


def measure(
    stage: str, placement: str, bottleneck: int, learning_rate: float, seed: int, base: str,
    rows: int, test_rows: int, epochs: float, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """One run: trained and scored. Placement "random" is houlsby with the chapter's start."""
    started = time.perf_counter()
    model, tokenizer = models.load(base)
    train = data.encode(data.load(limit=rows, seed=0), tokenizer, max_length=256)
    torch.manual_seed(seed)
    place = "houlsby" if placement == "random" else placement
    model = adapter.attach(model, adapter.AdapterConfig(bottleneck, place))
    if placement == "random":
        spoil(model)
    found = {"start_loss": evaluation.held_out_loss(model, train.dataset.select(range(100)))}
    settings = training.TrainConfig(
        learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed
    )
    result = training.sft(model, tokenizer, train.dataset, settings, progress=False)
    found |= {"trainable": models.parameter_counts(model).trainable, "train_loss": result.loss}
    found |= {"steps": result.steps, "train_seconds": round(result.seconds, 2)}
    found |= score(model, tokenizer, test_rows)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def spoil(model: Any) -> None:
    """Up projections as `nn.Linear` starts them: uniform within 1 / √m."""
    for module in model.modules():
        if isinstance(module, adapter.Bottleneck):
            bound = 1 / math.sqrt(len(module.D))
            torch.nn.init.uniform_(module.U, -bound, bound)
            torch.nn.init.uniform_(module.c, -bound, bound)


def tuned(runs: list[dict[str, Any]], placement: str, bottleneck: int) -> dict[float, float]:
    """{learning rate: loss} of the tuning runs of this adapter, in the order of the rates."""
    wanted = ("tune", placement, bottleneck)
    chosen = (r for r in runs if (r["stage"], r["placement"], r["bottleneck"]) == wanted)
    return dict(sorted((run["learning_rate"], run["tuning_loss"]) for run in chosen))


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

    def point(stage: str, placement: str, width: int, rate: float, seed: int) -> dict[str, Any]:
        return dict(stage=stage, placement=placement, bottleneck=width, learning_rate=rate,
                    seed=seed, **shared)  # fmt: skip

    tuning = [point("tune", *k, rate, TUNING_SEED) for k, rates in RATES.items() for rate in rates]
    settings = shared.items()
    runs = grid.run_grid(measure, tuning, args.json, args.workers)
    if others := [run for run in runs if not settings <= run.items()]:
        p.error(f"{args.json} holds {len(others)} runs with other settings; name another file")
    for _ in range(2):
        more = [(key, beyond(tuned(runs, *key))) for key in RATES]
        tuning = [point("tune", *key, rate, TUNING_SEED) for key, rate in more if rate]
        if tuning:
            runs = grid.run_grid(measure, tuning, args.json, args.workers)
    losses = {key: tuned(runs, *key) for key in RATES}
    best = {key: min(found, key=found.__getitem__) for key, found in losses.items()}
    compare = [
        point("compare", *key, best[stands_in], seed)
        for seed in range(args.seeds)
        for key, stands_in in COMPARED.items()
    ]
    grid.run_grid(measure, compare, args.json, args.workers)


if __name__ == "__main__":
    main()
