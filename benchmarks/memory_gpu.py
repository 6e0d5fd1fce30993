"""Does the planner foretell a GPU's memory? LLaMA-7B, and 65B in four bits, on random weights.

Nothing is downloaded: models are made on the GPU from the published configuration, blocks in four
bits one at a time. Every case trains two steps of labkit's trainer on rows of equal length and
compares `torch.cuda.max_memory_allocated` with `memory.plan`; `error` is planned over measured,
less 1. Full fine-tuning takes AdamW, or where that does not fit its paged 8-bit form. A case that
is not planned to fit is recorded as left out, with its plan.

    python benchmarks/memory_gpu.py --json benchmarks/results/memory_gpu.json
    python benchmarks/memory_gpu.py --plan-only --memory 80      # no GPU needed
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from memory_cpu import ROOMS, compare, rows
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from labkit import machine, memory, models, tracking, training
from labkit.memory.chapter import llama
from labkit.techniques import lora, qlora

RANK, CONTEXT = 16, 2048
LORA = lora.LoraConfig(rank=RANK)
CONFIGS = {"full": ROOMS["full"][1], "lora": LORA, "qlora": qlora.QloraConfig(LORA)}
OPTIMIZERS = ("adamw_torch_fused", "paged_adamw_8bit")


def cases() -> list[dict[str, Any]]:
    seven = itertools.product(CONFIGS, (1, 8), (512, 2048), (True, False))
    return [
        dict(size="7B", technique=t, batch_size=b, sequence_length=s, gradient_checkpointing=c)
        for t, b, s, c in seven
    ] + [dict(size="65B", technique="qlora", batch_size=1, sequence_length=512,
              gradient_checkpointing=True)]  # fmt: skip


def planned(case: dict[str, Any], device_memory: float) -> tuple[str, memory.Plan]:
    """The first optimizer with which the case fits, or the last, and the plan."""
    settings = {name: value for name, value in case.items() if name != "size"}
    for optimizer in OPTIMIZERS:
        plan = memory.plan(
            config(case["size"]), **settings, optimizer=optimizer, precision="bf16", rank=RANK,
            device="cuda", device_memory=device_memory,
        )  # fmt: skip
        if plan.fits or case["technique"] != "full":
            break
    return optimizer, plan


def config(size: str) -> Any:
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return AutoConfig.for_model(**llama(size), max_position_embeddings=CONTEXT, **ids)


def build(size: str, technique: str, device: str = "cuda", layers: int | None = None) -> Any:
    """A model of random weights in bfloat16, with what `technique` adds, never whole elsewhere."""
    shape = config(size)
    shape.num_hidden_layers = layers or shape.num_hidden_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    for block in model.model.layers:
        fill(block, device)
        if technique == "qlora":
            qlora.quantize_model(block, CONFIGS["qlora"])
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        fill(part, device)
    model.model.rotary_emb = type(model.model.rotary_emb)(shape).to(device)
    return ROOMS[technique][0].attach(model, CONFIGS[technique])


@torch.no_grad()
def fill(part: torch.nn.Module, device: str) -> None:
    part.to_empty(device=device)
    for weight in part.parameters():
        weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(std=0.02)


def tokenizer() -> PreTrainedTokenizerFast:
    """Only its special tokens are used: the rows are made of ids."""
    core = Tokenizer(tokenizer_models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def measure(case: dict[str, Any], optimizer: str, plan: memory.Plan) -> dict[str, Any]:
    """Two steps; the second has gradients, states and activations at once."""
    model = build(case["size"], case["technique"])
    settings = training.TrainConfig(
        batch_size=case["batch_size"], max_steps=2, optimizer=optimizer, learning_rate=1e-5,
        gradient_checkpointing=case["gradient_checkpointing"], precision="bf16",
    )  # fmt: skip
    text = rows(2 * case["batch_size"], case["sequence_length"], plan.shape.vocabulary, 1.0)
    with memory.measured(model) as found:
        training.sft(model, tokenizer(), text, settings, progress=False)
    counted = models.parameter_counts(model).trainable
    reserved = torch.cuda.max_memory_reserved()
    return compare(plan, found.peak_bytes) | {"trainable": counted, "reserved_bytes": reserved}


def run(case: dict[str, Any], device_memory: float, plan_only: bool) -> dict[str, Any]:
    optimizer, plan = planned(case, device_memory)
    row = case | {"optimizer": optimizer, "planned_bytes": round(plan.allocated)}
    if not plan.fits:
        return row | {"left_out": plan.advice}
    if plan_only:
        return row
    try:
        return row | measure(case, optimizer, plan)
    except torch.cuda.OutOfMemoryError as error:
        return row | {"out_of_memory": str(error).splitlines()[0]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--plan-only", action="store_true", help="print the plans; needs no GPU")
    p.add_argument("--memory", type=float, help="of the GPU, in GB; default: what is free")
    p.add_argument("--only", help="cases whose size or technique this is, such as 7B or qlora")
    p.add_argument("--json", type=Path, help="write the results here")
    args = p.parse_args()
    if not args.plan_only and not torch.cuda.is_available():
        p.error("torch sees no GPU here; --plan-only prints the plans")
    free = args.memory * 1e9 if args.memory else memory.allocator.free("cuda")
    if free is None:
        p.error("no GPU here to ask for its memory; give --memory")
    found = []
    for case in cases():
        if args.only in (None, case["size"], case["technique"]):
            found.append(run(case, free, args.plan_only))
            print(json.dumps(found[-1]), flush=True)
            if args.json:
                write(args.json, found, free)


def write(file: Path, runs: list[dict[str, Any]], free: float) -> None:
    head = {"hardware": machine.hardware(), "versions": machine.versions(), "free_bytes": free}
    file.parent.mkdir(parents=True, exist_ok=True)
    tracking.write_text(file, json.dumps(head | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
