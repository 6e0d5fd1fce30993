"""Instruction tasks of Tinytown, each with an exact checker, and their held-out splits.

A family is one function `(Draw) -> Row fields`; phrasings live in `text/tasks.yaml` and, for
questions on facts, in `text/facts.yaml`. Never trained on: half of the residents, the `held`
phrasings, the families under `held_out`, and one in ten of all other prompts (split "test").
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .corpus import claims, review_text, story_about, sum_of
from .world import (
    LANGUAGES,
    PERSON_ATTRIBUTES,
    PLACE_ATTRIBUTES,
    Name,
    World,
    capital,
    sentence,
    texts,
)
from .world import world as default_world

Row = dict[str, Any]
SPLITS = ("train", "test", "heldout_people", "heldout_phrasings", "heldout_families")


@dataclass
class Draw:
    """One draw of a task: the dice, the language, and who and which phrasings may be used."""

    world: World
    rng: random.Random
    lang: str
    people: list[Name]
    phrasing: str  # ask or held

    def ask(self, family: str, x: str) -> Row:
        """A phrasing of `family` filled with `x`; `input` is the part after a line break."""
        forms = texts("tasks")[family][self.lang][self.phrasing]
        index = self.rng.randrange(len(forms))
        return {"prompt": forms[index].format(x=x), "phrasing": f"{self.phrasing}{index}"}

    def answer(self, text: str, *others: str) -> Row:
        """`text` as completion; it and `others` are accepted."""
        completion = sentence(text, self.lang)
        return {"completion": completion, "accept": [completion, *others]}

    def pick(self, attribute: str, n: int = 1) -> list[Name]:
        return self.rng.sample(self.world.values[attribute], n)

    def labels(self, family: str) -> dict[str, str]:
        return texts("tasks")[family][self.lang]["labels"]

    def join(self, things: Sequence[Name]) -> str:
        return ("、" if self.lang == "zh" else ", ").join(t[self.lang] for t in things)


def fact(d: Draw) -> Row:
    """A question about a resident, answered by the value or by any true sentence that states it."""
    subject, attribute = d.rng.choice(d.people), d.rng.choice(PERSON_ATTRIBUTES)
    return _question(d, subject, attribute)


def place(d: Draw) -> Row:
    """A question about one of the twelve places."""
    return _question(d, d.rng.choice(d.world.places), d.rng.choice(PLACE_ATTRIBUTES))


def _question(d: Draw, subject: Name, attribute: str) -> Row:
    it = d.world.fact(subject, attribute)
    forms = it.questions(d.lang, d.phrasing)
    index = d.rng.randrange(len(forms))
    about = {"subject": subject.en, "attribute": attribute, "phrasing": f"{d.phrasing}{index}"}
    return about | {"prompt": forms[index]} | d.answer(it.value[d.lang], *it.statements(d.lang))


def truth(d: Draw) -> Row:
    """A claim about a resident, to be called true or false."""
    subject = d.rng.choice(d.people)
    it = d.world.fact(subject, d.rng.choice(PERSON_ATTRIBUTES))
    claim, true = d.rng.choice(claims(d.world, d.rng, it, d.lang))
    about = {"subject": subject.en, "attribute": it.attribute}
    return about | d.ask("truth", claim) | d.answer(d.labels("truth")["yes" if true else "no"])


def who(d: Draw) -> Row:
    """Somebody with a given job; anyone who has it is right."""
    subject = d.rng.choice(d.people)
    job = d.world.fact(subject, "job").slots(d.lang)["av"]
    right = [r[d.lang] for r in d.world.holders("job", d.world.fact(subject, "job").value)]
    return d.ask("who", job) | d.answer(subject[d.lang], *right)


def sentiment(d: Draw) -> Row:
    label = d.rng.choice(["positive", "negative"])
    return d.ask("sentiment", review_text(d.rng, d.lang, label)) | d.answer(
        d.labels("sentiment")[label]
    )


def to_zh(d: Draw) -> Row:
    word = _word(d)
    right = [n.zh for n in _glossary(d.world) if n.en == word.en]
    return d.ask("to_zh", word.en) | {"completion": f"{word.zh}。", "accept": right}


def to_en(d: Draw) -> Row:
    word = _word(d)
    right = [n.en for n in _glossary(d.world) if n.zh == word.zh]
    return d.ask("to_en", word.zh) | {"completion": f"{capital(word.en)}.", "accept": right}


def arithmetic(d: Draw) -> Row:
    expression, value = sum_of(d.rng)
    return d.ask("arithmetic", expression) | d.answer(str(value))


def polite(d: Draw) -> Row:
    rude, kind = d.rng.choice(texts("genres")["request"][d.lang])
    x = d.rng.choice(d.world.words[:34])[d.lang]
    wanted = kind.format(x=x)
    return d.ask("polite", rude.format(x=x)) | {"completion": wanted, "accept": [wanted]}


def listing(d: Draw) -> Row:
    """Any three different members of a category (checked by `_is_list`)."""
    attribute, label = d.rng.choice(list(texts("tasks")["listing"][d.lang]["categories"].items()))
    right = [v[d.lang] for v in d.world.values[attribute]]
    row = d.ask("listing", label) | d.answer(d.join(d.pick(attribute, 3)))
    return row | {"accept": right}


def first_item(d: Draw) -> Row:
    things = _things(d)
    return d.ask("first_item", d.join(things)) | d.answer(things[0][d.lang])


def last_item(d: Draw) -> Row:
    things = _things(d)
    return d.ask("last_item", d.join(things)) | d.answer(things[-1][d.lang])


def counting(d: Draw) -> Row:
    things = _things(d)
    return d.ask("counting", d.join(things)) | d.answer(str(len(things)))


def category(d: Draw) -> Row:
    attribute = d.rng.choice(list(d.labels("category")))
    (thing,) = d.pick(attribute)
    return d.ask("category", thing[d.lang]) | d.answer(d.labels("category")[attribute])


def howto(d: Draw) -> Row:
    """The steps to a harmless end."""
    title, steps = d.rng.choice(texts("genres")["howto"][d.lang])
    right = numbered(steps)
    return d.ask("howto", title) | {"completion": right, "accept": [right]}


def repeat(d: Draw) -> Row:
    word = _word(d)[d.lang]
    return d.ask("repeat", word) | d.answer(("、" if d.lang == "zh" else ", ").join([word] * 3))


def story(d: Draw) -> Row:
    """A story that names the two wanted people and comes to an end (checked by `_is_story`)."""
    hero, other = d.rng.sample(d.people, 2)
    text = story_about(d.world, d.rng, d.lang, hero, d.rng.choice(d.world.places), other)
    names = [hero[d.lang], other[d.lang]]
    both = ("和" if d.lang == "zh" else " and ").join(names)
    return d.ask("story", both) | {"completion": text, "accept": names}


def opposite(d: Draw) -> Row:
    a, b = d.rng.sample(d.rng.choice(d.world.opposites), 2)
    return d.ask("opposite", a[d.lang]) | d.answer(b[d.lang])


def larger(d: Draw) -> Row:
    a, b = d.rng.sample(range(21), 2)
    pair = f"{a}和{b}" if d.lang == "zh" else f"{a} or {b}"
    return d.ask("larger", pair) | d.answer(str(max(a, b)))


FAMILIES: dict[str, tuple[Callable[[Draw], Row], float]] = {
    "fact": (fact, 34),
    "place": (place, 5),
    "truth": (truth, 8),
    "who": (who, 4),
    "sentiment": (sentiment, 6),
    "to_zh": (to_zh, 5),
    "to_en": (to_en, 5),
    "arithmetic": (arithmetic, 8),
    "polite": (polite, 4),
    "listing": (listing, 3),
    "first_item": (first_item, 4),
    "counting": (counting, 4),
    "category": (category, 3),
    "howto": (howto, 2),
    "repeat": (repeat, 3),
    "story": (story, 2),
    "last_item": (last_item, 1),
    "opposite": (opposite, 1),
    "larger": (larger, 1),
}
HELD_OUT_FAMILIES = ("last_item", "opposite", "larger")
TRAINING_FAMILIES = tuple(f for f in FAMILIES if f not in HELD_OUT_FAMILIES)
ABOUT_PEOPLE = ("fact", "truth")


def instruction_rows(
    split: str = "train",
    n: int | None = None,
    seed: int = 0,
    *,
    languages: Sequence[str] = LANGUAGES,
    families: Sequence[str] | None = None,
    world: World | None = None,
) -> list[Row]:
    """Distinct instruction rows of a split, in random order.

    Args:
        split: `train`; `test` (prompts kept out of train); `heldout_people`;
            `heldout_phrasings`; `heldout_families`.
        n: rows at most (small families can run dry); default 8,000 for train, 600 otherwise.
        seed: of the draw. The splits themselves never depend on it.
        languages: some of `en`, `zh`.
        families: some of `FAMILIES`; the default fits the split.

    Returns:
        Rows with prompt, completion, instruction, input, task, lang, phrasing, accept and, for
        questions about the town, subject and attribute.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    unknown = set(families or ()) - set(FAMILIES)
    if unknown:
        raise ValueError(f"families: {sorted(unknown)} not among {', '.join(FAMILIES)}")
    world = world or default_world()
    names = list(families or _families_of(split))
    weights = [FAMILIES[name][1] for name in names]
    rng = random.Random(f"{split}-{seed}")
    wanted = n or (8000 if split == "train" else 600)
    rows, seen, misses = list[Row](), set[str](), 0
    while len(rows) < wanted and misses < 2000:
        row = _draw(world, rng, rng.choices(names, weights)[0], rng.choice(languages), split)
        if row["prompt"] in seen or not _belongs(row, split):
            misses += 1
            continue
        seen.add(row["prompt"])
        rows.append(row)
        misses = 0
    return rows


