"""Does `memory.plan` predict what labkit's training takes on a CPU? The embedded model, a grid.

Every point makes two updates on random examples of equal length and compares the allocator's own
peak, kept by torch's profiler, with the plan. `error` is planned over measured, less 1; the runtime
overhead, which no allocator sees, is on neither side. PPO is measured without sampling.

    python benchmarks/memory_cpu.py --json benchmarks/results/memory_cpu.json
"""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import sweep
import torch

from labkit import memory, models, training
from labkit.batching import Example
from labkit.techniques import adapter, full, lora, ppo, prefix, qlora, reward, rollout

ATTACH: dict[str, Any] = {
    "full": (full, full.FullConfig()),
    "lora": (lora, lora.LoraConfig()),
    "qlora": (qlora, qlora.QloraConfig()),
    "prefix": (prefix, prefix.PrefixConfig(length=20)),
    "adapter": (adapter, adapter.AdapterConfig(bottleneck=64)),
}
SIZES = ((1, 64), (1, 256), (4, 100), (8, 64), (8, 256), (32, 64), (2, 480))  # examples, tokens
PRECISIONS = {"mixed": "bf16", "fp32": "fp32"}  # the planner's name: the trainer's


def points() -> list[dict[str, Any]]:
    techniques = (*ATTACH, "reward", "ppo")
    names = ("technique", "precision", "size", "gradient_checkpointing", "response_share")
    every = itertools.product(techniques, PRECISIONS, SIZES, (False, True), (1.0, 0.2))
    found = [dict(zip(names, point, strict=True)) for point in every]
    without = ("prefix", "ppo", "reward")  # gradient checkpointing
    plain = [p for p in found if p["technique"] not in without or not p[names[3]]]
    return [
        p | {"batch_size": p["size"][0], "sequence_length": p.pop("size")[1]}
        for p in plain
        if p["technique"] != "reward" or p["response_share"] == 1.0
    ]


def examples(count: int, tokens: int, share: float = 1.0) -> list[Example]:
    """Random examples of equal length; the end of each is the response."""
    ids = np.random.default_rng(0).integers(10, 1000, size=(count, tokens))
    mask = np.arange(tokens) >= tokens - max(1, round((tokens - 1) * share))
    return [Example(row, mask.astype(np.int64)) for row in ids]


def update_policy(model: Any, batch: list[Example], precision: str) -> None:
    """PPO's scores of a rollout of one minibatch, and two updates."""
    config = ppo.PPOConfig(batch_size=len(batch), minibatch_size=len(batch), epochs=2)
    models.use_float32_attention(model)
    policy = rollout.PolicyWithValue(full.attach(model, full.FullConfig()), precision=precision)
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-5, eps=1e-5, fused=True)
    length = int(batch[0].mask[1:].sum())
    for _ in range(2):
        scores = policy.score(policy.pack(batch), 1.0).view(len(batch), length, 4).unbind(-1)
        names = ("logp", "ref_logp", "values", "entropy")
        found: Any = SimpleNamespace(
            **dict(zip(names, scores, strict=True)),
            rewards=torch.randn(len(batch)),
            ended=torch.ones(len(batch), dtype=torch.bool),
            mask=torch.ones(len(batch), length, dtype=torch.bool),
            examples=batch,
        )
        ppo.update(policy, found, config, optimizer)


def train(model: Any, point: dict[str, Any], precision: str, **options: Any) -> None:
    """Two updates with the examples of a point."""
    technique, size = point["technique"], point["batch_size"]
    batch = examples(2 * size, point["sequence_length"], point["response_share"])
    if technique == "ppo":
        return update_policy(model, batch[:size], precision)
    config = training.TrainConfig(
        batch_size=size,
        max_steps=2,
        precision=precision,
        gradient_checkpointing=point["gradient_checkpointing"],
        **options,
    )
    if technique == "reward":
        scorer = reward.Scorer(reward.with_head(model, SimpleNamespace(pad_token_id=0)))
        given, loss, collate = [[e, e] for e in batch], reward.ranking_loss, reward.pack_rankings
        training.fit(scorer, given, loss, config, collate=collate, progress=False)
    else:
        training.fit(model, batch, training.sft_loss, config, progress=False)


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """One point: planned before, measured after."""
    model, _ = models.load("tinytown", device="cpu")
    planned = memory.plan(model, device="cpu", **point)
    if point["technique"] in ATTACH:
        module, config = ATTACH[point["technique"]]
        model = module.attach(model, config)
    with memory.measured(model) as found:
        train(model, point, PRECISIONS[point["precision"]])
    return compared(planned, found.peak_bytes)


def compared(planned: memory.Plan, peak_bytes: int) -> dict[str, Any]:
    error = round(planned.allocated / peak_bytes - 1, 4)
    return {"peak_bytes": peak_bytes, "planned_bytes": round(planned.allocated), "error": error}


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=0)
    runs = sweep.run(measure, sweep.selected(points(), args.only), args.json, args.workers)
    errors = [abs(run["error"]) for run in runs]
    print(f"{len(runs)} runs: mean error {np.mean(errors):.1%}, largest {max(errors):.1%}")
