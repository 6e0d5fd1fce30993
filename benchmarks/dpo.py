"""What does DPO make of the same rankings that RLHF learns its reward from? For 09_dpo.

For each seed an SFT model and rankings are made once and kept next to the results, as in
`benchmarks/rlhf.py`: the embedded base after demonstrations, a third of them flawed, and 4-9
responses that this model sampled to each prompt, ranked by an annotator who follows the gold judge,
breaks ties at random, and errs with `noise`. Then every condition trains from there on the best and
the worst response of each ranking: DPO at several betas, with an NLL term, and for five epochs.
`SFT` trains no further, `chosen` goes on with SFT on the best responses.

Each run keeps its history (loss, rewards, both log-probabilities), and of sampled responses to
held-out prompts the gold score and its three parts, the KL to the SFT model per response, length,
and a few texts. Learning rates are those of the best gold score on other prompts, at a seed of
their own.

    python benchmarks/dpo.py --json benchmarks/results/dpo.json
"""

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import common
import rlhf
import sweep
import torch

from labkit import data, logprobs, models, pairs
from labkit.batching import pack
from labkit.techniques import dpo
from labkit.tinytown import preferences

Row = sweep.Row
FIELDS = ("arm", "beta", "nll", "epochs")
USUAL, CHOSEN = ("dpo", 0.1, 0.0, 1.0), ("chosen", 0.0, 0.0, 1.0)
RATES = {USUAL: (3e-5, 1e-4, 3e-4), CHOSEN: (3e-5, 1e-4, 3e-4)}
CONDITIONS: Any = {("SFT", 0.0, 0.0, 1.0): 0.0, CHOSEN: CHOSEN}
CONDITIONS |= {("dpo", beta, 0.0, 1.0): USUAL for beta in (0.01, 0.03, 0.1, 0.3, 1.0)}
CONDITIONS |= {("dpo", 0.1, 0.3, 1.0): USUAL}
CONDITIONS |= {("dpo", beta, 0.0, 5.0): USUAL for beta in (0.01, 0.1, 1.0)}  # too long
KEPT = ("loss", "reward_chosen", "reward_rejected", "accuracy", "logp_chosen", "logp_rejected")


def prepare(place: Path, seed: int, settings: Row) -> list[Row]:
    """The rankings of a seed, and its SFT model in `place`, made unless they are there."""
    done = place / "rankings.json"
    if not done.exists():
        ranked = rlhf.tuned_and_ranked(place, seed, settings)[2]
        done.write_text(json.dumps(ranked), "utf-8")
    return json.loads(done.read_text("utf-8"))


def measure(point: Row, folder: Path) -> Row:
    """Trained, unless it is a baseline, and scored."""
    place = folder / str(point["seed"])
    ranked = prepare(place, point["seed"], point)
    model, tokenizer = models.load(str(place / "sft"))
    history: list[Row] = []
    found: Row = {}
    settings = {k: point[k] for k in ("learning_rate", "seed", "batch_size", "epochs")}
    if point["arm"] == "chosen":
        rows = [{"prompt": r["prompt"], "completion": pairs.best_first(r)[0]} for r in ranked]
        found = common.train(model, data.encode(rows, tokenizer), settings)
    elif point["arm"] == "dpo":
        config = dpo.DPOConfig(beta=point["beta"], nll=point["nll"], **settings)
        rows = one_pair_each(ranked)
        result = dpo.train(model, tokenizer, rows, config, progress=False)
        found = common.results(result) | {"pairs": len(rows)}
        history = [{k: round(entry[k], 4) for k in KEPT} for entry in result.history]
    first = models.load(str(place / "sft"))[0]
    found |= scores(model, first, tokenizer, preferences.prompts(point["test_prompts"], 5, "test"))
    other = preferences.prompts(200, 6000)
    found["tuning_loss"] = -scores(model, first, tokenizer, other)["test_total"]
    return found | {"history": history}


def one_pair_each(ranked: list[Row]) -> list[Row]:
    """Of each ranking the best and the worst response."""
    best = [(row, pairs.best_first(row)) for row in ranked]
    return [{"prompt": r["prompt"], "chosen": t[0], "rejected": t[-1]} for r, t in best]


@torch.no_grad()
def scores(model: Any, first: Any, tokenizer: Any, rows: list[Row]) -> Row:
    """Gold scores, KL per response to `first` and length in tokens of sampled responses."""
    texts = [text for (text,) in rlhf.sampled(model, tokenizer, rows, seed=2)]
    found = {f"test_{name}": value for name, value in rlhf.gold_scores(rows, texts).items()}
    written = [(r, t) for r, t in zip(rows, texts, strict=True) if t.strip()]
    encoded = data.encode([r | {"completion": t} for r, t in written], tokenizer)
    batches = [pack(encoded[i : i + 64], packing=False) for i in range(0, len(encoded), 64)]
    kl = 0.0
    for batch in batches:
        both = [logprobs.response_logps(m.eval(), batch).sum().item() for m in (model, first)]
        kl += both[0] - both[1]
    length = statistics.fmean(int(example.mask.sum()) for example in encoded)
    return found | {"test_kl": kl / len(rows), "test_length": length, "texts": texts[:12]}


if __name__ == "__main__":
    made = {"sft_rows": 4000, "flawed": 1 / 3, "rankings": 1000, "noise": 0.1}
    trained = {"batch_size": 16, "test_prompts": 300}
    args = sweep.arguments(__doc__, **made, **trained)
    folder = args.json.with_suffix(".models")
    measured = partial(measure, folder=folder)
    sweep.compare_tuned(measured, FIELDS, RATES, CONDITIONS, args)
