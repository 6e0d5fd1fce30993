"""How fast labkit fine-tunes a model of LLaMA-7B's shape on a GPU, compared with TRL.

LoRA and QLoRA of rank 16 on all linear layers, random weights, bfloat16 arithmetic, 16 examples a
step, of lognormal lengths: mean about 300 tokens, at most 1,024, 55 % response.

    labkit            labkit.training.fit with its defaults: short examples share a row
    labkit_padded     the same with packing=False: each example has its row
    trl               TRL's SFTTrainer with its defaults
    trl_padding_free  the same with padding_free=True: the examples of a step in one long row
    trl_grouped       the same as `trl` on examples of similar length
    bare              a loop without a trainer: examples of similar length, response-only loss

Those of similar length are of 800 examples sorted, evenly spread; else all arms meet the same
examples in one order. TRL means packing and padding_free for flash-attention, which is not used
here: all attend by torch's kernels, with a mask where a row has several examples. TRL's defaults
checkpoint; here all arms do, or none. Nothing is compiled. Tokens per second, without padding, are
of all steps but the first; one with the longest examples comes before, untimed.

    python benchmarks/sft_gpu.py --json benchmarks/results/sft_gpu.json
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import sweep
import torch
import transformers
from memory_gpu import build, shared
from sft_cpu import SFTConfig, SFTTrainer, build_tokenizer

from labkit.batching import Example, Shuffled, pack
from labkit.models import base_model
from labkit.state import unchanged
from labkit.techniques.lora import LoraConfig
from labkit.techniques.qlora import QloraConfig
from labkit.training import TrainConfig, fit, sft_loss

DEVICE, BATCH, POOL, LONGEST, VOCABULARY, RATE = "cuda", 16, 800, 1024, 32_000, 1e-4
SETTINGS = {"lora": LoraConfig(rank=16), "qlora": QloraConfig(lora=LoraConfig(rank=16))}
WHERE = (("lora", False), ("qlora", True), ("qlora", False), ("lora", True))  # checkpointing
warm: set[tuple[str, bool]] = set()
Examples = Sequence[Example]


def examples(lengths: Any, seed: int) -> Iterator[Example]:
    random = np.random.default_rng(seed)
    for length in np.clip(lengths, 16, LONGEST).astype(int):
        mask = np.arange(length) >= 0.45 * length
        yield Example(random.integers(2, VOCABULARY, length), mask.astype(np.int64))


def batches(arm: str, steps: int, seed: int) -> list[list[Example]]:
    """What each step of an arm learns from."""
    random = np.random.default_rng(seed)
    every = [*examples(random.lognormal(np.log(300) - 0.245, 0.7, POOL), seed)]
    if arm in ("trl_grouped", "bare"):
        every.sort(key=lambda example: len(example.ids))
    chosen = ((np.arange(steps) + 0.5) * (POOL // BATCH) / steps).astype(int) * BATCH
    return [every[i : i + BATCH] for i in random.permutation(chosen)]


def run_labkit(model: Any, flat: Examples, again: bool, **options: Any) -> list[float]:
    ordered = dict(zip(Shuffled(len(flat), seed=0), flat, strict=True))  # fit shuffles them back
    given = [ordered[i] for i in range(len(flat))]
    options |= {"batch_size": BATCH, "learning_rate": RATE, "gradient_checkpointing": again}
    result = fit(model, given, sft_loss, TrainConfig(**options), progress=False)
    return [entry["seconds"] for entry in result.history]  # read off the device at each step


class Clock(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        torch.cuda.synchronize()
        self.times = [*getattr(self, "times", []), time.perf_counter()]


def run_trl(model: Any, flat: Examples, again: bool, **flags: Any) -> list[float]:
    rows = {"input_ids": [e.ids for e in flat], "completion_mask": [e.mask for e in flat]}
    flags |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": True}
    flags |= {"learning_rate": RATE, "num_train_epochs": 1}
    flags |= {"per_device_train_batch_size": BATCH}
    flags |= {"train_sampling_strategy": "sequential", "gradient_checkpointing": again}
    given: dict[str, Any] = {"train_dataset": datasets.Dataset.from_dict(rows)}
    given |= {"processing_class": build_tokenizer(VOCABULARY), "callbacks": [clock := Clock()]}
    with tempfile.TemporaryDirectory() as folder, unchanged(model):
        config = SFTConfig(folder, completion_only_loss=True, use_cpu=DEVICE == "cpu", **flags)
        SFTTrainer(model, config, **given).train()
    return clock.times


def run_bare(model: Any, flat: Examples, again: bool) -> list[float]:
    trained, times = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    given = [pack(flat[i : i + BATCH], packing=False) for i in range(0, len(flat), BATCH)]
    with unchanged(model):
        model.train()
        if again:
            base_model(model).activation_checkpointing_enable()
            model.enable_input_require_grads()
        for batch in [batch.to(DEVICE) for batch in given]:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss, _ = sft_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter())
    return times


ARMS: dict[str, Callable[..., list[float]]] = {"labkit": run_labkit, "trl": run_trl}
ARMS |= {"labkit_padded": partial(run_labkit, packing=False), "trl_grouped": run_trl}
ARMS |= {"trl_padding_free": partial(run_trl, padding_free=True, max_length=None), "bare": run_bare}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    technique, again = where = point["technique"], point["gradient_checkpointing"]
    given = batches(point["arm"], point["steps"], point["seed"])
    make = partial(build, settings=SETTINGS[technique], device=DEVICE)
    model = shared(point["model_size"], technique, make)
    try:
        if where not in warm:
            run_bare(model, [*examples([LONGEST] * BATCH, 0)], again)
            warm.add(where)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        times = ARMS[point["arm"]](model, sum(given, []), again)
    except torch.cuda.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    sizes = [[len(example.ids) for example in batch] for batch in given[1:]]
    found = {"tokens": sum(map(sum, sizes)), "peak_bytes": torch.cuda.max_memory_allocated()}
    found["tokens_if_padded"] = BATCH * sum(map(max, sizes))
    return found | {"tokens_per_second": round(found["tokens"] / (times[-1] - times[0]))}


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=1, workers=1, model_size="7B", steps=5)
    names = ("technique", "gradient_checkpointing", "arm")
    conditions = [dict(zip(names, (*where, arm), strict=True)) for where in WHERE for arm in ARMS]
    sweep.over_seeds(measure, conditions, args)
