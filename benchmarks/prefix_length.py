"""How long should a prefix be, and does an MLP help to train it? The recorded sweep of 04.

Every point trains on the same rows for the same steps and is scored on the same questions as in
`lora_rank.py`. "plain" trains the keys and values themselves, "mlp" the table and the MLP (width
256) that make them, and "text" is plain, but starts from the keys and values of real words, the
first tokens of the training rows. Each kind gets learning rates of its own: those with the least
response loss on other questions of the test split, with a seed that the comparison does not use.
Three rates are tried for plain prefixes of 4, 16 and 64 tokens and for the other two kinds at 16;
a length that is not tuned takes the rate of the nearest one. Where the best is the end of its
list, the list goes on by a factor of two, at most twice.

    python benchmarks/prefix_length.py --json benchmarks/results/prefix_length.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import grid
import torch
from lora_rank import TUNING_SEED, beyond, score

from labkit import data, models, training
from labkit.techniques import prefix

HIDDEN = 256  # of the MLP
RATES = {
    ("plain", 4): (0.15, 0.3, 0.6),
    ("plain", 16): (0.15, 0.3, 0.6),
    ("plain", 64): (0.15, 0.3, 0.6),
    ("mlp", 16): (2e-3, 4e-3, 8e-3),
    ("text", 16): (0.15, 0.3, 0.6),
}
COMPARED = {
    ("plain", 1): ("plain", 4),
    ("plain", 4): ("plain", 4),
    ("plain", 16): ("plain", 16),
    ("plain", 64): ("plain", 64),
    ("mlp", 4): ("mlp", 16),
    ("mlp", 16): ("mlp", 16),
    ("mlp", 64): ("mlp", 16),
    ("text", 16): ("text", 16),
}


def measure(
    stage: str, kind: str, length: int, learning_rate: float, seed: int, base: str, rows: int,
    test_rows: int, epochs: float, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """One run: trained and scored."""
    started = time.perf_counter()
    model, tokenizer = models.load(base)
    train = data.encode(data.load(limit=rows, seed=0), tokenizer, max_length=256)
    words = [token for row in train.dataset["input_ids"][: length + 1] for token in row]
    text = torch.tensor(words[:length]) if kind == "text" else None
    torch.manual_seed(seed)
    config = prefix.PrefixConfig(length, HIDDEN if kind == "mlp" else 0)
    model = prefix.attach(model, config, text=text)
    settings = training.TrainConfig(
        learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed
    )
    result = training.sft(model, tokenizer, train.dataset, settings, progress=False)
    found = {"trainable": models.parameter_counts(model).trainable, "train_loss": result.loss}
    found |= {"steps": result.steps, "train_seconds": round(result.seconds, 2)}
    found |= score(model, tokenizer, test_rows)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def tuned(runs: list[dict[str, Any]], kind: str, length: int) -> dict[float, float]:
    """{learning rate: loss} of the tuning runs of this kind and length, in rate order."""
    chosen = (r for r in runs if (r["stage"], r["kind"], r["length"]) == ("tune", kind, length))
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

    def point(stage: str, kind: str, length: int, rate: float, seed: int) -> dict[str, Any]:
        return dict(stage=stage, kind=kind, length=length, learning_rate=rate, seed=seed, **shared)

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
