"""Does the planner foretell the memory of labkit's trainer on a CPU? The embedded model, a grid.

Every point trains two steps on rows of equal length and compares the allocator's own peak, kept by
torch's profiler, with `memory.plan`. `error` is planned over measured, less 1; the framework
(Python and its libraries), which no allocator sees, is on neither side.

    python benchmarks/memory_cpu.py --json benchmarks/results/memory_cpu.json
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import datasets
import grid
import numpy as np

from labkit import memory, models, training
from labkit.techniques import adapter, full, lora, prefix, qlora

ROOMS: dict[str, tuple[Any, Any]] = {
    "full": (full, full.FullConfig()),
    "lora": (lora, lora.LoraConfig()),
    "qlora": (qlora, qlora.QloraConfig()),
    "prefix": (prefix, prefix.PrefixConfig()),
    "adapter": (adapter, adapter.AdapterConfig()),
}
SIZES = ((1, 64), (1, 256), (4, 100), (8, 64), (8, 256), (32, 64), (2, 480))  # rows, tokens
SHARES = (1.0, 0.2)  # of the tokens, those that the loss falls on
PRECISIONS = {"mixed": "bf16", "fp32": "fp32"}  # the planner's name: the trainer's


def rows(count: int, tokens: int, entries: int, share: float) -> datasets.Dataset:
    """Random rows of equal length; the end of each is the response."""
    ids = np.random.default_rng(0).integers(10, entries, size=(count, tokens)).tolist()
    said = round((tokens - 1) * share)
    mask = [0] * (tokens - said) + [1] * said
    return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": [mask] * count})


def measure(
    technique: str, precision: str, batch_size: int, sequence_length: int, checkpointing: bool,
    response_share: float,
) -> dict[str, Any]:  # fmt: skip
    """One point: planned before, measured after."""
    model, tokenizer = models.load("tinytown", device="cpu")
    planned = memory.plan(
        model, technique, precision=precision, batch_size=batch_size, device="cpu",
        sequence_length=sequence_length, gradient_checkpointing=checkpointing,
        response_share=response_share,
    )  # fmt: skip
    room, config = ROOMS[technique]
    model = room.attach(model, config)
    settings = training.TrainConfig(
        batch_size=batch_size, max_steps=2, gradient_checkpointing=checkpointing,
        precision=PRECISIONS[precision],
    )  # fmt: skip
    text = rows(4 * batch_size, sequence_length, planned.shape.vocabulary, response_share)
    with memory.measured(model) as found:
        training.sft(model, tokenizer, text, settings, progress=False)
    return compare(planned, found.peak_bytes)


def compare(planned: memory.Plan, peak_bytes: int) -> dict[str, Any]:
    """A row of the results."""
    return {
        "peak_bytes": peak_bytes,
        "planned_bytes": round(planned.allocated),
        "error": round(planned.allocated / peak_bytes - 1, 4),
        "moment": planned.moment,
        "parts": {name: round(size) for name, size in planned.parts.items() if size},
    }


def points() -> list[dict[str, Any]]:
    grid_ = itertools.product(ROOMS, PRECISIONS, SIZES, (False, True), SHARES)
    return [
        dict(
            technique=technique, precision=precision, batch_size=batch, sequence_length=tokens,
            checkpointing=checkpointing, response_share=share,
        )
        for technique, precision, (batch, tokens), checkpointing, share in grid_
        if not (checkpointing and technique == "prefix")
    ]  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    runs = grid.run_grid(measure, points(), args.json, args.workers)
    errors = [abs(run["error"]) for run in runs]
    print(f"{len(runs)} runs: mean error {np.mean(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()
