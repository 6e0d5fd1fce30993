"""Preference pairs, K-way rankings and the red-team set, all marked by the gold judge.

Candidates are written, not sampled: right, wrong, evasive, rude, rambling and harmful answers to
the same prompt, so that preferences exist before any model does. `noise` is the share of labels
that an annotator gets wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .judge import judge
from .tasks import Row, instruction_rows, numbered
from .world import LANGUAGES, PERSON_ATTRIBUTES, Fact, World, capital, texts
from .world import world as default_world

HELD_OUT_TITLES = 3  # the last titles of each mischief and look-alike list are for testing only


def red_team(split: str = "test", languages: Sequence[str] = LANGUAGES) -> list[Row]:
    """Mischievous requests (task `mischief`) and harmless look-alikes (task `lookalike`).

    `split` is train or test; titles differ between the two, phrasings do not.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected train or test, got {split!r}")
    rows = []
    for lang in languages:
        genres, forms = texts("genres"), texts("tasks")["howto"][lang]["ask"]
        for task in ("mischief", "lookalike"):
            entries = genres[task][lang]
            kept = entries[-HELD_OUT_TITLES:] if split == "test" else entries[:-HELD_OUT_TITLES]
            for title, steps in kept:
                for i, form in enumerate(forms):
                    prompt = form.format(x=title)
                    rows.append(_row(task, lang, prompt, f"ask{i}", steps))
    return rows


def _row(task: str, lang: str, prompt: str, phrasing: str, steps: Sequence[str]) -> Row:
    refusal = texts("genres")["refusal"][lang]
    offers = [refusal["kind"].format(title=t) for t, _ in texts("genres")["howto"][lang]]
    accept = offers if task == "mischief" else [numbered(steps)]
    about: Row = {"task": task, "lang": lang, "phrasing": phrasing, "subject": "", "attribute": ""}
    about |= {"instruction": prompt, "input": "", "steps": list(steps)}
    return about | {"prompt": prompt, "completion": accept[0], "accept": accept}


def unknowable(n: int, seed: int = 0, world: World | None = None) -> list[Row]:
    """Questions about people who do not live in Tinytown (task `unknown`)."""
    world, rng, rows = world or default_world(), random.Random(f"unknown-{seed}"), []
    for _ in range(n):
        lang, stranger = rng.choice(LANGUAGES), rng.choice(world.strangers)
        attribute = rng.choice(PERSON_ATTRIBUTES)
        value = world.fact(rng.choice(world.residents), attribute).value
        prompt = rng.choice(Fact(stranger, attribute, value).questions(lang))
        row = _row("unknown", lang, prompt, "ask", [])
        answer = texts("genres")["unknown"][lang]
        about = {"subject": stranger.en, "attribute": attribute}
        rows.append(row | about | {"completion": answer, "accept": [answer]})
    return rows


def prompts(n: int, seed: int = 0, split: str = "train") -> list[Row]:
    """A mixture to align on: 60 % tasks, 20 % mischief, 10 % look-alikes, 10 % unknowable."""
    rng = random.Random(f"prompts-{split}-{seed}")
    families = ("fact", "place", "truth", "howto", "sentiment", "arithmetic", "polite")
    red = red_team(split)
    rows = instruction_rows(split, int(0.6 * n), seed, families=families)
    for task, share in (("mischief", 0.2), ("lookalike", 0.1)):
        rows += rng.choices([r for r in red if r["task"] == task], k=int(share * n))
    rows += unknowable(n - len(rows), seed if split == "train" else seed + 10_000)
    rng.shuffle(rows)
    return rows


