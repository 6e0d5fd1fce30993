"""Does `memory.plan` predict a GPU's memory? LLaMA-7B, and 65B in four bits, on random weights.

Nothing is downloaded: models are made on the GPU from the published configuration, blocks in four
bits one at a time. Every case trains two steps and compares `torch.cuda.max_memory_allocated` with
the plan. Full fine-tuning keeps its states in 8 bits, paged in the last case only, as bitsandbytes
never frees paged memory. Cases in a row share a model; the extremes of each technique come first.
A case that is not planned to fit is recorded as left out, with its plan.

    python benchmarks/memory_gpu.py --json benchmarks/results/memory_gpu.json
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import sweep
import torch
from memory_cpu import ATTACH, compared, train
from transformers import AutoConfig, AutoModelForCausalLM

from labkit import memory
from labkit.techniques import qlora

OPTIMIZERS = {"full": "adamw_8bit"}
TECHNIQUES = ("qlora", "lora", "full")
EXTREMES, BETWEEN = ((1, 512), (8, 2048)), ((8, 512), (1, 2048))  # examples, tokens
_last: dict[tuple[str, str], Any] = {}  # the model of the last point


def points() -> list[dict[str, Any]]:
    names = ("model_size", "technique", "batch_size", "sequence_length", "gradient_checkpointing")
    every: list[tuple] = []
    for sizes in (EXTREMES, BETWEEN):
        cases = [(t, *size) for t in TECHNIQUES for size in sizes]
        every += [("7B", *case, again) for case in cases for again in (True, False)]
    every.insert(len(every) // 2, ("65B", "qlora", 1, 512, True))
    found = [dict(zip(names, case, strict=True)) | {"response_share": 1.0} for case in every]
    found = [p | {"optimizer": OPTIMIZERS.get(p["technique"], "adamw_torch_fused")} for p in found]
    return [*found, found[-1] | {"optimizer": "paged_adamw_8bit"}]


def build(config: Any, technique: str, settings: Any = None, device: str = "cuda") -> Any:
    """A model of random weights in bfloat16, with what `technique` adds, never whole elsewhere."""
    module, settings = ATTACH[technique][0], settings or ATTACH[technique][1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for part in (*model.model.layers, model.model.embed_tokens, model.model.norm, model.lm_head):
        part.to_empty(device=device)
        for weight in part.parameters():
            torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.02)
        if technique == "qlora" and part in model.model.layers:
            qlora.quantize_model(part, settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return module.attach(model, settings)


def shared(size: str, technique: str, make: Callable[..., Any]) -> Any:
    """The model of the point before, or else a new one, when that one is gone."""
    if (size, technique) not in _last:
        _last.clear()
        release()
        _last[size, technique] = make(AutoConfig.for_model(**memory.llama(size)), technique)
    return _last[size, technique]


def release() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # the plan counts them, so each point has its own
    torch.cuda.empty_cache()


def plan(point: dict[str, Any], device_memory: float) -> memory.Plan:
    """In a process of its own, as it needs no GPU and takes as long as a step."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options = {name: value for name, value in point.items() if name != "model_size"}
    options |= {"precision": "bf16", "device": "cuda", "device_memory": device_memory}
    return memory.plan(memory.llama(point["model_size"]), **options)


def measure(point: dict[str, Any], planned: memory.Plan) -> dict[str, Any]:
    if not planned.fits:
        return {"left_out": planned.advice, "planned_bytes": round(planned.allocated)}
    model = shared(point["model_size"], point["technique"], build)
    release()
    try:
        with memory.measured(model) as found:
            train(model, point, "bf16", optimizer=point["optimizer"], learning_rate=1e-5)
        return compared(planned, found.peak_bytes)
    except torch.cuda.OutOfMemoryError as error:
        planned_bytes = round(planned.allocated)
        return {"out_of_memory": str(error).splitlines()[0], "planned_bytes": planned_bytes}


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=0, workers=8)  # that plan; one measures
    chosen, room = sweep.selected(points(), args.only), torch.cuda.mem_get_info()[0]
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"))
    plans: dict[str, Future] = {str(point): pool.submit(plan, point, room) for point in chosen}
    pool.shutdown(wait=False)
    sweep.run(lambda point: measure(point, plans[str(point)].result()), chosen, args.json)
