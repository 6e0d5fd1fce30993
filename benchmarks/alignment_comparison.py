"""What do the ways of aligning make of one base and one set of preferences, at what cost? For 13.

The SFT model and the rankings are those of `benchmarks/rlhf.py`, made anew for each seed. All arms
but the first four train on these rankings; CAI sees their prompts and responses, but no rank.

    base      the base as it is, behind the chat template
    constant  a refusal with an offer, whatever is asked
    SFT       demonstrations, a third of them flawed; all arms but ORPO start from here
    PPO       a reward model of the rankings, then PPO against it
    RLOO      the same reward model, no critic
    DPO       the best and the worst response of each ranking
    ORPO      the same pairs, from the base
    CAI       one critique and revision of a response to each prompt, SFT on the revisions, then DPO
              on a language model's labels of two responses to each prompt
    length    DPO that prefers the longest response of each ranking to the shortest: a policy that
              a judge with a taste for length would like

Each run keeps what its own training cost (CPU seconds; of seed 0 the operations of its matrix
products, counted as they run, and the allocator's peak over three steps or one rollout, other
models that it needs included); KL to SFT, share of responses that ended, length; the gold scores of
a sampled response to each held-out prompt; and what five ways of evaluating say of the same:

    reward      the mean score of the seed's reward model
    judge       the base model as judge, in the town's own form, of the response and SFT's to the same
                prompt, in both orders: a win needs both (`judge`: 1, 0.5 or 0)
    benchmark   accuracy on questions of the test split, greedy
    HHH         the base model's criticism of each response: the shares in which it finds no fault
                with its help, honesty, harmlessness
    A/B         two annotators, between the response and SFT's, who follow the gold score, call equal
                scores a tie, and vote at random with `noise` (`votes`); their kappa

Learning rates are those of the best gold score on other prompts at a seed of their own; those of
DPO and ORPO were found by `benchmarks/dpo.py` and `orpo.py`, on the same data and by the same rule.

    python benchmarks/alignment_comparison.py --json benchmarks/results/alignment_comparison.json
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import common
import dpo
import rlhf
import sweep
from torch.utils.flop_counter import FlopCounterMode

from labkit import data, evaluation, judging, memory, models, respond, tinytown
from labkit.techniques import constitutional as cai
from labkit.techniques import dpo as labkit_dpo
from labkit.techniques import orpo, reward
from labkit.tinytown import demonstrations, preferences

Row = sweep.Row
Learn = Callable[..., Any]  # (model, tokenizer, place, point, few) → None: trains in place
ONLINE = {"PPO": "full", "RLOO": "rloo"}
RATES = {("PPO",): (1e-5, 3e-5, 1e-4), ("RLOO",): (1e-4, 3e-4), ("CAI",): (3e-5, 1e-4, 3e-4)}
CONDITIONS: Any = {("base",): 0.0, ("constant",): 0.0, ("SFT",): 5e-4, ("DPO",): 3e-5}
CONDITIONS |= {("ORPO",): 2.5e-4, ("length",): 3e-5} | {key: key for key in RATES}
REVISED_RATE = 3e-4  # of SFT on revisions
FAULTS = {  # of `text/genres.yaml`, that a criticism may name
    "helpful": "wrong wrong_aside rude_wrong unknown refusal plain aside",
    "honest": "wrong wrong_aside rude_wrong guess",
    "harmless": "rude rude_right rude_wrong steps rude_steps",
}
WORDS = 24  # tokens of a criticism


def measure(point: Row, file: Path) -> Row:
    """Trained, unless it is a baseline, and scored."""
    arm, seed = point["arm"], point["seed"]
    place = rlhf.prepared(file, seed, point)
    sft, tokenizer = models.load(str(place / "sft"))
    start = "tinytown" if arm in ("base", "constant", "ORPO", "SFT") else str(place / "sft")
    model, found = models.load(start)[0], Row()
    if arm in LEARN:
        first = models.load(start)[0] if seed == 0 else None
        found = trained(model, first, tokenizer, place, point)
    model = sft if arm == "SFT" else model
    if point["stage"] == "tune":
        rows = preferences.prompts(point["test_prompts"], 6000)
        return found | {"tuning_loss": -rlhf.scores(model, sft, tokenizer, rows)["test_total"]}
    rows = preferences.prompts(point["test_prompts"], 5 + seed, "test")
    theirs = rlhf.scores(sft, sft, tokenizer, rows, kept=len(rows))
    learned = reward.RewardModel.load(reward_model(place, point), str(model.device))
    if arm == "constant":
        texts = rlhf.constant_answers(rows)["refusal with an offer"]
        found |= {f"test_{name}": value for name, value in tinytown.scores(rows, texts).items()}
        rewards = learned([row["prompt"] for row in rows], texts)
        found |= {"test_learned": statistics.fmean(rewards), "test_golds": rlhf.golds(rows, texts)}
    else:
        found |= rlhf.scores(model, sft, tokenizer, rows, learned, kept=len(rows))
        texts = found.pop("texts")
    found["benchmark"] = benchmark(None if arm == "constant" else model, tokenizer, point)
    found |= evaluated(rows[: point["judged"]], texts, theirs["texts"], tokenizer, seed)
    found["votes"], found["kappa"] = votes(found["test_golds"], theirs["test_golds"], point)
    wins = judging.by_score(found["test_golds"], theirs["test_golds"])  # ties as half
    found["win_rate"] = judging.rate(wins).mean
    if arm in ONLINE:
        found["reward_cost"] = json.loads((reward_model(place, point) / "cost.json").read_text())
    return found | {"texts": texts[:8]}


def trained(model: Any, first: Any, tokenizer: Any, place: Path, point: Row) -> Row:
    """Trains `model` in place; what that cost, with the peak of memory where `first`, its twin, is."""
    learn = partial(LEARN[point["arm"]], tokenizer=tokenizer, place=place, point=point)
    found: Row = {}
    if first is not None:
        with memory.measured(first) as used:  # a profiler is slow: three steps
            beside = learn(first, few=True) or 0
        found["peak_bytes"] = used.peak_bytes + beside
    return cost(point, partial(learn, model))[1] | found


def cost(point: Row, run: Callable[[], Any]) -> tuple[Any, Row]:
    """What `run` gives, and CPU seconds; of seed 0 operations, since counting them takes time."""
    if point["seed"]:
        started = time.process_time()
        return run(), {"cpu_seconds": round(time.process_time() - started, 1)}
    with FlopCounterMode(display=False) as counter:
        found = run()
    return found, {"flops": counter.get_total_flops()}


def settings(point: Row) -> Row:
    return {k: point[k] for k in ("learning_rate", "seed", "batch_size")}


def supervised(model: Any, tokenizer: Any, place: Path, point: Row, few: bool = False) -> None:
    """As `rlhf.make` does it; here for its cost."""
    rows = demonstrations(point["sft_rows"], point["flawed"], seed=point["seed"])
    rows = rows[: 3 * point["batch_size"]] if few else rows
    common.train(model, data.encode(rows, tokenizer), settings(point))


def online(model: Any, tokenizer: Any, place: Path, point: Row, few: bool = False) -> int:
    """PPO or RLOO; returns the bytes of the reward model."""
    learned = reward.RewardModel.load(reward_model(place, point), str(model.device))
    own = {"prompts": point["rollout_prompts"], "batch_size": point["episodes"]}
    own["beta"] = point["online_beta"]
    given = point | own | {"arm": ONLINE[point["arm"]]} | ({"steps": 1} if few else {})
    rlhf.trained(model, tokenizer, learned, learned, given)
    return memory.held(learned.network)


def on_pairs(model: Any, tokenizer: Any, place: Path, point: Row, few: bool = False) -> None:
    """DPO, ORPO, or DPO on lengths."""
    ranked = rlhf.read(place, "rankings")
    rows = dpo.one_pair_each(ranked)
    if point["arm"] == "length":
        sides = [sorted(row["responses"], key=len) for row in ranked]
        pairs = zip(ranked, sides, strict=True)
        rows = [{"prompt": r["prompt"], "chosen": s[-1], "rejected": s[0]} for r, s in pairs]
    rows = rows[: 3 * point["batch_size"]] if few else rows
    if point["arm"] == "ORPO":
        config = orpo.ORPOConfig(epochs=point["orpo_epochs"], **settings(point))
        orpo.train(model, tokenizer, rows, config, progress=False)
    else:
        config = labkit_dpo.DPOConfig(**settings(point))
        labkit_dpo.train(model, tokenizer, rows, config, progress=False)


def constitutional(model: Any, tokenizer: Any, place: Path, point: Row, few: bool = False) -> int:
    """Both halves of CAI on the rankings' first two responses; returns the bytes of the critic."""
    ranked = rlhf.read(place, "rankings")
    ranked = ranked[: 3 * point["batch_size"]] if few else ranked
    first, second = ([row["responses"][i] for row in ranked] for i in (0, 1))
    critic = models.load("tinytown")[0]
    ask = respond.from_model(critic, tokenizer, template="bare", max_new_tokens=rlhf.TOKENS)
    chains = cai.revise(ranked, first, ask, cai.load(), rounds=1, seed=point["seed"])
    revised = [
        {"prompt": r["prompt"], "completion": c[0].response}
        for r, c in zip(ranked, chains, strict=True)
        if c[0].response
    ]
    options = settings(point) | {"learning_rate": REVISED_RATE}
    common.train(model, data.encode(revised, tokenizer), options)
    letters = cai.letters_of_model(critic, tokenizer, template="bare")
    both = cai.compare(ranked, first, second, letters, cai.load(), seed=point["seed"])
    columns = zip(ranked, first, second, cai.soft_labels(both).tolist(), strict=True)
    pairs = [{"prompt": r["prompt"], "first": a, "second": b, "label": p} for r, a, b, p in columns]
    cai.train(model, tokenizer, pairs, labkit_dpo.DPOConfig(**settings(point)), progress=False)
    return memory.held(critic)


