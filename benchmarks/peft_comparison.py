"""Full fine-tuning, LoRA, QLoRA, prefix and adapter on the same examples: the recorded runs of 12.

Examples, questions, the base and the search for learning rates are as in `lora_rank.py`. Each
method has the size that its own notebook has by default. Recorded of each run that is compared:

    share                   of parameters that train, of all in full precision and those added
    tokens_per_second       in training, as labkit trains the method: short examples are packed,
                            which they cannot be behind a prefix
    speed                   without packing, over full fine-tuning's: median over rounds in turns
    peak_bytes              of tensors in a training step on those batches, weights included: the
                            allocator's record, which earlier work of the process does not affect
    file_bytes              what has to be kept
    reading, writing        time of a forward pass, and of a token after it, over the base model's:
                            median over rounds in turns; with `_merged`, merged into the weights
    facts, phrasings, families
                            accuracy on residents, phrasings and kinds of tasks not trained on
    perplexity              of held-out pretraining text; `perplexity_start` before any training

    python benchmarks/peft_comparison.py --json benchmarks/results/peft_comparison.json
"""

import copy
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import common
import sweep
import torch

from labkit import memory, models, training
from labkit.techniques import adapter, full, lora, prefix, qlora

LORA = lora.LoraConfig(rank=8, alpha=16.0)
METHODS: dict[str, tuple[Any, Any]] = {
    "full": (full, full.FullConfig()),
    "LoRA": (lora, LORA),
    "QLoRA": (qlora, qlora.QloraConfig(LORA)),
    "prefix": (prefix, prefix.PrefixConfig(16)),
    "adapter": (adapter, adapter.AdapterConfig(24)),
}
# As in the sweeps of the methods' own notebooks.
LEARNING_RATES = {(name,): (2e-3, 4e-3) for name in METHODS}
LEARNING_RATES |= {("full",): (2.5e-4, 5e-4), ("prefix",): (0.15, 0.3)}
HELD_OUT = ("phrasings", "families")
STEPS, ROUNDS = 10, 6  # of training, in turns


def measure(point: sweep.Row) -> sweep.Row:
    method, compared = point["method"], point["stage"] == "compare"
    original, tokenizer = models.load(point["base"])
    train = common.training_set(tokenizer, point)
    found = training_costs(point, train) if compared else {}
    model = attached(method, point["base"], point["seed"])
    if compared:
        found["perplexity_start"], _ = common.perplexity(model, tokenizer)
    found |= common.train(model, train, point)
    found |= common.scores(model, tokenizer, point, HELD_OUT)
    if compared:
        found["perplexity"], _ = common.perplexity(model, tokenizer)
        found |= sizes(model, original, tokenizer) | latency(method, model, original)
    return found


def attached(method: str, base: str, seed: int = 0) -> Any:
    """A fresh base model with what `method` trains."""
    technique, config = METHODS[method]
    torch.manual_seed(seed)
    return technique.attach(models.load(base)[0], config)


def training_costs(point: sweep.Row, train: Any) -> dict[str, float]:
    """Peak memory and speed on models of their own; full fine-tuning takes turns with the method."""
    few = [train[i] for i in range(min(len(train), 4 * point["batch_size"]))]

    def steps(model: Any, n: int) -> training.TrainResult:
        config = training.TrainConfig(max_steps=n, batch_size=point["batch_size"], packing=False)
        return training.fit(model, few, training.sft_loss, config, progress=False)

    whole, model = attached("full", point["base"]), attached(point["method"], point["base"])
    with memory.measured(model) as measured:
        steps(model, 2)
    rounds = [[steps(m, STEPS).tokens_per_second for m in (whole, model)] for _ in range(ROUNDS)]
    ratio = statistics.median(own / full for full, own in rounds[1:])
    return {"peak_bytes": measured.peak_bytes, "speed": ratio}


def sizes(model: Any, original: Any, tokenizer: Any) -> dict[str, float]:
    """The share of parameters that train, and how large their file is."""
    total = models.parameter_counts(original).total
    trainable = models.parameter_counts(model).trainable
    share = 1.0 if trainable == total else trainable / (total + trainable)
    with tempfile.TemporaryDirectory() as place:
        saved = models.save(model, tokenizer, f"{place}/saved").glob("*.safetensors")
        return {"share": share, "file_bytes": sum(file.stat().st_size for file in saved)}


def latency(method: str, model: Any, original: Any) -> dict[str, float]:
    """Reading and writing over the base model's; LoRA and QLoRA also merged."""
    timed = {"base": original, "": model.eval()}
    if method == "LoRA":
        timed["_merged"] = copy.deepcopy(model).merge_and_unload()
    if method == "QLoRA":
        timed["_merged"] = qlora.merge(copy.deepcopy(model))
    batch = torch.randint(5, 2000, (8, 48)).to(original.device)
    rounds = [{name: seconds(m, batch) for name, m in timed.items()} for _ in range(23)][3:]
    return {
        kind + name: statistics.median(each[name][i] / each["base"][i] for each in rounds)
        for i, kind in enumerate(("reading", "writing"))
        for name in timed
        if name != "base"
    }


@torch.no_grad()
def seconds(model: Any, batch: torch.Tensor, new: int = 8) -> tuple[float, float]:
    """Of reading the batch, and of one new token after it.

    A prefix is in the cache once the batch is read, so what is inside PEFT's model goes on.
    """
    began = now(batch)
    out = model(input_ids=batch, use_cache=True)
    middle = now(batch)
    inner = models.base_model(model)
    for _ in range(new):
        following = out.logits[:, -1:].argmax(-1)
        out = inner(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
    return middle - began, (now(batch) - middle) / new


def now(work: torch.Tensor) -> float:
    """Seconds on a clock, once the device of `work` has done what it was given."""
    if work.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    args = sweep.arguments(__doc__, seeds=5, **common.SETTINGS)
    base = partial(common.baseline, held_out=HELD_OUT)
    sweep.over_seeds(base, [{"stage": "base"}], args)
    sweep.compare_tuned(measure, ("method",), LEARNING_RATES, None, args)
