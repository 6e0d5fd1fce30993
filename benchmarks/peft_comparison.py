"""Full fine-tuning, LoRA, QLoRA, prefix and adapter on the same rows: the recorded runs of 12.

Every run trains on the same rows for the same steps and is asked the same questions. Each method
has the size that its own notebook has by default, and the learning rate that its own recorded sweep
found best at that size. Where there is no such sweep (QLoRA), it is found here as there: the
rate with the least response loss on other questions of the test split, with a seed that the
comparison does not use; where the best is the end of its list, the list goes on by a factor of
two, at most twice. Recorded of each run of the comparison:

    share                   of parameters that train, of all in full precision and those added
    tokens_per_second       in training, as labkit trains the method: short rows share a line,
                            which they cannot behind a prefix
    speed                   the same on equal batches without that, over full fine-tuning's: median
                            over rounds in which the two take turns
    peak_bytes              of tensors in a training step on those batches, weights included: the
                            allocator's record, which earlier work of the process does not touch
    file_bytes              what has to be kept
    reading, writing        time of a forward pass, and of a token after it, over the base model's:
                            median over rounds in turns; with `_merged`, merged into the weights
    accuracy, facts, phrasings, families
                            right answers: test questions, residents never asked about, held-out
                            phrasings, held-out kinds of tasks
    perplexity              of held-out pretraining texts, geometric mean over the genres;
                            `perplexity_start` before any training

    python benchmarks/peft_comparison.py --json benchmarks/results/peft_comparison.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grid
import torch
from lora_rank import FULL, TUNING_SEED, beyond, score

from labkit import data, evaluation, memory, models, speed, tracking, training
from labkit.techniques import adapter, full, lora, prefix, qlora

RANK, LENGTH, BOTTLENECK = 8, 16, 24
LORA = lora.LoraConfig(RANK, 2.0 * RANK)
ROOMS: dict[str, tuple[Any, Any]] = {
    "full": (full, full.FullConfig()),
    "LoRA": (lora, LORA),
    "QLoRA": (qlora, qlora.QloraConfig(LORA)),
    "prefix": (prefix, prefix.PrefixConfig(LENGTH)),
    "adapter": (adapter, adapter.AdapterConfig(BOTTLENECK)),
}
# Where a method's rate was found, and what its own runs are called there.
SWEEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("lora_rank", {"rank": FULL}),
    "LoRA": ("lora_rank", {"rank": RANK}),
    "prefix": ("prefix_length", {"kind": "plain", "length": LENGTH}),
    "adapter": ("adapter_bottleneck", {"placement": "houlsby", "bottleneck": BOTTLENECK}),
}
RATES = {  # to try where there is no sweep
    "full": (5e-4, 1e-3, 2e-3),
    "LoRA": (2e-3, 4e-3, 8e-3),
    "QLoRA": (2e-3, 4e-3, 8e-3),
    "prefix": (0.075, 0.15, 0.3),
    "adapter": (2e-3, 4e-3, 8e-3),
}
GENRE_TEXTS = 12  # old texts of each genre
STEPS, ROUNDS = 10, 6  # of training, in turns


def measure(
    stage: str, method: str, learning_rate: float, seed: int, base: str, rows: int,
    test_rows: int, epochs: float, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """One run: trained and scored; if compared, also what it costs."""
    started = time.perf_counter()
    original, tokenizer = models.load(base)
    train = data.encode(data.load(limit=rows, seed=0), tokenizer, max_length=256).dataset
    found = training_costs(method, base, train, batch_size) if stage == "compare" else {}
    network = attached(method, base, seed)
    found["perplexity_start"] = perplexity(network, tokenizer)
    config = training.TrainConfig(
        learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed
    )
    result = training.sft(network, tokenizer, train, config, progress=False)
    found |= {"train_loss": result.loss, "steps": result.steps}
    found |= {"train_seconds": round(result.seconds, 2)}
    found |= {"tokens_per_second": round(result.tokens_per_second)}
    found |= score(network, tokenizer, test_rows)
    if stage == "compare":
        found |= more_scores(network, tokenizer, test_rows)
        found |= sizes(network, original, tokenizer) | latency(method, network, original)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def attached(method: str, base: str, seed: int = 0) -> Any:
    """A fresh base model with what `method` trains."""
    room, config = ROOMS[method]
    torch.manual_seed(seed)
    return room.attach(models.load(base)[0], config)


def training_costs(method: str, base: str, train: Any, batch_size: int) -> dict[str, float]:
    """Peak memory and speed on models of their own; full fine-tuning takes turns with `method`."""
    few = train.select(range(min(len(train), 4 * batch_size)))
    tokenizer = models.load(base)[1]

    def steps(network: Any, n: int) -> training.TrainResult:
        config = training.TrainConfig(max_steps=n, batch_size=batch_size, packing=False)
        return training.sft(network, tokenizer, few, config, progress=False)

    whole, network = attached("full", base), attached(method, base)
    with memory.measured(network) as measured:
        steps(network, 2)
    rounds = [[steps(n, STEPS).tokens_per_second for n in (whole, network)] for _ in range(ROUNDS)]
    ratio = statistics.median(mine / its for its, mine in rounds[1:])
    return {"peak_bytes": measured.peak_bytes, "speed": ratio}


def perplexity(network: Any, tokenizer: Any) -> float:
    """Of held-out pretraining texts: the geometric mean over the genres."""
    from labkit.tinytown import genre_samples

    genres = evaluation.perplexity_by(network, tokenizer, genre_samples(GENRE_TEXTS))
    return statistics.geometric_mean(genres.values())


def more_scores(network: Any, tokenizer: Any, n: int) -> dict[str, float]:
    """The held-out splits that the sweeps have not, and forgetting."""
    from labkit.tinytown import instruction_rows

    splits = {"phrasings": "heldout_phrasings", "families": "heldout_families"}
    found = {
        name: evaluation.exact(network, tokenizer, instruction_rows(split, n)).accuracy
        for name, split in splits.items()
    }
    return found | {"perplexity": perplexity(network, tokenizer)}


def sizes(network: Any, original: Any, tokenizer: Any) -> dict[str, float]:
    """How many parameters train, of how many, and how large their file is."""
    total, trainable = (models.parameter_counts(n) for n in (original, network))
    trained = trainable.trainable
    share = 1.0 if trained == total.total else trained / (total.total + trained)
    with tempfile.TemporaryDirectory() as place:
        folder = models.save(network, tokenizer, Path(place) / "saved")
        file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"trainable": trained, "share": share, "file_bytes": file_bytes}


def latency(method: str, network: Any, original: Any) -> dict[str, float]:
    """Reading and writing over the base model's; LoRA and QLoRA also merged."""
    timed = {"base": original, "": network.eval()}
    if method == "LoRA":
        timed["_merged"] = copy.deepcopy(network).merge_and_unload()
    if method == "QLoRA":
        timed["_merged"] = qlora.merge(copy.deepcopy(network))
    batch = torch.randint(5, 2000, (8, 48))
    rounds = [{name: seconds(n, batch) for name, n in timed.items()} for _ in range(23)][3:]
    return {
        kind + name: statistics.median(each[name][i] / each["base"][i] for each in rounds)
        for i, kind in enumerate(("reading", "writing"))
        for name in timed
        if name != "base"
    }