LEARN: dict[str, Learn] = {"SFT": supervised, "PPO": online, "RLOO": online, "CAI": constitutional}
LEARN |= {"DPO": on_pairs, "ORPO": on_pairs, "length": on_pairs}


def reward_model(place: Path, point: Row) -> Path:
    """The folder of the seed's reward model, and what its training cost, in `cost.json`."""
    seed, rankings = point["seed"], rlhf.read(place, "rankings")

    def make(folder: Path) -> None:
        model, tokenizer = models.load(str(place / "sft"))
        rows = preferences.prompts(point["rankings"] // 5, 2000 + seed)
        scale = rlhf.answered(model, tokenizer, rows)
        config = reward.RewardConfig(learning_rate=point["reward_rate"], seed=seed)
        learn = partial(reward.train, model, tokenizer, rankings, config, progress=False)
        (learned, _), spent = cost(point, learn)
        learned.normalized(*scale).save(folder)
        (folder / "cost.json").write_text(json.dumps(spent), "utf-8")

    return rlhf.made_once(place.with_name(f"{place.name}-reward-{point['reward_rate']:g}"), make)


@cache
def base() -> Any:
    return models.load("tinytown")[0]


def benchmark(model: Any, tokenizer: Any, point: Row) -> float:
    """Accuracy on test questions; of a refusal without a model."""
    rows = tinytown.instruction_rows("test", point["questions"], point["seed"])
    if model is None:
        said = rlhf.constant_answers(rows)["refusal with an offer"]
        return evaluation.score(rows, said).accuracy
    return evaluation.exact(model, tokenizer, rows).accuracy


def evaluated(
    rows: list[Row], texts: Sequence[str], theirs: Sequence[str], tokenizer: Any, seed: int
) -> Row:
    """The base model as judge of pairs (`judge`), and of one response at a time (`hhh`)."""
    rules, letters = cai.load(), cai.letters_of_model(base(), tokenizer, template="bare")
    asked = [i for i in range(len(rows)) if texts[i] != theirs[i]]
    verdicts = [0.5] * len(rows)
    if asked:
        columns: Any = ([each[i] for i in asked] for each in (rows, texts, theirs))
        both = cai.compare(*columns, letters, rules, seed=seed)
        for i, low, high in zip(asked, both.min(1), both.max(1), strict=True):
            verdicts[i] = 1.0 if low > 0.5 else 0.0 if high < 0.5 else 0.5
    critic = respond.from_model(base(), tokenizer, template="bare", max_new_tokens=WORDS)
    parts = [cai.section(rules, row) for row in rows]
    prompts = [
        part.ask("critique", part.principles[i % len(part.principles)], prompt=p, response=texts[i])
        for i, (part, p) in enumerate(zip(parts, (row["prompt"] for row in rows), strict=True))
    ]
    found = [fault(row["lang"], reply) for row, reply in zip(rows, critic(prompts), strict=True)]
    hhh = {
        name: statistics.fmean(f not in of.split() for f in found) for name, of in FAULTS.items()
    }
    return {"judge": verdicts, "hhh": hhh}


def fault(lang: str, criticism: str) -> str:
    """The fault that a criticism names, by the longest name in it; "" where there is none."""
    named = tinytown.texts("genres")["faults"][lang].items()
    found = [(len(name), key) for key, (name, *_) in named if name in criticism]
    return max(found, default=(0, ""))[1]


def votes(ours: Sequence[float], theirs: Sequence[float], point: Row) -> tuple[Any, Row]:
    """Of the first annotator, and how far a second one agrees."""

    def annotator(number: int) -> list[float]:
        rng = Random(f"annotator-{number}-{point['seed']}-{point['arm']}")
        sure = judging.by_score(ours[: point["voted"]], theirs[: point["voted"]])
        return [rng.choice((0.0, 0.5, 1.0)) if rng.random() < point["noise"] else v for v in sure]

    first, second = annotator(1), annotator(2)
    return first, asdict(judging.kappa(first, second))


if __name__ == "__main__":
    made = {"reward_rate": 5e-4, "steps": 20, "episodes": 128, "minibatch_size": 32}
    made |= {"online_beta": 0.2, "critic_free_epochs": 1, "rollout_prompts": 2000}
    made |= {"batch_size": 16, "orpo_epochs": 3.0}
    counts = {"test_prompts": 200, "questions": 200, "judged": 100, "voted": 60}
    args = sweep.arguments(__doc__, seeds=5, workers=1, **rlhf.MADE, **made, **counts)
    for seed, place in rlhf.prepare_all(args):
        reward_model(place, args.settings | {"seed": seed})
    sweep.compare_tuned(partial(measure, file=args.json), ("arm",), RATES, CONDITIONS, args)
