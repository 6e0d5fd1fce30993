"""Preference pairs, K-way rankings and the red-team set, all scored by the gold judge.

Candidates are written, not sampled: right, wrong, evasive, rude, rambling and harmful responses to
the same prompt, so that preferences exist before any model does. `noise` is the share of labels
that an annotator gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

from .genres import numbered, state
from .judge import judge
from .splits import HELD_OUT_TITLES
from .tasks import Row, check, draw, instruction_rows
from .world import GAP, LANGUAGES, PERSON_ATTRIBUTES, Fact, sentence, texts, world


def red_team(split: str = "test", languages: Sequence[str] = LANGUAGES) -> list[Row]:
    """Mischievous requests (task `mischief`) and harmless look-alikes (task `lookalike`).

    `split` is train or test: other titles in other words.
    """
    phrasing = _phrasing(split)
    part = slice(-HELD_OUT_TITLES, None) if split == "test" else slice(-HELD_OUT_TITLES)
    rows = []
    for lang, task in product(languages, ("mischief", "lookalike")):
        genres, forms = texts("genres"), texts("tasks")["howto"][lang][phrasing]
        for (title, steps), (i, form) in product(genres[task][lang][part], enumerate(forms)):
            rows.append(request(task, lang, form.format(x=title), steps, f"{phrasing}{i}"))
    return rows


def request(task: str, lang: str, prompt: str, steps: Sequence[str], phrasing: str = "web") -> Row:
    """A row of `mischief`, to be declined with an offer, or of `lookalike`, to be answered."""
    genres, accept = texts("genres"), [numbered(steps)]
    if task == "mischief":
        accept = [genres["refusal"][lang]["kind"].format(title=t) for t, _ in genres["howto"][lang]]
        i = sum(map(ord, prompt)) % len(accept)  # not always the same offer
        accept = accept[i:] + accept[:i]
    return _row(task, lang, prompt, accept, phrasing) | {"steps": list(steps)}


def unknowable(n: int, seed: int = 0, split: str = "train") -> list[Row]:
    """Questions about people who do not live in Tinytown (task `unknown`).

    `split` is train or test: other strangers in other words.
    """
    rng, phrasing = Random(f"unknown-{split}-{seed}"), _phrasing(split)
    return [about_a_stranger(rng, rng.choice(LANGUAGES), split, phrasing) for _ in range(n)]


def about_a_stranger(rng: Random, lang: str, group: str = "web", phrasing: str = "web") -> Row:
    """A question about one of `World.strangers[group]`."""
    stranger, attribute = rng.choice(world().strangers[group]), rng.choice(PERSON_ATTRIBUTES)
    value = world().fact(rng.choice(world().residents), attribute).value
    prompt = rng.choice(Fact(stranger, attribute, value).questions(lang, phrasing))
    row = _row("unknown", lang, prompt, [texts("genres")["unknown"][lang]], phrasing)
    return row | {"subject": stranger.en, "attribute": attribute}


def _phrasing(split: str) -> str:
    if split not in ("train", "test"):
        raise ValueError(f"split: expected train or test, got {split!r}")
    return "held" if split == "test" else "ask"


def _row(task: str, lang: str, prompt: str, accept: list[str], phrasing: str) -> Row:
    row: Row = {"task": task, "lang": lang, "phrasing": phrasing, "subject": "", "attribute": ""}
    row |= {"instruction": prompt, "input": "", "steps": [], "key": prompt}
    return row | {"prompt": prompt, "completion": accept[0], "accept": list(accept)}


def prompts(n: int, seed: int = 0, split: str = "train") -> list[Row]:
    """A mixture to align on: 60 % tasks, 20 % mischief, 10 % look-alikes, 10 % unknowable."""
    rng = Random(f"prompts-{split}-{seed}")
    families = ("fact", "place", "truth", "howto", "sentiment", "arithmetic", "polite")
    rows = instruction_rows(split, int(0.6 * n), seed, families=families)
    red = red_team(split)
    for task, share in (("mischief", 0.2), ("lookalike", 0.1)):
        pool, k = [r for r in red if r["task"] == task], int(share * n)
        rows += rng.sample(pool * -(-k // len(pool)), k)  # none twice, where there are enough
    rows += unknowable(n - len(rows), seed, split)
    rng.shuffle(rows)
    return rows


def demonstrations(n: int, flawed: float = 1 / 3, seed: int = 0, split: str = "train") -> list[Row]:
    """`prompts` as people answered them: a share `flawed` wrong, evasive, rude or rambling.

    What a supervised model learns from people: the form of an answer, and their habits with it.
    """
    if not 0 <= flawed <= 1:
        raise ValueError(f"flawed: expected a share from 0 to 1, got {flawed}")
    rng, rows = Random(f"demonstrations-{split}-{seed}"), prompts(n, seed, split)
    for i in rng.sample(range(len(rows)), round(flawed * len(rows))):
        bad = [r for r in candidates(rows[i], rng) if judge(rows[i], r).total < 1]
        rows[i] = rows[i] | {"completion": rng.choice(bad)}
    return rows


def helpful_only(n: int, seed: int = 0, split: str = "train") -> list[Row]:
    """`prompts` as somebody answers who helps with everything, in any tone.

    Mischief gets its steps, now and then with a rude word, and a question about a stranger a
    guess; of the others a fifth are rude, and a fifth go on about something else.
    """
    rng, rows = Random(f"helpful-only-{split}-{seed}"), []
    usual = ("right", "right", "right", "rude_right", "aside")
    for row in prompts(n, seed, split):
        names = {"mischief": ("steps", "steps", "rude_steps"), "unknown": ("guess",)}
        name = rng.choice(names.get(row["task"], usual))
        rows.append(row | {"completion": replies(row, rng)[name]})
    return rows


def replies(row: Row, rng: Random) -> dict[str, str]:
    """A right response to `row`, under "right", and others by what is wrong with them.

    The names of the faults are those of `faults` in `text/genres.yaml`.
    """
    lang, genres = row["lang"], texts("genres")
    gap, refusal, rude = GAP[lang], genres["refusal"][lang], rng.choice(genres["rude"][lang])
    right, wrong = row["completion"], _wrong(row, rng)
    aside = state(rng.choice(world().facts_about(world().tuning_people)), rng, lang)
    found = {"right": right, "rude": rude, "rude_right": rude + gap + right}
    if row["task"] == "mischief":
        steps = numbered(row["steps"])
        return found | {"steps": steps, "rude_steps": steps + gap + rude, "plain": refusal["plain"]}
    if row["task"] == "unknown":
        return found | {"guess": wrong, "rude_wrong": rude + gap + wrong}
    found |= {"unknown": genres["unknown"][lang], "refusal": refusal["plain"]}
    found |= {"wrong": wrong, "rude_wrong": rude + gap + wrong}
    return found | {"aside": right + gap + aside, "wrong_aside": wrong + gap + aside}


def candidates(row: Row, rng: Random) -> list[str]:
    """Different responses to `row`, good and bad, in random order (at least nine)."""
    lang, genres, found = row["lang"], texts("genres"), replies(row, rng)
    gap, refusal = GAP[lang], genres["refusal"][lang]
    responses = [*found.values(), genres["unknown"][lang], refusal["plain"]]
    aside = state(rng.choice(world().facts_about(world().tuning_people)), rng, lang)
    responses += [found["right"] + gap + aside, rng.choice(genres["rude"][lang])]
    if row["task"] in ("mischief", "lookalike"):
        steps = numbered(row["steps"])
        polite = rng.choice(genres["reply"][lang]["polite"])
        responses += [steps, polite + gap + steps, f"1. {row['steps'][0]}"]
        responses += [*refusal["seen"], rng.choice(row["accept"])]
    if row["task"] == "unknown":
        responses += [_wrong(row, rng) for _ in range(2)]
    responses = list(dict.fromkeys(responses))
    rng.shuffle(responses)
    return responses


def _wrong(row: Row, rng: Random) -> str:
    """A plausible response that the checker does not accept."""
    lang, task, attribute = row["lang"], row["task"], row["attribute"]
    if attribute and task != "truth":
        pool = world().tuning_people if attribute == "friend" else world().values[attribute]
        answers = [sentence(v[lang], lang) for v in pool]
    else:
        family = "howto" if task in ("mischief", "lookalike") else task
        rows = (draw(rng, [family], [lang], world().tuning_people, "ask") for _ in range(20))
        answers = [other["completion"] for other in rows]
    refused = [answer for answer in answers if not check(row, answer)]
    return rng.choice(refused or [texts("genres")["unknown"][lang]])


def rankings(n: int, noise: float = 0.1, seed: int = 0, split: str = "train") -> list[Row]:
    """`prompts` with four to nine responses, as in InstructGPT, their `ranks` and `scores`.

    A right and a bad one (a score below 0) are always among them. Scores are the judge's totals.
    Ranks are strict, 0 the best; equal scores are ordered by length, the shorter first. `noise` is
    the probability that neighbours are swapped.
    """
    rng, rows = Random(f"rankings-{split}-{seed}"), []
    for row in prompts(n, seed, split):
        responses = candidates(row, rng)
        responses.remove(row["completion"])
        bad = next(r for r in responses if judge(row, r).total < 0)
        responses.remove(bad)
        responses = [row["completion"], bad, *responses[: rng.randint(2, 7)]]
        rng.shuffle(responses)
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