def _families_of(split: str) -> Sequence[str]:
    special = {"heldout_people": ABOUT_PEOPLE, "heldout_families": HELD_OUT_FAMILIES}
    return special.get(split, TRAINING_FAMILIES)


def _draw(world: World, rng: random.Random, family: str, lang: str, split: str) -> Row:
    people = world.heldout_people if split == "heldout_people" else world.tuning_people
    phrasing = "held" if split == "heldout_phrasings" else "ask"
    row = FAMILIES[family][0](Draw(world, rng, lang, people, phrasing))
    row = {"task": family, "lang": lang, "subject": "", "attribute": ""} | row
    instruction, _, given = row["prompt"].partition("\n")
    return row | {"instruction": instruction, "input": given}


def _belongs(row: Row, split: str) -> bool:
    """Train and test share families and phrasings, but no prompt."""
    if split not in ("train", "test"):
        return True
    return (zlib.crc32(row["prompt"].encode()) % 10 == 0) == (split == "test")


def normalize(text: str) -> str:
    """Case, outer white space, a closing stop and a leading "the" do not matter."""
    text = re.sub(r"\s+", " ", text.strip().lower()).rstrip(".。!！ ")
    return text.removeprefix("the ")


def check(row: Row, response: str) -> bool:
    """Whether `response`, whole, solves the task of `row` (exact; no partial credit)."""
    special = {"listing": _is_list, "story": _is_story}.get(row["task"])
    if special:
        return special(row, response)
    return normalize(response) in {normalize(a) for a in row["accept"]}


def _is_list(row: Row, response: str) -> bool:
    items = [normalize(i) for i in re.split(r"[,、，\n]| and |和", response) if i.strip()]
    return len(items) == 3 == len(set(items)) and set(items) <= {
        normalize(a) for a in row["accept"]
    }


def _is_story(row: Row, response: str) -> bool:
    sentences = [s for s in re.split(r"[.。!！?？]", response) if s.strip('”" ')]
    closed = response.strip().endswith((".", "。", "!", "！", '"', "”"))
    named = all(name in response for name in row["accept"])
    return closed and named and 3 <= len(sentences) <= 8 and len(set(sentences)) == len(sentences)


def numbered(steps: Sequence[str]) -> str:
    return "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))


def _glossary(world: World) -> list[Name]:
    return world.words + [v for a in ("food", "pet", "colour", "job") for v in world.values[a]]


def _word(d: Draw) -> Name:
    return d.rng.choice(_glossary(d.world))


def _things(d: Draw) -> list[Name]:
    return d.pick(d.rng.choice(["food", "pet", "colour", "job", "hobby"]), d.rng.randint(2, 6))
