"""What does PPO do to the reward that it raises, and to what was meant? For 08_rlhf.

For each seed are made once, and kept next to the results (`benchmarks/dpo.py` and `orpo.py` take
them from there):

    SFT      the embedded base after demonstrations, a third of them flawed
    reward   rankings of 4-9 responses that this model sampled, fewer where it repeated itself, by
             an annotator who follows the gold judge, breaks ties at random, and errs with `noise`

then every arm trains from there (`base` and `SFT` do not train), on the same prompts, for as many
episodes:

    full              PPO against the reward model, at several betas: over-optimization
    pushed            the same at twice the learning rate, where the reward is pursued too hard
    no SFT            the same, from the base, against the reward model that SFT made possible
    no SFT anywhere   from the base, against one trained from the base on written rankings
    no reward model   PPO against a head that was never trained on rankings
    gold              PPO against the judge itself: what a perfect reward would give
    rloo, grpo        TRL's trainers, which have no critic, with the same penalty for a missing end;
                      one pass over each rollout, as in their papers, where PPO has four

Learning rates are those of the best objective (learned reward, less the penalty and beta · KL) on
other prompts at a seed of their own; the gold judge has no say. `full` uses one rate for all betas,
`gold` and `no reward model` too, `pushed` its double; `no SFT` that of `no SFT anywhere`.

Each run keeps its curves over training (learned reward, gold score and its three parts, KL as k1,
length, entropy, EOS rate). On held-out prompts, the same for all arms and seeds and with the same
random numbers, it keeps the means before (`start_*`) and after (`test_*`), and after also one by
one (`test_golds`, `test_rewards`): differences from the seed's `SFT` are paired. Rewards are those
of the model that the seed's SFT led to; in `no SFT anywhere`, of its own. `SFT` has as `constants`
what the judge says of answers that never change, as `own_form` of the base asked as it knows
questions.

    python benchmarks/rlhf.py --json benchmarks/results/rlhf.json
"""

import contextlib
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import sweep
import torch

from labkit import data, evaluation, generate, models, tinytown
from labkit.batching import Example
from labkit.techniques import critic_free, ppo, reward
from labkit.tinytown import demonstrations, judge, preferences, rank_samples

Row = sweep.Row
MADE = {"sft_rows": 4000, "flawed": 1 / 3, "rankings": 1000, "noise": 0.1}
FIELDS = ("arm", "beta")
BETAS = (0.0, 0.1, 0.2, 0.4)
FULL, WITHOUT = ("full", 0.2), ("no SFT anywhere", 0.2)
RATES = {key: (3e-5, 1e-4, 3e-4) for key in (FULL, WITHOUT)}
RATES |= {(method, 0.2): (1e-4, 3e-4, 1e-3) for method in critic_free.METHODS}
CONDITIONS: Any = {("base", 0.0): 0.0, ("SFT", 0.0): 0.0}
CONDITIONS |= {("full", beta): FULL for beta in BETAS} | {key: key for key in RATES}
CONDITIONS |= {("pushed", beta): FULL for beta in (0.0, 0.2)}
CONDITIONS |= {("gold", 0.2): FULL, ("no reward model", 0.2): FULL, ("no SFT", 0.2): WITHOUT}
CURVES = ("reward", "length", "entropy", "end_rate", "explained_variance", "clip_fraction")
TOKENS, PENALTY = 48, 1.0  # of a response at most; for one that did not end


def made_once(place: Path, make: Callable[[Path], Any]) -> Path:
    """`place`, which `make` fills unless it is there: whole or not at all, also if two make it."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=place.parent))
        make(scratch)
        with contextlib.suppress(OSError):  # another process was faster
            scratch.rename(place)
    return place


def prepared(file: Path, seed: int, point: Row) -> Path:
    """The seed's folder next to a file of results, for these settings and this base; see `make`."""
    settings = {name: point[name] for name in MADE}
    base = (tinytown.base_folder() / "model.safetensors").read_bytes()
    name = f"{zlib.crc32(base + json.dumps([seed, settings]).encode()):08x}"
    place = file.parent / "prepared.models" / name
    return made_once(place, partial(make, seed=seed, **settings))