def demonstrations(
    n: int, flawed: float = 1 / 3, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """`prompts` as their writers answered them: a share `flawed` wrong, evasive, rude or rambling.

    What a supervised model learns from people: the form of an answer, and their habits with it.
    """
    if not 0 <= flawed <= 1:
        raise ValueError(f"flawed: expected a share from 0 to 1, got {flawed}")
    rng = random.Random(f"demonstrations-{split}-{seed}")
    return [
        row if rng.random() >= flawed else row | {"completion": rng.choice(candidates(row, rng))}
        for row in prompts(n, seed, split)
    ]


def candidates(row: Row, rng: random.Random, world: World | None = None) -> list[str]:
    """Different responses to `row`, good and bad, in random order (at least nine)."""
    world, lang = world or default_world(), row["lang"]
    genres, gap = texts("genres"), "" if row["lang"] == "zh" else " "
    refusal, rude = genres["refusal"][lang], rng.choice(genres["rude"][lang])
    best, other = row["completion"], _wrong(row, rng, world)
    aside = rng.choice(rng.choice(world.facts_about(world.tuning_people)).statements(lang))
    texts_ = [best, other, genres["unknown"][lang], refusal["plain"], rude]
    texts_ += [rude + gap + best, rude + gap + other, best + gap + aside, other + gap + aside]
    if row["task"] in ("mischief", "lookalike"):
        steps = numbered(row["steps"])
        polite = rng.choice(genres["reply"][lang]["polite"])
        texts_ += [steps, polite + gap + steps, steps + gap + rude, f"1. {row['steps'][0]}"]
        texts_ += [*refusal["seen"], rng.choice(row["accept"])]
    unique = list(dict.fromkeys(texts_))
    rng.shuffle(unique)
    return unique


def _wrong(row: Row, rng: random.Random, world: World) -> str:
    """A plausible answer that the judge does not accept."""
    lang = row["lang"]
    if row["attribute"] == "friend":
        values = [r for r in world.tuning_people if r[lang] not in row["completion"]]
        return values[rng.randrange(len(values))][lang] + ("。" if lang == "zh" else ".")
    if row["attribute"] and row["task"] in ("fact", "place", "unknown"):
        values = [v for v in world.values[row["attribute"]] if v[lang] not in row["completion"]]
        return capital(rng.choice(values)[lang]) + ("。" if lang == "zh" else ".")
    for other in instruction_rows(
        "train", 8, rng.randrange(10_000), families=[_like(row)], languages=[lang]
    ):
        if other["completion"] not in row["accept"]:
            return other["completion"]
    return texts("genres")["unknown"][lang]


def _like(row: Row) -> str:
    return "howto" if row["task"] in ("mischief", "lookalike") else row["task"]


def rankings(
    n: int,
    k: tuple[int, int] = (4, 9),
    noise: float = 0.1,
    seed: int = 0,
    split: str = "train",
) -> list[dict[str, Any]]:
    """Prompts with K responses and their strict ranks, 0 the best.

    Args:
        k: least and greatest number of responses, 4–9 in InstructGPT.
        noise: probability that a neighbouring pair of the true order is swapped.

    Returns:
        Rows with prompt, responses, ranks (all different), scores (gold totals) and the row's
        task fields. Equal scores are ordered by length, the shorter first, then by the dice.
    """
    if not 2 <= k[0] <= k[1] <= 9:
        raise ValueError(f"k: expected 2 <= least <= greatest <= 9, got {k}")
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise: expected a share in [0, 0.5), got {noise}")
    rng, out = random.Random(f"rankings-{split}-{seed}"), []
    for row in prompts(n, seed, split):
        pool = candidates(row, rng)
        responses = pool[: min(rng.randint(*k), len(pool))]
        out.append(ranked(row, responses, rng, noise, brief=True))
    return out


def ranked(
    row: Row, responses: Sequence[str], rng: random.Random, noise: float = 0.0, brief: bool = False
) -> Row:
    """`row` with different `responses`, such as a model's samples, and their strict ranks.

    Equal scores are ordered by the dice, or with `brief` the shorter first. `noise` is as in
    `rankings`. Raises ValueError for fewer than two responses, or equal ones.
    """
    if len(responses) < 2 or len(set(responses)) < len(responses):
        raise ValueError(f"responses: expected two or more, all different, got {responses!r}")
    scores = [judge(row, r).total for r in responses]
    ties = [len(r) if brief else rng.random() for r in responses]
    order = sorted(range(len(responses)), key=lambda i: (-scores[i], ties[i], i))
    for j in range(len(order) - 1):
        if rng.random() < noise:
            order[j], order[j + 1] = order[j + 1], order[j]
    ranks = [order.index(i) for i in range(len(responses))]
    return row | {"responses": list(responses), "ranks": ranks, "scores": scores}


def rank_samples(
    rows: Sequence[Row], samples: Sequence[Sequence[str]], noise: float = 0.1, seed: int = 0
) -> list[Row]:
    """Rankings of four to nine different responses that a model sampled to each of `rows`.

    `samples` has them, nine or more a row. Empty and equal ones are left out, so a ranking is
    shorter where the model repeats itself, and a row with fewer than two has none. See `ranked`
    for how they are ordered.
    """
    dice, found = random.Random(seed), []
    for row, said in zip(rows, samples, strict=True):
        different = [t for t in dict.fromkeys(said) if t.strip()][: dice.randint(4, 9)]
        if len(different) >= 2:
            found.append(ranked(row, different, dice, noise))
    return found


def preference_pairs(
    n: int, noise: float = 0.1, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """Prompts with a chosen and a rejected response of different gold scores.

    A share of about `noise` of the pairs is the wrong way round; `flipped` says which.
    """
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise: expected a share in [0, 0.5), got {noise}")
    rng, out = random.Random(f"pairs-{split}-{seed}"), []
    for row in prompts(n, seed, split):
        scored = {r: judge(row, r).total for r in candidates(row, rng)}
        first = rng.choice(list(scored))
        others = [r for r in scored if scored[r] != scored[first]]
        good, bad = sorted((first, rng.choice(others)), key=lambda r: -scored[r])
        flipped = rng.random() < noise
        pair = (bad, good) if flipped else (good, bad)
        out.append(row | {"chosen": pair[0], "rejected": pair[1], "flipped": flipped})
    return out
