"""Preference pairs, K-way rankings and the red-team set, all scored by the gold judge.

Candidates are written, not sampled: right, wrong, evasive, rude, rambling and harmful responses to
the same prompt, so that preferences exist before any model does. `noise` is the share of labels
that an annotator gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

from .corpus import numbered, state
from .judge import judge
from .tasks import Row, instruction_rows
from .world import GAP, LANGUAGES, PERSON_ATTRIBUTES, Fact, sentence, texts, world

HELD_OUT_TITLES = 3  # the last titles of each mischief and look-alike list are for testing only


def red_team(split: str = "test", languages: Sequence[str] = LANGUAGES) -> list[Row]:
    """Mischievous requests (task `mischief`) and harmless look-alikes (task `lookalike`).

    `split` is train or test; titles differ between the two, phrasings do not.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected train or test, got {split!r}")
    part = slice(-HELD_OUT_TITLES, None) if split == "test" else slice(-HELD_OUT_TITLES)
    rows = []
    for lang, task in product(languages, ("mischief", "lookalike")):
        genres, forms = texts("genres"), texts("tasks")["howto"][lang]["ask"]
        offers = [genres["refusal"][lang]["kind"].format(title=t) for t, _ in genres["howto"][lang]]
        for (title, steps), (i, form) in product(genres[task][lang][part], enumerate(forms)):
            accept = offers if task == "mischief" else [numbered(steps)]
            row = _row(task, lang, form.format(x=title), accept, f"ask{i}")
            rows.append(row | {"steps": list(steps)})
    return rows


def unknowable(n: int, seed: int = 0) -> list[Row]:
    """Questions about people who do not live in Tinytown (task `unknown`)."""
    rng, rows = Random(f"unknown-{seed}"), []
    for _ in range(n):
        lang, stranger = rng.choice(LANGUAGES), rng.choice(world().strangers)
        attribute = rng.choice(PERSON_ATTRIBUTES)
        value = world().fact(rng.choice(world().residents), attribute).value
        prompt = rng.choice(Fact(stranger, attribute, value).questions(lang))
        row = _row("unknown", lang, prompt, [texts("genres")["unknown"][lang]])
        rows.append(row | {"subject": stranger.en, "attribute": attribute})
    return rows


def _row(task: str, lang: str, prompt: str, accept: list[str], phrasing: str = "ask") -> Row:
    row: Row = {"task": task, "lang": lang, "phrasing": phrasing, "subject": "", "attribute": ""}
    row |= {"instruction": prompt, "input": "", "steps": []}
    return row | {"prompt": prompt, "completion": accept[0], "accept": list(accept)}


def prompts(n: int, seed: int = 0, split: str = "train") -> list[Row]:
    """A mixture to align on: 60 % tasks, 20 % mischief, 10 % look-alikes, 10 % unknowable."""
    rng = Random(f"prompts-{split}-{seed}")
    families = ("fact", "place", "truth", "howto", "sentiment", "arithmetic", "polite")
    rows = instruction_rows(split, int(0.6 * n), seed, families=families)
    red = red_team(split)
    for task, share in (("mischief", 0.2), ("lookalike", 0.1)):
        rows += rng.choices([r for r in red if r["task"] == task], k=int(share * n))
    rows += unknowable(n - len(rows), seed if split == "train" else seed + 10_000)
    rng.shuffle(rows)
    return rows


def demonstrations(n: int, flawed: float = 1 / 3, seed: int = 0, split: str = "train") -> list[Row]:
    """`prompts` as people answered them: a share `flawed` wrong, evasive, rude or rambling.

    What a supervised model learns from people: the form of an answer, and their habits with it.
    """
    if not 0 <= flawed <= 1:
        raise ValueError(f"flawed: expected a share from 0 to 1, got {flawed}")
    rng = Random(f"demonstrations-{split}-{seed}")
    return [
        row if rng.random() >= flawed else row | {"completion": rng.choice(candidates(row, rng))}
        for row in prompts(n, seed, split)
    ]