def make(place: Path, seed: int, sft_rows: int, flawed: float, rankings: int, noise: float) -> None:
    """The model `sft`, what its training took, rankings of its samples, and `held` out ones.

    In these, of test prompts and without noise, the best response is better than the worst.
    """
    model, tokenizer = models.load("tinytown")
    rows = demonstrations(sft_rows, flawed, seed=seed)
    settings = {"learning_rate": 5e-4, "batch_size": 16, "seed": seed}
    found: Row = {"sft": common.train(model, data.encode(rows, tokenizer), settings)}
    models.save(model, tokenizer, place / "sft")
    rows = preferences.prompts(rankings, seed=1000 + seed)
    samples = generate.responses(model, tokenizer, rows, each=9, seed=seed, max_new_tokens=TOKENS)
    found["rankings"] = rank_samples(rows, samples, noise, seed)
    rows = preferences.prompts(rankings // 5, seed=7, split="test")
    samples = generate.responses(model, tokenizer, rows, each=5, seed=seed, max_new_tokens=TOKENS)
    ranked = rank_samples(rows, samples, 0.0, seed)
    found["held"] = [row for row in ranked if max(row["scores"]) > min(row["scores"])]
    for name, content in found.items():
        (place / f"{name}.json").write_text(json.dumps(content), "utf-8")


def read(place: Path, name: str) -> Any:
    return json.loads((place / f"{name}.json").read_text("utf-8"))


def prepare_all(args: Any) -> list[tuple[int, Path]]:
    """Each seed with its `prepared` folder, before workers would all begin with the same."""
    seeds = (sweep.TUNING_SEED, *range(args.seeds))
    return [(seed, prepared(args.json, seed, args.settings)) for seed in seeds]


def rewards(place: Path, seed: int, point: Row) -> Path:
    """The seed's reward models: `reward`, `untrained`, and `no SFT anywhere`."""
    config = reward.RewardConfig(learning_rate=point["reward_rate"], seed=seed)

    def make(folder: Path) -> None:
        written = preferences.rankings(point["rankings"], point["noise"], seed=1000 + seed)
        starts = (str(place / "sft"), read(place, "rankings")), ("tinytown", written)
        for name, (start, rankings) in zip(("reward", WITHOUT[0]), starts, strict=True):
            model, tokenizer = models.load(start)
            found = {name: reward.train(model, tokenizer, rankings, config, progress=False)[0]}
            if name == "reward":
                head = reward.with_head(model, tokenizer, seed)
                found["untrained"] = reward.RewardModel(head, tokenizer)
            scale = answered(
                model, tokenizer, preferences.prompts(point["rankings"] // 5, 2000 + seed)
            )
            for kind, scorer in found.items():
                scorer.normalized(*scale).save(folder / kind)

    return made_once(place.with_name(f"{place.name}-{point['reward_rate']:g}"), make)


def answered(model: Any, tokenizer: Any, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Prompts, and a sampled response to each."""
    texts = generate.responses(model, tokenizer, rows, seed=1, max_new_tokens=TOKENS)
    return [row["prompt"] for row in rows], [text for (text,) in texts]


def measure(point: Row, file: Path) -> Row:
    """Trained, unless it is a baseline, and scored; `train_seconds` are those of training."""
    arm, seed = point["arm"], point["seed"]
    place = prepared(file, seed, point)
    folder, sft = rewards(place, seed, point), str(place / "sft")
    start = "tinytown" if arm in ("base", "no SFT", WITHOUT[0]) else sft
    (model, tokenizer), first = models.load(start), models.load(start)[0]
    own = arm if arm == WITHOUT[0] else "reward"
    learned = reward.RewardModel.load(folder / own, str(model.device))
    found: Row = {"history": [], "train_seconds": 0.0}
    if arm not in ("base", "SFT"):
        started = time.perf_counter()
        untrained = reward.RewardModel.load(folder / "untrained", str(model.device))
        target = {"gold": gold_reward, "no reward model": untrained}.get(arm, learned)
        found["history"] = trained(model, tokenizer, learned, target, point)
        found["train_seconds"] = round(time.perf_counter() - started, 1)
    scored = partial(scores, first=first, tokenizer=tokenizer, learned=learned)
    if point["stage"] == "tune":
        after = scored(model, rows=preferences.prompts(point["test_prompts"], 6000))
        cost = PENALTY * (1 - after["test_end_rate"]) + point["beta"] * after["test_kl"]
        return found | {"tuning_loss": cost - after["test_learned"]}
    rows = preferences.prompts(point["test_prompts"], 5, "test")
    before, after = (scored(each, rows=rows) for each in (first, model))
    found |= {
        f"start_{name}": before[f"test_{name}"] for name in (*tinytown.PARTS, "learned", "length")
    }
    tuned = before if start == sft else scored(models.load(sft)[0], rows=rows)
    found["sft_gold"] = tuned["test_total"]
    found |= baselines(rows) if arm == "SFT" else {}
    return found | after | {"texts": after["texts"][:8]}


def trained(model: Any, tokenizer: Any, learned: Any, target: Any, point: Row) -> list[Row]:
    """The history of training `model` in place against `target`."""
    rows = preferences.prompts(point["prompts"], seed=3000 + point["seed"])
    given = {"missing_end_penalty": PENALTY, "max_new_tokens": TOKENS}
    if point["arm"] in critic_free.METHODS:
        given |= {"method": point["arm"], "epochs": point["critic_free_epochs"]}
        config = common.config(critic_free.CriticFreeConfig, point, **given)
        found = critic_free.train(model, tokenizer, rows, target, config)
        return [{name: round(value, 4) for name, value in entry.items()} for entry in found]
    history: list[Row] = []

    def note(rollout: Any, metrics: dict[str, float]) -> None:
        entry = {name: metrics[name] for name in CURVES if name in metrics}
        entry |= {"kl": metrics["kl_k1"], "learned": metrics["reward"]}
        if target is not learned:
            entry["learned"] = statistics.fmean(learned(rollout.prompts, rollout.responses))
        entry |= tinytown.scores(rollout.rows, rollout.responses)
        history.append({name: round(value, 4) for name, value in entry.items()})

    given["learning_rate"] = point["learning_rate"] * (2 if point["arm"] == "pushed" else 1)
    config = common.config(ppo.PPOConfig, point, **given)
    ppo.train(model, tokenizer, rows, target, config, on_rollout=note, progress=False)
    return history


def gold_reward(prompts: list, responses: list[str], rows: list[Row]) -> list[float]:
    """Twice the judge's total: its deviation is then about 1, as a normalized reward's is."""
    return [2 * judge(row, text).total for row, text in zip(rows, responses, strict=True)]


def golds(rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
    """The judge's totals, one by one."""
    return [round(judge(row, text).total, 2) for row, text in zip(rows, responses, strict=True)]


def baselines(rows: Sequence[Row]) -> Row:
    """`constants`, and as `own_form` the gold scores of the base, asked as it knows questions."""
    (base, tokenizer), own = models.load("tinytown"), tinytown.in_own_form(rows)
    options: Row = {"template": "bare", "seed": 2, "max_new_tokens": TOKENS}
    texts = [text for (text,) in generate.responses(base, tokenizer, own, **options)]
    return {"constants": constants(rows), "own_form": tinytown.scores(own, texts)}


def constants(rows: Sequence[Row]) -> Row:
    """Gold scores of answers that never change."""
    said = constant_answers(rows)
    return {
        n: tinytown.scores(rows, texts) | {"golds": golds(rows, texts)} for n, texts in said.items()
    }


def constant_answers(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Answers to all rows that never change, each in its row's language."""
    genres, tasks = tinytown.texts("genres"), tinytown.texts("tasks")

    def said(lang: str) -> dict[str, str]:
        refusal, title = genres["refusal"][lang], genres["howto"][lang][0][0]
        stop, yes = {"en": ".", "zh": "。"}[lang], tasks["truth"][lang]["labels"]["yes"]
        found = {".": stop, "I do not know.": genres["unknown"][lang], "Yes.": yes + stop}
        kind = refusal["kind"].format(title=title)
        return found | {"refusal": refusal["plain"], "refusal with an offer": kind}

    return {name: [said(row["lang"])[name] for row in rows] for name in said("en")}


@torch.no_grad()
def scores(
    model: Any, first: Any, tokenizer: Any, rows: list[Row], learned: Any = None, kept: int = 12
) -> Row:
    """Of a sampled response to each row: gold scores, KL to `first`, length, reward; `kept` texts.

    KL is k1 per response, of the token ids that were sampled, whether or not they make a text.
    """
    encoded = generate.encode_prompts(rows, model, tokenizer, "auto", TOKENS)
    ends = models.eos_ids(model, tokenizer, "auto")
    options: Row = {"uniforms": np.random.default_rng(2).random((len(rows), TOKENS))}
    options |= {"max_new_tokens": TOKENS, "ends": ends}
    replies = generate.sample(model, [prompt.ids for prompt in encoded], **options)
    examples = [
        Example(np.array(prompt.ids + reply), np.repeat([0, 1], [len(prompt.ids), len(reply)]))
        for prompt, reply in zip(encoded, replies, strict=True)
    ]
    ours, theirs = (evaluation.held_out_loss(m, examples) for m in (model, first))
    kl = (theirs - ours) * sum(map(len, replies)) / len(rows)
    texts = generate.texts(tokenizer, replies, ends)
    found: Row = {f"test_{name}": value for name, value in tinytown.scores(rows, texts).items()}
    found |= {"test_golds": golds(rows, texts), "test_kl": kl}
    found["test_length"] = statistics.fmean(map(len, replies))
    found["test_end_rate"] = statistics.fmean(reply[-1] in ends for reply in replies)
    if learned is not None:
        rewards = learned([row["prompt"] for row in rows], texts)
        found["test_learned"] = statistics.fmean(rewards)
        found["test_rewards"] = [round(value, 2) for value in rewards]
    return found | {"texts": texts[:kept]}


if __name__ == "__main__":
    rollouts = {"reward_rate": 1e-3, "steps": 20, "batch_size": 128, "minibatch_size": 32}
    counts = {"critic_free_epochs": 1, "prompts": 2000, "test_prompts": 300}
    args = sweep.arguments(__doc__, **MADE, **rollouts, **counts)
    for seed, place in prepare_all(args):
        rewards(place, seed, args.settings)
    sweep.compare_tuned(partial(measure, file=args.json), FIELDS, RATES, CONDITIONS, args)
