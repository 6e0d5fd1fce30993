"""What does PPO do to the reward that it raises, and to what was meant? For 08_rlhf.

For each seed an SFT model and a reward model are made once and kept in `--folder`:

    SFT      the embedded base after demonstrations, a third of them flawed
    reward   rankings of 4-9 responses that this model sampled, fewer where it repeated itself, by an
             annotator who follows the gold judge, throws dice where it sees two as equal, and errs with `noise`

then every arm trains from there (`base` and `SFT` do not train), on the same prompts, for as many episodes:

    full              PPO against the reward model, at several betas: over-optimization
    no SFT            the same, from the base model
    no reward model   PPO against a head that was never trained on rankings
    gold              PPO against the judge itself: what a perfect reward would give
    rloo, grpo        TRL's trainers, which have no critic

Each run keeps its curves over training (learned reward, gold score and its three parts, KL,
length, entropy, end rate), a score on held-out prompts, and its responses to a few of them.

    python benchmarks/rlhf.py --json benchmarks/results/rlhf.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grid

from labkit import data, models, sampling, training
from labkit.techniques import critic_free, ppo, reward
from labkit.tinytown import demonstrations, judge, preferences, rank_samples

Row = dict[str, Any]
BETAS = (0.0, 0.1, 0.2, 0.4)
UNTRAINED = ("base", "SFT")
ABLATIONS = ("no SFT", "no reward model", "gold")
KEPT = ("reward", "kl", "length", "entropy", "end_rate", "explained_variance", "clip_fraction")
PARTS = ("helpful", "honest", "harmless")
WATCHED = 8  # held-out prompts whose responses are kept


def gold(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    """Means of the judge's verdicts."""
    verdicts = [judge(row, text) for row, text in zip(rows, texts, strict=True)]
    names = (*PARTS, "total")
    return {name: statistics.fmean(getattr(v, name) for v in verdicts) for name in names}


def prepare(folder: Path, seed: int, shared: Row) -> None:
    """The seed's SFT model and its reward models, trained and untrained, unless they are there."""
    place = folder / str(seed)
    if (place / "done").exists():
        return
    model, tokenizer = models.load("tinytown")
    lessons = demonstrations(shared["sft_rows"], shared["flawed"], seed=seed)
    settings = training.TrainConfig(learning_rate=5e-4, batch_size=16, seed=seed)
    training.sft(
        model, tokenizer, data.encode(lessons, tokenizer).dataset, settings, progress=False
    )
    models.save(model, tokenizer, place / "sft")
    rows = preferences.prompts(shared["rankings"], seed=1000 + seed)
    samples = sampling.responses(model, tokenizer, rows, each=9, seed=seed)
    rankings = rank_samples(rows, samples, shared["noise"], seed)
    settings = reward.RewardConfig(learning_rate=shared["reward_rate"], seed=seed)
    learned, _ = reward.train(model, tokenizer, rankings, settings, progress=False)
    blank = reward.RewardModel(reward.with_head(model, tokenizer, seed), tokenizer)
    rows = preferences.prompts(200, seed=2000 + seed)
    texts = [t for (t,) in sampling.responses(model, tokenizer, rows, seed=1)]
    for name, found in (("reward", learned), ("blank", blank)):
        found.normalized([row["prompt"] for row in rows], texts).save(place / name)
    (place / "done").touch()


