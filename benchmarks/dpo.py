"""What does DPO make of the same rankings that RLHF learns its reward from? For 09_dpo.

For each seed an SFT model and rankings are made once and kept next to the results, those of
`benchmarks/rlhf.py`: the embedded base after demonstrations, a third of them flawed, and 4-9
responses that this model sampled to each prompt, ranked by an annotator who follows the gold judge,
breaks ties at random, and errs with `noise`. Then every condition trains from there on the best and
the worst response of each ranking: DPO at several betas, with an NLL term, and for five epochs.
`SFT` trains no further, `chosen` goes on with SFT on the best responses.

Each run keeps its history (loss, rewards, both log-probabilities), and of a sampled response to
each of the held-out prompts of `benchmarks/rlhf.py` the gold score, its three parts and its values
one by one (`test_golds`), the KL to the SFT model per response, length, and a few texts; `sft_gold`
is the SFT model's, and `SFT` has as `constants` what the judge says of answers that never change,
as `own_form` of the base asked as it knows questions.
The KL is k1 of the token ids that were sampled: right also where they make no text. Learning rates
are those of the best gold score on other prompts, at a seed of their own.

    python benchmarks/dpo.py --json benchmarks/results/dpo.json
"""

from functools import partial
from pathlib import Path
from typing import Any

import common
import rlhf
import sweep

from labkit import data, models, pairs
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


def measure(point: Row, file: Path) -> Row:
    """Trained, unless it is a baseline, and scored."""
    place = rlhf.prepared(file, point["seed"], point)
    model, tokenizer = models.load(str(place / "sft"))
    first, ranked = models.load(str(place / "sft"))[0], rlhf.read(place, "rankings")
    history: list[Row] = []
    found: Row = {}
    settings = {k: point[k] for k in ("learning_rate", "seed", "batch_size", "epochs")}
    if point["arm"] == "chosen":
        found = common.train(model, data.encode(chosen_only(ranked), tokenizer), settings)
    elif point["arm"] == "dpo":
        config = dpo.DPOConfig(beta=point["beta"], nll=point["nll"], **settings)
        result = dpo.train(model, tokenizer, one_pair_each(ranked), config, progress=False)
        found = common.results(result) | {"pairs": len(ranked)}
        history = [{k: round(entry[k], 4) for k in KEPT} for entry in result.history]
    return found | scores(model, first, tokenizer, point) | {"history": history}


def scores(model: Any, first: Any, tokenizer: Any, point: Row) -> Row:
    """`rlhf.scores` on held-out prompts, next to the SFT model's; for tuning, only on others."""
    if point["stage"] == "tune":
        other = rlhf.scores(
            model, first, tokenizer, preferences.prompts(point["test_prompts"], 6000)
        )
        return {"tuning_loss": -other["test_total"]}
    rows = preferences.prompts(point["test_prompts"], 5, "test")
    found = rlhf.scores(model, first, tokenizer, rows)
    found["sft_gold"] = rlhf.scores(first, first, tokenizer, rows)["test_total"]
    return found | (rlhf.baselines(rows) if point["arm"] == "SFT" else {})


def chosen_only(ranked: list[Row]) -> list[Row]:
    """Of each ranking the best response."""
    return [{"prompt": r["prompt"], "completion": pairs.best_first(r)[0]} for r in ranked]


def one_pair_each(ranked: list[Row]) -> list[Row]:
    """Of each ranking the best and the worst response."""
    best = [(row, pairs.best_first(row)) for row in ranked]
    return [{"prompt": r["prompt"], "chosen": t[0], "rejected": t[-1]} for r, t in best]


if __name__ == "__main__":
    args = sweep.arguments(__doc__, **rlhf.MADE, batch_size=16, test_prompts=300)
    rlhf.prepare_all(args)
    sweep.compare_tuned(partial(measure, file=args.json), FIELDS, RATES, CONDITIONS, args)
