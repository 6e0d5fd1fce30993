"""How fast labkit fine-tunes on a CPU, compared with what a user would run instead.

Conditions, interleaved on the same encoded examples and the same first weights, one epoch a round:

    stock           TRL's SFTTrainer with its defaults
    tuned           the same without gradient checkpointing, grouped by length, in bfloat16 only
                    where the processor has it (its own flags)
    packed          the same, with TRL's own packing=True instead of groups
    labkit          labkit.training.fit with its defaults
    labkit_compiled the same with compile=True (`--compiled`)
    bare            a loop without a trainer: batches made beforehand, compiled (the limit)

Each step has 32 examples in every condition (`packed`: as many packed sequences of 128 tokens as
hold about 32). Times are of the steps after warm-up, so compiling is not in them, in microseconds
per token, padding not counted. Ratios are medians over rounds.

Equal loss: an untimed run of TRL's trainer meets the examples in labkit's order, and its loss
curve and held-out loss must be labkit's within 1 %. Each condition's own held-out loss is shown
too. `tuned` and `bare` group examples by length, as their users would, and learn less per step for
it, so their time per token flatters them; `stock` and labkit take examples at random. Needs a quiet
machine: `python benchmarks/sft_cpu.py --json out.json`.
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
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models
from trl import SFTConfig, SFTTrainer

from labkit import record
from labkit.batching import Batch, Example, Shuffled, pack
from labkit.evaluation import held_out_loss
from labkit.models import cpu_has_bf16
from labkit.training import TrainConfig, fit, sft_loss

PAD, END, FIRST = 0, 1, 2
BATCH, LEARNING_RATE, WARM = 32, 1e-3, 5
PACKED = 9  # sequences of 128 tokens that hold about 32 examples of mean length 37
GOALS = {"stock_over_labkit": "≥ 2.7", "tuned_over_labkit": "≥ 1.6", "packed_over_labkit": ""}
GOALS |= {"labkit_over_bare": "≤ 1.1", "stock_over_labkit_compiled": ""}
GOALS |= {"tuned_over_labkit_compiled": "", "labkit_compiled_over_bare": ""}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=40, help="steps of a round, warm-up included")
    p.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    p.add_argument("--model", help="folder of a causal LM; default: a random 4 M Llama")
    p.add_argument("--no-stock", action="store_true", help="without `stock`, which takes bfloat16")
    p.add_argument("--compiled", action="store_true", help="also labkit with compile=True")
    p.add_argument("--json", type=Path, help="write the results here")
    options = p.parse_args()
    if options.steps <= WARM:
        p.error(f"--steps: expected more than the {WARM} of the warm-up")
    return options


def build_model(folder: str | None):
    if folder:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
    tokens = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None}
    config = transformers.LlamaConfig(**shape, **tokens)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def build_tokenizer(vocab_size: int):
    """Only its special tokens are used: the rows are made of ids."""
    vocab = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(FIRST, vocab_size)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def build_rows(count: int, vocab_size: int, seed: int) -> datasets.Dataset:
    """Rows of mean length 37, 55 % of it response, that follow a rule and so can be learned.

    Words follow each other in few ways, and are drawn like words, a few of them often.
    """
    random = np.random.default_rng(seed)
    words = np.random.default_rng(0).integers(FIRST, vocab_size, size=(200, 4))
    columns: dict[str, list] = {"input_ids": [], "completion_mask": []}
    for _ in range(count):
        length = int(np.clip(random.lognormal(np.log(33), 0.5), 8, 128))
        state, ids = int(random.integers(200)), []
        for _ in range(length - 1):
            ids.append(int(words[state, random.choice(4, p=[0.7, 0.2, 0.07, 0.03])]))
            state = ids[-1] % 200
        prompt = round(length * 0.45)
        columns["input_ids"].append([*ids, END])
        columns["completion_mask"].append([0] * prompt + [1] * (length - prompt))
    return datasets.Dataset.from_dict(columns)


class Clock(transformers.TrainerCallback):
    """Times of the steps of one of TRL's trainers, and the tokens of its batches."""

    def __init__(self, collator) -> None:
        self.collator, self.tokens, self.times = collator, [], []

    def __call__(self, rows):
        batch = self.collator(rows)
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return batch

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.times.append(time.perf_counter())

    def microseconds(self) -> float:
        steps = len(self.times)
        return (self.times[-1] - self.times[WARM - 1]) / sum(self.tokens[WARM:steps]) * 1e6


class SameOrder(SFTTrainer):
    """TRL's trainer, rows in the order in which labkit takes them."""

    def _get_train_sampler(self, train_dataset=None):
        return Shuffled(len(self.train_dataset), seed=0)