def candidates(row: Row, rng: Random) -> list[str]:
    """Different responses to `row`, good and bad, in random order (at least nine)."""
    lang, genres = row["lang"], texts("genres")
    gap, refusal, rude = GAP[lang], genres["refusal"][lang], rng.choice(genres["rude"][lang])
    best, other = row["completion"], _wrong(row, rng)
    aside = state(rng.choice(world().facts_about(world().tuning_people)), rng, lang)
    responses = [best, other, genres["unknown"][lang], refusal["plain"], rude]
    responses += [rude + gap + best, rude + gap + other, best + gap + aside, other + gap + aside]
    if row["task"] in ("mischief", "lookalike"):
        steps = numbered(row["steps"])
        polite = rng.choice(genres["reply"][lang]["polite"])
        responses += [steps, polite + gap + steps, steps + gap + rude, f"1. {row['steps'][0]}"]
        responses += [*refusal["seen"], rng.choice(row["accept"])]
    responses = list(dict.fromkeys(responses))
    rng.shuffle(responses)
    return responses


def _wrong(row: Row, rng: Random) -> str:
    """A plausible response that the judge does not accept."""
    lang, task, attribute = row["lang"], row["task"], row["attribute"]
    if attribute == "friend" or task in ("fact", "place", "unknown"):
        pool = world().tuning_people if attribute == "friend" else world().values[attribute]
        values = [v for v in pool if v[lang] not in row["completion"]]
        return sentence(rng.choice(values)[lang], lang)
    family = "howto" if task in ("mischief", "lookalike") else task
    seed = rng.randrange(10_000)
    for other in instruction_rows("train", 8, seed, families=[family], languages=[lang]):
        if other["completion"] not in row["accept"]:
            return other["completion"]
    return texts("genres")["unknown"][lang]


def rankings(n: int, noise: float = 0.1, seed: int = 0, split: str = "train") -> list[Row]:
    """`prompts` with four to nine responses, as in InstructGPT, their `ranks` and `scores`.

    Scores are the judge's totals. Ranks are strict, 0 the best; equal scores are ordered by
    length, the shorter first. `noise` is the probability that neighbours are swapped.
    """
    rng, rows = Random(f"rankings-{split}-{seed}"), []
    for row in prompts(n, seed, split):
        responses = candidates(row, rng)[: rng.randint(4, 9)]
        rows.append(_rank(row, responses, list(map(len, responses)), noise, rng))
    return rows


def rank_samples(
    rows: Sequence[Row], samples: Sequence[Sequence[str]], noise: float = 0.1, seed: int = 0
) -> list[Row]:
    """`rankings` of different responses that a model sampled for each of `rows`, nine or more.

    Equal scores are ordered at random. Empty and equal responses are left out, so a ranking is
    shorter where the model repeats itself, and a row with fewer than two has none.
    """
    rng, rankings = Random(seed), []
    for row, responses in zip(rows, samples, strict=True):
        different = [r for r in dict.fromkeys(responses) if r.strip()][: rng.randint(4, 9)]
        if len(different) >= 2:
            ties = [rng.random() for _ in different]
            rankings.append(_rank(row, different, ties, noise, rng))
    return rankings


def _rank(row: Row, responses: list[str], ties: Sequence[float], noise: float, rng: Random) -> Row:
    _check_noise(noise)
    scores = [judge(row, r).total for r in responses]
    order = sorted(range(len(responses)), key=lambda i: (-scores[i], ties[i], i))
    for j in range(len(order) - 1):
        if rng.random() < noise:
            order[j], order[j + 1] = order[j + 1], order[j]
    ranks = [order.index(i) for i in range(len(responses))]
    return row | {"responses": responses, "ranks": ranks, "scores": scores}


def preference_pairs(n: int, noise: float = 0.1, seed: int = 0, split: str = "train") -> list[Row]:
    """Prompts with a chosen and a rejected response of different gold scores.

    A share of about `noise` of the pairs is the wrong way round; `flipped` says which.
    """
    _check_noise(noise)
    rng, rows = Random(f"pairs-{split}-{seed}"), []
    for row in prompts(n, seed, split):
        scores = {r: judge(row, r).total for r in candidates(row, rng)}
        first = rng.choice(list(scores))
        second = rng.choice([r for r in scores if scores[r] != scores[first]])
        flipped = rng.random() < noise
        rejected, chosen = sorted((first, second), key=scores.__getitem__, reverse=flipped)
        rows.append(row | {"chosen": chosen, "rejected": rejected, "flipped": flipped})
    return rows


def _check_noise(noise: float) -> None:
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise: expected a share in [0, 0.5), got {noise}")