@torch.no_grad()
def seconds(network: Any, batch: torch.Tensor, new: int = 8) -> tuple[float, float]:
    """Of reading the batch, and of one new token after it.

    A prefix is in the cache once the batch is read, so what is inside PEFT's model goes on.
    """
    began = time.perf_counter()
    out = network(input_ids=batch, use_cache=True)
    middle = time.perf_counter()
    inner = speed.base_model(network)
    for _ in range(new):
        following = out.logits[:, -1:].argmax(-1)
        out = inner(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
    return middle - began, (time.perf_counter() - middle) / new


def swept_rate(method: str, shared: dict[str, Any]) -> float | None:
    """The rate with which the method's own sweep compared, if it is recorded with our settings."""
    if method not in SWEEPS:
        return None
    question, own = SWEEPS[method]
    try:
        runs = tracking.recorded(question)["runs"]
    except FileNotFoundError:
        return None
    wanted = (shared | own | {"stage": "compare"}).items()
    return next((run["learning_rate"] for run in runs if wanted <= run.items()), None)


def tuned(runs: list[dict[str, Any]], method: str) -> dict[float, float]:
    """{learning rate: loss} of the method's tuning runs, in the order of the rates."""
    chosen = (run for run in runs if run["stage"] == "tune" and run["method"] == method)
    return dict(sorted((run["learning_rate"], run["tuning_loss"]) for run in chosen))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--base", default="tinytown")
    p.add_argument("--rows", type=int, default=2000)
    p.add_argument("--test-rows", type=int, default=200)
    p.add_argument("--epochs", type=float, default=2.0)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    shared = dict(base=args.base, rows=args.rows, test_rows=args.test_rows)
    shared |= dict(epochs=args.epochs, batch_size=args.batch_size)

    def point(stage: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        return dict(stage=stage, method=method, learning_rate=rate, seed=seed, **shared)

    rates = {method: swept_rate(method, shared) for method in ROOMS}
    untuned = [method for method, rate in rates.items() if rate is None]
    tuning = [point("tune", m, rate, TUNING_SEED) for m in untuned for rate in RATES[m]]
    settings = shared.items()
    runs = grid.run_grid(measure, tuning, args.json, args.workers)
    if others := [run for run in runs if not settings <= run.items()]:
        p.error(f"{args.json} holds {len(others)} runs with other settings; name another file")
    for _ in range(2):
        more = [(method, beyond(tuned(runs, method))) for method in untuned]
        tuning = [point("tune", method, rate, TUNING_SEED) for method, rate in more if rate]
        if tuning:
            runs = grid.run_grid(measure, tuning, args.json, args.workers)
    for method in untuned:
        losses = tuned(runs, method)
        rates[method] = min(losses, key=losses.__getitem__)
    compare = [
        point("compare", method, rate, seed)
        for seed in range(args.seeds)
        for method, rate in rates.items()
        if rate
    ]
    grid.run_grid(measure, compare, args.json, args.workers)


if __name__ == "__main__":
    main()
