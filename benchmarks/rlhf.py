"""What does PPO do to the reward that it raises, and to what was meant? For 08_rlhf.

For each seed an SFT model and reward models are made once and kept next to the results:

    SFT      the embedded base after demonstrations, a third of them flawed
    reward   rankings of 4-9 responses that this model sampled, fewer where it repeated itself, by
             an annotator who follows the gold judge, breaks ties at random, and errs with `noise`

then every condition trains from there (`base` and `SFT` do not train), on the same prompts, for
as many episodes:

    full              PPO against the reward model, at several betas: over-optimization
    no SFT            the same, from the base model
    no reward model   PPO against a head that was never trained on rankings
    gold              PPO against the judge itself: what a perfect reward would give
    rloo, grpo        TRL's trainers, which have no critic

Each run keeps its curves over training (learned reward, gold score and its three parts, KL,
length, entropy, EOS rate), a score on held-out prompts, and its responses to a few of them.

    python benchmarks/rlhf.py --json benchmarks/results/rlhf.json
"""

import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import sweep

from labkit import data, generate, models
from labkit.techniques import critic_free, ppo, reward
from labkit.tinytown import demonstrations, judge, preferences, rank_samples

Row = sweep.Row
CONDITIONS = [
    *({"arm": "full", "beta": beta} for beta in (0.0, 0.1, 0.2, 0.4)),
    *({"arm": arm, "beta": 0.2} for arm in ("base", "SFT", "no SFT", "no reward model", "gold")),
    *({"arm": method, "beta": 0.2} for method in ("rloo", "grpo")),
]
CURVES = ("reward", "kl", "length", "entropy", "end_rate", "explained_variance", "clip_fraction")
PARTS = ("helpful", "honest", "harmless", "total")


def prepare(place: Path, seed: int, settings: Row) -> None:
    """The seed's SFT model and its reward models, trained and untrained, unless they are there."""
    done, made_with = place / "settings.json", json.dumps(settings)
    if done.exists() and done.read_text("utf-8") == made_with:
        return
    model, tokenizer, rankings = tuned_and_ranked(place, seed, settings)
    config = reward.RewardConfig(learning_rate=settings["reward_rate"], seed=seed)
    learned, _ = reward.train(model, tokenizer, rankings, config, progress=False)
    untrained = reward.RewardModel(reward.with_head(model, tokenizer, seed), tokenizer)
    rows = preferences.prompts(200, seed=2000 + seed)
    texts = [text for (text,) in sampled(model, tokenizer, rows, seed=1)]
    for name, found in (("reward", learned), ("untrained", untrained)):
        found.normalized([row["prompt"] for row in rows], texts).save(place / name)
    done.write_text(made_with, "utf-8")


def tuned_and_ranked(place: Path, seed: int, settings: Row) -> tuple[Any, Any, list[Row]]:
    """The seed's SFT model, saved in `place`, its tokenizer, and rankings of its samples."""
    model, tokenizer = models.load("tinytown")
    rows = demonstrations(settings["sft_rows"], settings["flawed"], seed=seed)
    sft = {"learning_rate": 5e-4, "batch_size": 16, "seed": seed}
    common.train(model, data.encode(rows, tokenizer, max_length=512), sft)
    models.save(model, tokenizer, place / "sft")
    rows = preferences.prompts(settings["rankings"], seed=1000 + seed)
    samples = sampled(model, tokenizer, rows, seed, each=9)
    return model, tokenizer, rank_samples(rows, samples, settings["noise"], seed)


def sampled(model: Any, tokenizer: Any, rows: list[Row], seed: int, each: int = 1) -> list:
    return generate.responses(model, tokenizer, rows, each=each, seed=seed, max_new_tokens=48)


def measure(point: Row, folder: Path) -> Row:
    """Trained, unless it is a baseline, and scored; `seconds` are those of training."""
    started, condition, place = time.perf_counter(), point["arm"], folder / str(point["seed"])
    base = "tinytown" if condition in ("base", "no SFT") else str(place / "sft")
    model, tokenizer = models.load(base)
    learned = reward.RewardModel.load(place / "reward")
    untrained = reward.RewardModel.load(place / "untrained")
    target = {"gold": gold_reward, "no reward model": untrained}.get(condition, learned)
    rows = preferences.prompts(point["prompts"], seed=3000 + point["seed"])
    history: list[Row] = []
    if condition in critic_free.METHODS:
        options = {"method": condition, "epochs": point["critic_free_epochs"]}
        config = common.config(critic_free.CriticFreeConfig, point, **options)
        history = critic_free.train(model, tokenizer, rows, learned, config)
    elif condition not in ("base", "SFT"):
        log = {"on_rollout": lambda *found: history.append(entry(*found, learned))}
        config = common.config(ppo.PPOConfig, point)
        ppo.train(model, tokenizer, rows, target, config, progress=False, **log)
    seconds = round(time.perf_counter() - started, 1)
    found = scores(model, tokenizer, learned, point["test_prompts"])
    return found | {"history": history, "seconds": seconds}


def gold_reward(prompts: list, responses: list[str], rows: list[Row]) -> list[float]:
    """The judge's total, on a scale like that of a normalized reward."""
    return [6 * judge(row, text).total - 4 for row, text in zip(rows, responses, strict=True)]


def gold_scores(rows: Sequence[Row], responses: Sequence[str]) -> dict[str, float]:
    verdicts = [judge(row, text) for row, text in zip(rows, responses, strict=True)]
    return {name: statistics.fmean(getattr(v, name) for v in verdicts) for name in PARTS}


def entry(rollout: Any, metrics: dict[str, float], learned: reward.RewardModel) -> Row:
    """A step of a run's history."""
    found = {name: metrics[name] for name in CURVES if name in metrics}
    found["learned"] = statistics.fmean(learned(rollout.prompts, rollout.responses))
    found |= gold_scores(rollout.rows, rollout.responses)
    return {name: round(value, 4) for name, value in found.items()}


def scores(model: Any, tokenizer: Any, learned: reward.RewardModel, n: int) -> Row:
    """On held-out prompts: learned reward, gold scores, and the first eight texts."""
    rows = preferences.prompts(n, seed=5, split="test")
    texts = [text for (text,) in sampled(model, tokenizer, rows, seed=2)]
    found = {f"test_{name}": value for name, value in gold_scores(rows, texts).items()}
    mean = statistics.fmean(learned([row["prompt"] for row in rows], texts))
    return found | {"test_learned": mean, "texts": texts[:8]}


if __name__ == "__main__":
    made = {"sft_rows": 4000, "flawed": 1 / 3, "rankings": 1000, "noise": 0.1, "reward_rate": 1e-3}
    rollouts = {"steps": 25, "batch_size": 128, "minibatch_size": 32, "learning_rate": 1e-4}
    counts = {"critic_free_epochs": 1, "prompts": 2000, "test_prompts": 300}
    args = sweep.arguments(__doc__, workers=1, **made, **rollouts, **counts)
    folder = args.json.with_suffix(".models")
    for seed in range(args.seeds):
        prepare(folder / str(seed), seed, {name: args.settings[name] for name in made})
    sweep.over_seeds(partial(measure, folder=folder), CONDITIONS, args)