def measure(arm: str, beta: float, seed: int, folder: str, **shared: Any) -> Row:
    """One run."""
    started, place = time.perf_counter(), Path(folder) / str(seed)
    model, tokenizer = models.load("tinytown" if arm in ("base", "no SFT") else str(place / "sft"))
    learned = reward.RewardModel.load(place / "reward")
    given = {"gold": judged, "no reward model": reward.RewardModel.load(place / "blank")}
    rows = preferences.prompts(shared["prompts"], seed=3000 + seed)
    common = dict(steps=shared["steps"], batch_size=shared["batch_size"], beta=beta, seed=seed,
                  minibatch_size=shared["minibatch_size"], learning_rate=shared["learning_rate"])  # fmt: skip
    history: list[Row] = []
    if arm in critic_free.METHODS:
        settings = critic_free.CriticFreeConfig(arm, epochs=shared["critic_free_epochs"], **common)
        history = critic_free.train(model, tokenizer, rows, learned, settings)
    elif arm not in UNTRAINED:
        ppo.train(model, tokenizer, rows, given.get(arm, learned), ppo.PPOConfig(**common),
                  progress=False, on_rollout=lambda r, m: history.append(entry(r, m, learned)))  # fmt: skip
    seconds = time.perf_counter() - started
    return final(model, tokenizer, learned, shared) | {
        "history": history,
        "seconds": round(seconds, 1),
    }


def judged(prompts: list, responses: list[str], rows: list[Row]) -> list[float]:
    """The judge's total, on a scale like that of a normalized reward."""
    return [6 * judge(row, text).total - 4 for row, text in zip(rows, responses, strict=True)]


def entry(rollout: Any, metrics: dict[str, float], learned: reward.RewardModel) -> Row:
    found = {name: metrics[name] for name in KEPT if name in metrics}
    found["learned"] = statistics.fmean(learned(rollout.prompts, rollout.responses))
    found |= gold(rollout.rows, rollout.responses)
    return {name: round(value, 4) for name, value in found.items()}


def final(model: Any, tokenizer: Any, learned: reward.RewardModel, shared: Row) -> Row:
    """On held-out prompts: learned reward, gold, and the texts of the first."""
    rows = preferences.prompts(shared["test_prompts"], seed=5, split="test")
    texts = [t for (t,) in sampling.responses(model, tokenizer, rows, seed=2)]
    score = statistics.fmean(learned([row["prompt"] for row in rows], texts))
    found = {f"test_{name}": value for name, value in gold(rows, texts).items()}
    return found | {"test_learned": score, "texts": texts[:WATCHED]}


def points(args: argparse.Namespace, shared: Row) -> list[Row]:
    arms = [("full", beta) for beta in args.betas]
    arms += [(arm, args.beta) for arm in (*UNTRAINED, *ABLATIONS, *critic_free.METHODS)]
    return [{"arm": arm, "beta": beta, "seed": seed, **shared}
            for seed in range(args.seeds) for arm, beta in arms]  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--sft-rows", type=int, default=4000)
    p.add_argument("--flawed", type=float, default=1 / 3, help="share of the demonstrations")
    p.add_argument("--rankings", type=int, default=1000)
    p.add_argument("--noise", type=float, default=0.1, help="of the annotator")
    p.add_argument("--reward-rate", type=float, default=1e-3, help="learning rate")
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--minibatch-size", type=int, default=32)
    p.add_argument("--learning-rate", type=float, default=1e-4)
    p.add_argument("--critic-free-epochs", type=int, default=1, help="passes of RLOO and GRPO")
    p.add_argument("--prompts", type=int, default=2000)
    p.add_argument("--test-prompts", type=int, default=300)
    p.add_argument("--betas", type=float, nargs="+", default=BETAS)
    p.add_argument("--beta", type=float, default=0.2, help="of the arms without one of their own")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=1)
    folder = Path(tempfile.gettempdir()) / "labkit-rlhf"
    p.add_argument("--folder", type=Path, default=folder, help="models that arms share")
    p.add_argument("--json", type=Path, required=True)
    args = p.parse_args()
    kept = ("json", "seeds", "workers", "betas", "beta", "folder")
    shared = {name: value for name, value in vars(args).items() if name not in kept}
    for seed in range(args.seeds):
        prepare(args.folder, seed, shared)
    grid.run_grid(Measure(str(args.folder)), points(args, shared), args.json, args.workers)


class Measure:
    """`measure` with the folder, which is no part of a result."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, **point: Any) -> Row:
        return measure(folder=self.folder, **point)


if __name__ == "__main__":
    main()
