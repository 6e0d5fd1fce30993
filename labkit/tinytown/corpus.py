"""The pretraining text of Tinytown: an endless, seeded stream of short documents.

To what people write (`genres`) come texts that are made of tasks and of replies to them: quizzes,
boards with requests, criticism and judgement of replies. They use phrasings of their own (`web`), so
no question of tuning stands in them, and no document has the format of an instruction row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from . import genres
from .genres import numbered, question_lines
from .preferences import about_a_stranger, replies, request
from .splits import is_new
from .tasks import FAMILIES, Row, draw
from .world import texts, world

QUIZ = [family for family in FAMILIES if family not in ("fact", "place", "story")]
JUDGED = ("fact", "place", "truth", "howto", "sentiment", "arithmetic", "polite", "category")


def quiz(rng: Random, lang: str) -> str:
    """Questions of a quiz evening on all that can be asked, with their answers."""
    rows = [_row(rng, lang, [rng.choice(QUIZ)]) for _ in range(rng.randint(1, 4))]
    return question_lines(rng, lang, [(row["prompt"], row["completion"]) for row in rows])


def board(rng: Random, lang: str) -> str:
    """A numbered list of requests."""
    rows = [_row(rng, lang, [rng.choice(list(FAMILIES))]) for _ in range(rng.randint(3, 7))]
    names = {"pl": world().places, "n": world().residents, "d": world().groups["day"]}
    slots = {slot: rng.choice(group)[lang] for slot, group in names.items()}
    head = rng.choice(texts("genres")["forms"]["board"][lang]).format(**slots)
    return head + "\n" + numbered([row["prompt"].replace("\n", " ") for row in rows])


def exercise(rng: Random, lang: str) -> str:
    """Tasks with their output, and their input where they have one."""
    rows = [_row(rng, lang, [rng.choice(list(FAMILIES))]) for _ in range(rng.randint(1, 3))]
    with_input, without = texts("genres")["forms"]["task"][lang]
    lines = []
    for row in rows:
        task, _, given = row["prompt"].partition("\n")
        form = with_input if given else without
        lines.append(form.format(i=task, x=given, o=row["completion"]))
    return "\n".join(lines)


def critique(rng: Random, lang: str) -> str:
    """Somebody replies badly, is told what is wrong with it, and a better reply follows."""
    forms = texts("genres")["forms"]
    if rng.random() < 0.05:
        principles = texts("genres")["principles"][lang]
        rules = rng.sample(principles, rng.randint(3, len(principles)))
        return forms["rules"][lang] + "\n" + numbered(rules)
    row, right, reply, (fault, why, principle) = _fault(rng, lang)
    n, m = (person[lang] for person in rng.sample(world().residents, 2))
    rule, kept = texts("genres")["principles"][lang][principle], rng.random() < 0.15
    if kept:
        reply, rule = right, rng.choice(texts("genres")["principles"][lang])
    form = rng.choice(forms["praise" if kept else "critique"][lang])
    slots = {"q": row["prompt"], "r": reply, "b": right, "f": fault, "w": why, "p": rule}
    return form.format(n=n, m=m, **slots)


def judgement(rng: Random, lang: str) -> str:
    """Two replies to one request, which one is better, and why."""
    row, right, reply, (fault, *_) = _fault(rng, lang)
    letters = rng.sample("AB", 2)
    slots = dict(zip("vo", letters, strict=True))
    slots |= {letter.lower(): text for letter, text in zip(letters, (right, reply), strict=True)}
    form = rng.choice(texts("genres")["forms"]["judgement"][lang])
    return form.format(q=row["prompt"], f=fault, **slots)


def _fault(rng: Random, lang: str) -> tuple[Row, str, str, list[Any]]:
    """A request, a right reply, another one, and what is wrong with that: its name and why."""
    row = draw_request(rng, lang)
    found = replies(row, rng)
    right = found.pop("right")
    name = rng.choice(list(found))
    return row, right, found[name], texts("genres")["faults"][lang][name]


def draw_request(rng: Random, lang: str) -> Row:
    """A task, a request for mischief or a look-alike, or a question about a stranger."""
    roll, forms = rng.random(), texts("tasks")["howto"][lang]["web"]
    if roll < 0.3:
        task = "mischief" if roll < 0.22 else "lookalike"
        title, steps = rng.choice(texts("genres")[task][lang])
        return request(task, lang, rng.choice(forms).format(x=title), steps)
    return about_a_stranger(rng, lang) if roll < 0.36 else _row(rng, lang, JUDGED)


def _row(rng: Random, lang: str, families: list[str] | tuple[str, ...]) -> Row:
    return draw(rng, families, [lang], world().residents, "web")


Genre = Callable[[Random, str], str]
_WEIGHTS: dict[Genre, float] = {genres.profile: 14, genres.gossip: 7, genres.place: 3}
_WEIGHTS |= {genres.roster: 6, genres.forum: 18, genres.rumour: 8, genres.bilingual: 3}
_WEIGHTS |= {genres.review: 5, genres.glossary: 4, genres.sums: 5, genres.lists: 6}
_WEIGHTS |= {genres.kinds: 5, genres.pairs: 3, genres.rhyme: 2, genres.howto: 3}
_WEIGHTS |= {genres.mischief: 2, genres.lookalike: 1, genres.dialogue: 2, genres.manners: 3}
_WEIGHTS |= {genres.story: 5, genres.news: 2, quiz: 14, board: 3, exercise: 3, critique: 4}
_WEIGHTS |= {judgement: 4}
GENRES = {write.__name__: (write, weight) for write, weight in _WEIGHTS.items()}


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Endless `(genre, text)` stream, 40 % Chinese; the same on every machine.

    Pretraining uses seed 0, the tokenizer seed 1. No text of `genre_samples` is among them.
    """
    rng = Random(f"tinytown-{seed}")
    names, weights = list(GENRES), [weight for _, weight in GENRES.values()]
    while True:
        (genre,) = rng.choices(names, weights)
        text = _write(genre, rng)
        if not is_new(text):
            yield genre, text


def genre_samples(per_genre: int) -> dict[str, list[str]]:
    """Up to `per_genre` documents of every genre that are new, for perplexity and forgetting."""
    samples = {}
    for genre in GENRES:
        rng, found = Random(f"tinytown-2-{genre}"), dict[str, None]()
        for _ in range(100 * per_genre):
            if len(found) < per_genre and is_new(text := _write(genre, rng)):
                found[text] = None
        samples[genre] = [*found]
    return {genre: found for genre, found in samples.items() if found}


def _write(genre: str, rng: Random) -> str:
    return GENRES[genre][0](rng, "zh" if rng.random() < 0.4 else "en")
