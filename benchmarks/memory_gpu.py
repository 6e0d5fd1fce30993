"""Does `memory.plan` predict a GPU's memory? LLaMA-7B, and 65B in four bits, on random weights.

Nothing is downloaded: models are made on the GPU from the published configuration, blocks in four
bits one at a time. Every case trains two steps and compares `torch.cuda.max_memory_allocated` with
the plan. Full fine-tuning keeps its states in paged 8 bits. A case that is not planned to fit is
recorded as left out, with its plan.

    python benchmarks/memory_gpu.py --json benchmarks/results/memory_gpu.json
"""

import gc
import itertools
from typing import Any

import sweep
import torch
from memory_cpu import ATTACH, compared, train
from transformers import AutoConfig, AutoModelForCausalLM

from labkit import memory
from labkit.techniques import qlora

OPTIMIZERS = {"full": "paged_adamw_8bit"}
CASES = [
    ("7B", *case) for case in itertools.product(("full", "lora", "qlora"), (1, 8), (512, 2048))
]


def points() -> list[dict[str, Any]]:
    names = ("model_size", "technique", "batch_size", "sequence_length", "gradient_checkpointing")
    every = [(*case, again) for case in CASES for again in (True, False)]
    every.append(("65B", "qlora", 1, 512, True))
    found = [dict(zip(names, case, strict=True)) | {"response_share": 1.0} for case in every]
    return [p | {"optimizer": OPTIMIZERS.get(p["technique"], "adamw_torch_fused")} for p in found]


def build(config: Any, technique: str, device: str = "cuda") -> Any:
    """A model of random weights in bfloat16, with what `technique` adds, never whole elsewhere."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for part in (*model.model.layers, model.model.embed_tokens, model.model.norm, model.lm_head):
        part.to_empty(device=device)
        for weight in part.parameters():
            torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.02)
        if technique == "qlora" and part in model.model.layers:
            qlora.quantize_model(part, ATTACH["qlora"][1])
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return ATTACH[technique][0].attach(model, ATTACH[technique][1])


def measure(point: dict[str, Any]) -> dict[str, Any]:
    config = AutoConfig.for_model(**memory.llama(point["model_size"]))
    options = {name: value for name, value in point.items() if name != "model_size"}
    planned = memory.plan(config, **options, precision="bf16", device="cuda")
    if not planned.fits:
        return {"left_out": planned.advice, "planned_bytes": round(planned.allocated)}
    model = build(config, point["technique"])
    try:
        with memory.measured(model) as found:
            train(model, point, "bf16", optimizer=point["optimizer"], learning_rate=1e-5)
        return compared(planned, found.peak_bytes)
    except torch.cuda.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=0, workers=1)
    sweep.run(measure, sweep.selected(points(), args.only), args.json)
