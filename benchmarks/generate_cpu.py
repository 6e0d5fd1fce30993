"""How fast labkit generates on a CPU, compared with transformers' `generate` in padded batches.

Conditions, interleaved on the same prompts of the embedded base, from texts to texts:

    generate        the model's own `generate` as a user would call it: a tokenizer that pads on the
                    left, prompts in batches of `--batch` in the order in which they come
    generate_sorted the same, prompts sorted by length before (the user's best case)
    labkit          the sampler of labkit.generate, batches of the same size; it sorts by itself

each with the most probable token (`greedy`) and at temperature 1 (`sampled`). Every condition has
one thread (`--threads`), float32 weights, the same EOS, and the same greatest length. Speed is in
response tokens per second, padding and what stands after an EOS not counted. Greedy responses must
be equal but for rounding; how many are is shown. Sampled ones are other random texts, so their
number of tokens differs. Ratios are medians over rounds. Needs a quiet machine, a few minutes:
`python benchmarks/generate_cpu.py --json out.json`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers

from labkit import generate, models, record, templates, tinytown
from labkit.tinytown.tasks import in_own_form

GOAL = 1.5
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--prompts", type=int, default=256)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--tokens", type=int, default=64, help="greatest length of a response")
    p.add_argument("--threads", type=int, default=1, help="0: as many as torch takes")
    p.add_argument("--model", default="tinytown", help="folder of a causal LM")
    p.add_argument("--json", type=Path, help="write the results here")
    return p.parse_args()


def build_prompts(tokenizer: Any, count: int) -> list[str]:
    """Questions in the form in which the base knows them: it answers, and goes on with others."""
    rows = in_own_form(tinytown.instruction_rows("test", count, seed=0))
    render = templates.renderer(tokenizer, "bare")
    return [render(row)[0] for row in rows]


def library(
    model: Any, tokenizer: Any, prompts: Sequence[str], temperature: float, seed: int, size: Any
) -> list[list[int]]:
    """Response ids by transformers' `generate`, in batches padded on the left."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": size.tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    found: list[list[int]] = []
    for start in range(0, len(prompts), size.batch):
        batch = prompts[start : start + size.batch]
        inputs = tokenizer(list(batch), return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(ids, skip_special_tokens=True)
        found += ids.tolist()
    return found


def sorted_library(model, tokenizer, prompts, temperature, seed, size) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ids = library(model, tokenizer, [prompts[i] for i in order], temperature, seed, size)
    back = dict(zip(order, ids, strict=True))
    return [back[i] for i in range(len(prompts))]


def labkit(model, tokenizer, prompts, temperature, seed, size) -> list[list[int]]:
    """Response ids by labkit's sampler; the same calls as in `labkit.generate.generate`."""
    ids = templates.tokenize(prompts, tokenizer)
    ends = models.eos_ids(model, tokenizer)
    options = {"max_new_tokens": size.tokens, "batch_size": size.batch, "ends": ends}
    options["uniforms"] = np.random.default_rng(seed).random((len(ids), size.tokens))
    found = generate.sample(model, ids, temperature=temperature, **options)
    generate.texts(tokenizer, found, ends)
    return found


CONDITIONS: dict[str, Callable] = {
    "generate": library,
    "generate_sorted": sorted_library,
    "labkit": labkit,
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = models.load(options.model, device="cpu")
    ends = models.eos_ids(model, tokenizer)
    model.generation_config.eos_token_id = sorted(ends)  # the same for all
    tokenizer.padding_side = "left"
    prompts = build_prompts(tokenizer, options.prompts)
    result: dict[str, Any] = {"tokens_per_second": {}, "tokens": {}, "seconds": {}}
    greedy: dict[str, list[list[int]]] = {}
    for condition in CONDITIONS.values():  # warm-up
        condition(model, tokenizer, prompts[: options.batch], 0.0, 0, options)
    for number in range(options.rounds):
        for kind, temperature in TEMPERATURES.items():
            names = list(CONDITIONS)[number % 3 :] + list(CONDITIONS)[: number % 3]
            for name in names:
                start = time.perf_counter()
                ids = CONDITIONS[name](model, tokenizer, prompts, temperature, number, options)
                seconds = time.perf_counter() - start
                ids = [until_end(response, ends) for response in ids]
                tokens = sum(map(len, ids))
                values = {"tokens_per_second": tokens / seconds}
                values |= {"tokens": tokens, "seconds": seconds}
                for key, value in values.items():
                    result[key].setdefault(kind, {}).setdefault(name, []).append(value)
                if temperature == 0:
                    greedy[name] = ids
                print(
                    f"round {number + 1} {kind:8} {name:16}{tokens / seconds:8.0f} tokens/s"
                    f"{tokens:7} tokens{seconds:7.2f} s",
                    flush=True,
                )
    same = [a == b for a, b in zip(greedy["labkit"], greedy["generate"], strict=True)]
    return result | {"equal_greedy": sum(same) / len(same)}


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first EOS."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), None)]


def summarize(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    ratios: dict[str, dict[str, float]] = {}
    for kind, speeds in result["tokens_per_second"].items():
        for name in ("generate", "generate_sorted"):
            each = [a / b for a, b in zip(speeds["labkit"], speeds[name], strict=True)]
            ratios.setdefault(f"labkit_over_{name}", {})[kind] = statistics.median(each)
    result["by_kind"] = ratios
    # The worse of greedy and sampled.
    result |= {name: min(found.values()) for name, found in ratios.items()}
    settings = ("rounds", "prompts", "batch", "tokens")
    result["settings"] = {name: getattr(options, name) for name in settings}
    result |= {"versions": record.versions(), "hardware": record.hardware()}
    return result | {"commit": record.commit(), "threads": torch.get_num_threads()}


def show(result: dict[str, Any]) -> None:
    for kind, speeds in result["tokens_per_second"].items():
        for name, found in speeds.items():
            print(f"{kind:8} {name:16}{statistics.median(found):8.0f} tokens/s (median)")
    for name, found in result["by_kind"].items():
        each = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in found.items())
        goal = f"   ≥ {GOAL}" if name == "labkit_over_generate" else ""
        print(f"{name}: {each}{goal}")
    print(f"greedy responses equal to those of generate: {result['equal_greedy']:.1%}")


if __name__ == "__main__":
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    result = summarize(run(options), options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
