"""Does ORPO make of a base in one stage what SFT and DPO make of it in two? For 10_orpo.

The best and the worst response of each ranking of `benchmarks/dpo.py` are the pairs, from the same
seeds; an SFT model sampled them, as others write the data of a real ORPO run.

    orpo          from the base, on pairs, `epochs` passes, at several lambdas; at 0 it is SFT on the
                  chosen responses
    chosen, DPO   from the base, SFT on the chosen responses, then one pass of DPO on the same pairs:
                  the rival with the same data
    SFT, DPO      from the SFT model of `benchmarks/dpo.py`, which has seen demonstrations: DPO on
                  the pairs, as there
    SFT           that model

Compute is tokens forwarded, those of DPO's reference pass included: ORPO's 3 passes over pairs are
6 over single responses, and so are 2 of SFT on the chosen, 2 of DPO and 2 of its reference. Each
run states `tokens` (with gradients) and `reference_tokens`, and seconds of all its stages; seed 0
the allocator's peak over three steps of the last stage (DPO's reference pass included), by
`memory.measured`. DPO keeps no second model here; one that did would hold `model_bytes` more.

Kept are the curves of ORPO's training, the share of the odds-ratio term in its loss among them; on
pairs that the SFT model sampled at test prompts, without noise, both mean log-probabilities per
token and the accuracy of the log odds (`held_*`); and what `benchmarks/dpo.py` keeps of held-out
prompts. Learning rates are those of the best gold score on other prompts at a seed of their own;
lambdas up to 0.25 share one, and so do those from 0.5. SFT's is 5e-4.

    python benchmarks/orpo.py --json benchmarks/results/orpo.json
"""

import copy
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
import dpo
import rlhf
import sweep
import torch

from labkit import data, memory, models
from labkit.pairs import encode_pairs, pack_pairs
from labkit.techniques import dpo as labkit_dpo
from labkit.techniques import orpo

Row = sweep.Row
FIELDS = ("arm", "lam")
SMALL, LARGE, TWO, MORE = ("orpo", 0.1), ("orpo", 1.0), ("chosen, DPO", 0.0), ("SFT, DPO", 0.0)
RATES = {key: (2.5e-4, 5e-4, 1e-3) for key in (SMALL, LARGE)}
RATES |= {key: (3e-5, 1e-4, 3e-4) for key in (TWO, MORE)}
CONDITIONS: Any = {("SFT", 0.0): 0.0} | {key: key for key in RATES}
CONDITIONS |= {("orpo", lam): SMALL for lam in (0.0, 0.05, 0.25)}
CONDITIONS |= {("orpo", lam): LARGE for lam in (0.5, 2.0)}
KEPT = ("loss", "nll", "odds_ratio", "odds_share", "accuracy", "logp_chosen", "logp_rejected")
SHOWN = ("accuracy", "log_odds_ratio", "logp_chosen", "logp_rejected")


def measure(point: Row, file: Path) -> Row:
    """Trained, unless it is a baseline, and scored."""
    place = rlhf.prepared(file, point["seed"], point)
    sft, tokenizer = models.load(str(place / "sft"))
    begins = point["arm"] in ("SFT", MORE[0])
    model = models.load(str(place / "sft") if begins else "tinytown")[0]
    ranked, found = rlhf.read(place, "rankings"), {}
    if point["arm"] != "SFT":
        found = trained(model, tokenizer, ranked, rlhf.read(place, "sft"), point)
    if point["stage"] == "compare":
        found |= held(model, tokenizer, dpo.one_pair_each(rlhf.read(place, "held")))
    return found | dpo.scores(model, sft, tokenizer, point)


def trained(model: Any, tokenizer: Any, ranked: list[Row], sft: Row, point: Row) -> Row:
    """The stages of an arm, added up; `sft` are the results of the first of `SFT, DPO`."""
    settings = {k: point[k] for k in ("learning_rate", "seed", "batch_size")}
    if point["arm"] == TWO[0]:
        options = settings | {"learning_rate": 5e-4, "epochs": point["sft_epochs"]}
        sft = common.train(model, data.encode(dpo.chosen_only(ranked), tokenizer), options)
    config: Any = labkit_dpo.DPOConfig(**settings)
    learn: Any = labkit_dpo.train
    if point["arm"] == "orpo":
        config = orpo.ORPOConfig(lam=point["lam"], epochs=point["epochs"], **settings)
        sft, learn = {"tokens": 0, "train_seconds": 0.0}, orpo.train
    rows, first, started = dpo.one_pair_each(ranked), copy.deepcopy(model), time.perf_counter()
    result = learn(model, tokenizer, rows, config, progress=False)
    seconds = sft["train_seconds"] + time.perf_counter() - started
    found = common.results(result) | {"pairs": len(rows), "train_seconds": round(seconds, 2)}
    found["tokens"] += sft["tokens"]
    found["reference_tokens"] = 0 if point["arm"] == "orpo" else result.tokens
    if point["stage"] == "compare" and point["seed"] == 0:  # a profiler is slow
        with memory.measured(first) as used:
            learn(first, tokenizer, rows[: 3 * point["batch_size"]], config, progress=False)
        found |= {"peak_bytes": used.peak_bytes, "model_bytes": memory.held(model)}
    return found | ({"history": thinned(result.history)} if point["arm"] == "orpo" else {})


def thinned(history: list[Row], size: int = 6) -> list[Row]:
    """Means over so many steps at a time."""
    parts = [history[i : i + size] for i in range(0, len(history), size)]
    return [{k: round(statistics.fmean(h[k] for h in part), 4) for k in KEPT} for part in parts]


@torch.no_grad()
def held(model: Any, tokenizer: Any, rows: list[Row]) -> Row:
    """Means over held-out pairs, as ORPO sees them."""
    encoded, config = encode_pairs(rows, tokenizer), orpo.ORPOConfig()
    parts = [encoded[i : i + 32] for i in range(0, len(encoded), 32)]
    batches = [pack_pairs(part, False).to(model.device) for part in parts]
    seen = [orpo.pair_loss(model.eval(), batch, config)[1] for batch in batches]
    weights = [len(part) / len(encoded) for part in parts]
    found = {k: sum(w * s[k].item() for w, s in zip(weights, seen, strict=True)) for k in SHOWN}
    return {f"held_{name}": value for name, value in found.items()}


if __name__ == "__main__":
    passes = {"batch_size": 16, "epochs": 3.0, "sft_epochs": 2.0, "test_prompts": 300}
    args = sweep.arguments(__doc__, **rlhf.MADE, **passes)
    rlhf.prepare_all(args)
    sweep.compare_tuned(partial(measure, file=args.json), FIELDS, RATES, CONDITIONS, args)
