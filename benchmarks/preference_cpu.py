"""How fast labkit learns from preferences on a CPU, compared with TRL.

Reward model, DPO and ORPO, each in three conditions, interleaved, on Tinytown's base and the same
pairs, one epoch a round:

    stock    TRL's trainer (RewardTrainer, DPOTrainer, the experimental ORPOTrainer), its defaults
    tuned    the same without gradient checkpointing, in bfloat16 only where the processor has it,
             DPO's reference computed beforehand as labkit does
    labkit   labkit's, its defaults

Each step has 16 pairs. Speeds are pairs per second of the steps after warm-up; DPO's passes of
the reference are outside of them in every condition but `stock`, which makes one each step.
Ratios are medians over rounds.

Equal loss: an untimed run of TRL's trainer meets the pairs in labkit's order; its loss curve must be
labkit's within 1 %. ORPO's NLL is that of prompt and response here, as TRL has it; there it is one
mean over a batch's tokens, so its curves are compared with one pair a step. Needs a quiet machine:
`python benchmarks/preference_cpu.py --json out.json`.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import datasets
import numpy as np
import torch
import transformers
import trl
from trl.experimental import orpo as trl_orpo

from labkit import models, record, templates, tinytown
from labkit.batching import Shuffled
from labkit.techniques import dpo, orpo, reward

BATCH, WARM = 16, 5
LEARNING_RATE = {"reward": 1e-4, "dpo": 1e-4, "orpo": 1e-3}
TRL = {
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "orpo": (trl_orpo.ORPOTrainer, trl_orpo.ORPOConfig),
}
LABKIT = {
    "reward": (reward.train, reward.RewardConfig),
    "dpo": (dpo.train, dpo.DPOConfig),
    "orpo": (orpo.train, orpo.ORPOConfig),
}
COMMON = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
COMMON |= {"seed": 0, "num_train_epochs": 1, "logging_steps": 1, "weight_decay": 0.01}
COMMON |= {"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "max_length": 256}


class Clock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.times.append(time.perf_counter())


def trl_run(method, model, tokenizer, rows, in_order=False, batch=BATCH, **flags):
    """Pairs per second and the loss of each step of one of TRL's trainers."""
    kind, config = TRL[method]
    if in_order:
        kind = type("InOrder", (kind,), {"_get_train_sampler": in_labkits_order})
    if method == "reward":
        model = reward.with_head(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        settings = COMMON | {"learning_rate": LEARNING_RATE[method]} | flags
        settings["per_device_train_batch_size"] = batch
        arguments = config(output_dir=folder, **settings)
        trainer = kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return speed(clock.times), losses


def in_labkits_order(trainer, train_dataset=None):
    return Shuffled(len(trainer.train_dataset), seed=0)


def speed(times: list[float]) -> float:
    return BATCH * (len(times) - WARM) / (times[-1] - times[WARM - 1])


def labkit_run(method, model, tokenizer, rows, batch=BATCH):
    train, kind = LABKIT[method]
    more = {"nll": "all"} if method == "orpo" else {}
    config = kind(batch_size=batch, learning_rate=LEARNING_RATE[method], **more)
    result = train(model, tokenizer, rows, config, progress=False)
    history = (result[1] if method == "reward" else result).history
    return speed([entry["seconds"] for entry in history]), [entry["loss"] for entry in history]


def rendered(rows, tokenizer) -> datasets.Dataset:
    """The rows as texts in Tinytown's template, which TRL then need not apply."""
    render, columns = templates.renderer(tokenizer), []
    for row in rows:
        texts = [
            render({"prompt": row["prompt"], "completion": row[c]}) for c in ("chosen", "rejected")
        ]
        columns.append({"prompt": texts[0][0], "chosen": texts[0][1], "rejected": texts[1][1]})
    return datasets.Dataset.from_list(columns)


def run(options: argparse.Namespace) -> dict:
    first, tokenizer = models.load(options.model, device="cpu", dtype="float32")
    rows = tinytown.preference_pairs(options.steps * BATCH, noise=0.0, seed=0)
    texts = rendered(rows, tokenizer)
    whole = texts.map(lambda row: {c: row["prompt"] + row[c] for c in ("chosen", "rejected")})
    texts_of = {"reward": whole.remove_columns("prompt"), "dpo": texts, "orpo": texts}
    tuned = {"gradient_checkpointing": False, "bf16": models.cpu_has_bf16()}
    result: dict = {}
    for method in options.methods.split(","):
        more = {"precompute_ref_log_probs": True} if method == "dpo" else {}
        more |= {"beta": 0.1} if method == "orpo" else {}
        runs = {
            "stock": lambda m, method=method: trl_run(method, m, tokenizer, texts_of[method]),
            "tuned": lambda m, method=method, more=more: trl_run(
                method, m, tokenizer, texts_of[method], **tuned | more
            ),
            "labkit": lambda m, method=method: labkit_run(method, m, tokenizer, rows),
        }
        if options.no_stock:
            del runs["stock"]
        found: dict = {"pairs_per_second": {name: [] for name in runs}}
        for number in range(options.rounds):
            for name in sorted(runs, key=lambda n: (list(runs).index(n) + number) % len(runs)):
                rate, losses = runs[name](copy.deepcopy(first))
                found["pairs_per_second"][name].append(rate)
                found[f"loss_{name}"] = losses
                print(f"{method:8} round {number + 1} {name:8}{rate:8.1f} pairs/s")
        for name in runs:
            if name != "labkit":
                above, below = (found["pairs_per_second"][n] for n in ("labkit", name))
                ratios = [a / b for a, b in zip(above, below, strict=True)]
                found[f"{name}_over_labkit"] = statistics.median(ratios)
        size, count = (1, min(100, len(rows))) if method == "orpo" else (BATCH, len(rows))
        some = copy.deepcopy(first), tokenizer, texts_of[method].select(range(count))
        reference = trl_run(method, *some, True, size, **tuned | more)[1]
        ours = found["loss_labkit"]
        if size != BATCH:
            ours = labkit_run(method, copy.deepcopy(first), tokenizer, rows[:count], size)[1]
        tens = [
            (np.mean(x[i : i + 10]) for x in (ours, reference)) for i in range(0, len(ours) - 9, 10)
        ]
        found["largest_difference"] = float(max(abs(a - b) / b for a, b in tens))
        found["equal_loss"] = found["largest_difference"] < 0.01
        found["loss_trl_in_order"] = reference
        result[method] = found
        print({k: v for k, v in found.items() if "_over_" in k or k.endswith("difference")})
    result |= {"versions": record.versions(), "hardware": record.hardware()}
    return result | {"commit": record.commit(), "threads": torch.get_num_threads()}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=30, help="steps of a round, warm-up included")
    p.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    p.add_argument("--model", default="tinytown", help="folder of a causal LM")
    p.add_argument("--methods", default="reward,dpo,orpo")
    p.add_argument("--no-stock", action="store_true", help="without `stock`, which takes bfloat16")
    p.add_argument("--json", type=Path, help="write the results here")
    return p.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = run(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