def trl_run(model, tokenizer, rows, kind=SFTTrainer, **flags):
    settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"seed": 0, "num_train_epochs": 1, "logging_steps": 10, "weight_decay": 0.01}
    settings |= {"learning_rate": LEARNING_RATE, "warmup_steps": 0.1, "completion_only_loss": True}
    settings |= {"lr_scheduler_type": "cosine", "per_device_train_batch_size": BATCH} | flags
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, **settings)
        trainer = kind(model, config, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        clock = Clock(trainer.data_collator)
        trainer.data_collator = clock
        trainer.add_callback(clock)
        trainer.train()
    curve = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    return clock.microseconds(), curve


def labkit_run(model, examples, **settings):
    config = TrainConfig(learning_rate=LEARNING_RATE, batch_size=BATCH, **settings)
    history = fit(model, examples, sft_loss, config, progress=False).history
    spans = np.diff([entry["seconds"] for entry in history])[WARM - 1 :]
    tokens = sum(e["tokens_per_second"] * s for e, s in zip(history[WARM:], spans, strict=True))
    return spans.sum() / tokens * 1e6, curve([entry["loss"] for entry in history])


def curve(losses) -> list[tuple[int, float]]:
    """Means of ten steps each, as TRL logs them."""
    return [(i + 10, float(np.mean(losses[i : i + 10]))) for i in range(0, len(losses) - 9, 10)]


def bare_run(model, batches: list[Batch]):
    """The least that training needs: compiled forward, response-only loss, fused optimizer."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    warmup, steps = -(-len(batches) // 10), len(batches)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    model.train()
    losses, times = [], []
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_bf16()):
            hidden = model.model(input_ids=batch.input_ids, use_cache=False)[0]
            logits = model.lm_head(hidden.flatten(0, 1)[batch.positions])
        loss = F.cross_entropy(logits.float(), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        times.append(time.perf_counter())
    tokens = sum(batch.tokens for batch in batches[WARM:])
    return (times[-1] - times[WARM - 1]) / tokens * 1e6, curve(losses)


def bare_batches(examples: list[Example]) -> list[Batch]:
    """All examples sorted by length and cut into batches, the batches shuffled."""
    order = np.argsort([len(example.ids) for example in examples], kind="stable")
    groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    np.random.default_rng(0).shuffle(groups)
    return [pack([examples[i] for i in group], packing=False) for group in groups]


def encoded(rows: datasets.Dataset) -> list[Example]:
    return [Example(np.array(r["input_ids"]), np.array(r["completion_mask"])) for r in rows]


def run(options: argparse.Namespace) -> dict:
    first = build_model(options.model).eval()
    vocab_size = first.config.vocab_size
    tokenizer = build_tokenizer(vocab_size)
    rows = build_rows(options.steps * BATCH, vocab_size, seed=1)
    examples, unseen = encoded(rows), encoded(build_rows(200, vocab_size, seed=2))
    batches = bare_batches(examples)
    eager = {"gradient_checkpointing": False, "bf16": cpu_has_bf16()}
    tuned = eager | {"train_sampling_strategy": "group_by_length"}
    packed = eager | dict(packing=True, max_length=128, per_device_train_batch_size=PACKED)
    runs = {
        "stock": lambda m: trl_run(m, tokenizer, rows),
        "tuned": lambda m: trl_run(m, tokenizer, rows, **tuned),
        "packed": lambda m: trl_run(m, tokenizer, rows, **packed),
        "labkit": lambda m: labkit_run(m, examples),
        "bare": lambda m: bare_run(m, batches),
    }
    if options.no_stock:
        del runs["stock"]
    if options.compiled:
        runs["labkit_compiled"] = lambda m: labkit_run(m, examples, compile=True)
    model_of = {name: copy.deepcopy(first) for name in runs}
    model_of["bare"].model.compile(dynamic=True)
    result: dict = {"times": {n: [] for n in runs}, "curves": {}, "held_out": {}, "seconds": {}}
    for number in range(options.rounds):
        for name in sorted(runs, key=lambda n: (list(runs).index(n) + number) % len(runs)):
            if name in ("stock", "tuned", "packed"):  # TRL changes a model beyond its weights
                model_of[name] = copy.deepcopy(first)
            model = model_of[name]
            model.load_state_dict(first.state_dict())
            start = time.perf_counter()
            micros, result["curves"][name] = runs[name](model)
            spent = time.perf_counter() - start
            result["times"][name].append(micros)
            result["seconds"].setdefault(name, []).append(spent)
            print(f"round {number + 1} {name:16}{micros:7.0f} µs/token   {spent:5.1f} s in all")
    model_of["same_order"] = copy.deepcopy(first)
    ordered = trl_run(model_of["same_order"], tokenizer, rows, SameOrder, bf16=cpu_has_bf16())
    result["curves"]["same_order"] = ordered[1]
    for name, model in model_of.items():
        first.load_state_dict(model.state_dict())
        result["held_out"][name] = held_out_loss(first, unseen)
    return result


def summarize(result: dict) -> dict:
    for name in GOALS:
        above, below = (result["times"].get(each) for each in name.split("_over_"))
        if above and below:
            result[name] = statistics.median(a / b for a, b in zip(above, below, strict=True))
    # Of labkit and TRL on the same rows in the same order, relative.
    curves, held_out = result["curves"], result["held_out"]
    pairs = [(held_out["labkit"], held_out["same_order"])]
    pairs += zip(dict(curves["labkit"]).values(), dict(curves["same_order"]).values(), strict=True)
    result["largest_difference"] = max(abs(a - b) / b for a, b in pairs)
    result["equal_loss"] = result["largest_difference"] < 0.01
    result |= {"versions": record.versions(), "hardware": record.hardware()}
    result["hardware"]["capability"] = torch.backends.cpu.get_cpu_capability()
    return result


def show(result: dict) -> None:
    print(f"\n{'condition':16} µs/token (median)   first round in all   held-out loss   loss curve")
    for name, means in result["curves"].items():
        times, seconds = (result[key].get(name, [float("nan")]) for key in ("times", "seconds"))
        losses = " ".join(f"{step}:{loss:.2f}" for step, loss in means)
        row = f"{name:16}{statistics.median(times):18.0f}{seconds[0]:19.1f} s"
        print(f"{row}{result['held_out'][name]:16.3f}   {losses}")
    for name, goal in GOALS.items():
        if name in result:
            print(f"{name:28}{result[name]:6.2f}   {goal}")
    verdict = "equal" if result["equal_loss"] else "NOT equal"
    worst = result["largest_difference"]
    print(f"loss of labkit and of TRL in the same order {verdict}: {worst:.2%} apart at most")


if __name__ == "__main__":
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = summarize(run(options))
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
