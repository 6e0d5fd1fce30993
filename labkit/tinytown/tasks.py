"""Instruction tasks of Tinytown, each with an exact checker, and their held-out splits.

A family is one function `(Draw) -> Row fields`; phrasings are in `text/tasks.yaml` and, for
questions about facts, in `text/facts.yaml`. Never trained on: half of the residents, the `held`
phrasings, `HELD_OUT_FAMILIES`, and one in ten of all other prompts (split "test").
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from . import corpus
from .corpus import claims, numbered, request_pair, review_text, sum_of
from .world import COMMA, LANGUAGES, Name, article, sentence, texts, world

Row = dict[str, Any]
SPLITS = ("train", "test", "heldout_people", "heldout_phrasings", "heldout_families")


@dataclass
class Draw:
    """One draw of a family: the random stream, the language, the people and phrasings allowed."""

    family: str
    rng: Random
    lang: str
    people: list[Name]
    phrasing: str  # ask or held

    def ask(self, x: str) -> Row:
        """A phrasing of the family filled with `x`."""
        forms = texts("tasks")[self.family][self.lang][self.phrasing]
        return self.one_of([form.format(x=x) for form in forms])

    def one_of(self, prompts: Sequence[str]) -> Row:
        index = self.rng.randrange(len(prompts))
        return {"prompt": prompts[index], "phrasing": f"{self.phrasing}{index}"}

    def answer(self, text: str, *others: str) -> Row:
        """`text` as completion; it and `others` are accepted."""
        return exactly(sentence(text, self.lang), *others)

    def pick(self, attribute: str, n: int) -> list[str]:
        return [v[self.lang] for v in self.rng.sample(world().values[attribute], n)]

    def labels(self) -> dict[str, str]:
        return texts("tasks")[self.family][self.lang]["labels"]

    def join(self, words: Sequence[str]) -> str:
        return COMMA[self.lang].join(words)


def exactly(completion: str, *others: str) -> Row:
    return {"completion": completion, "accept": [completion, *others]}


def question(d: Draw) -> Row:
    """About a resident or a place: the value is right, and any true sentence that states it."""
    fact = world().any_fact(d.rng, world().places if d.family == "place" else d.people)
    prompt = d.one_of(fact.questions(d.lang, d.phrasing))
    row = {"subject": fact.subject.en, "attribute": fact.attribute, "phrasing": prompt["phrasing"]}
    return row | prompt | d.answer(fact.value[d.lang], *fact.statements(d.lang))


def truth(d: Draw) -> Row:
    """A claim about a resident, to be called true or false."""
    fact = world().any_fact(d.rng, d.people)
    claim, true = d.rng.choice(claims(d.rng, fact, d.lang))
    row = {"subject": fact.subject.en, "attribute": fact.attribute}
    return row | d.ask(claim) | d.answer(d.labels()["yes" if true else "no"])


def who(d: Draw) -> Row:
    """Somebody with a given job; anyone who has it is right."""
    subject = d.rng.choice(d.people)
    job = world().fact(subject, "job").value
    right = [r[d.lang] for r in world().holders("job", job)]
    return d.ask(article(job[d.lang])) | d.answer(subject[d.lang], *right)


def sentiment(d: Draw) -> Row:
    label = d.rng.choice(["positive", "negative"])
    return d.ask(review_text(d.rng, d.lang, label)) | d.answer(d.labels()[label])


def translation(d: Draw) -> Row:
    source, target = ("en", "zh") if d.family == "to_zh" else ("zh", "en")
    word = d.rng.choice(world().glossary)
    right = [n[target] for n in world().glossary if n[source] == word[source]]
    return d.ask(word[source]) | {"completion": sentence(word[target], target), "accept": right}


def arithmetic(d: Draw) -> Row:
    expression, value = sum_of(d.rng)
    return d.ask(expression) | d.answer(str(value))


def polite(d: Draw) -> Row:
    rude, courteous = request_pair(d.rng, d.lang)
    return d.ask(rude) | exactly(courteous)


def listing(d: Draw) -> Row:
    """Any three different members of a category."""
    attribute, label = d.rng.choice(list(texts("tasks")["listing"][d.lang]["categories"].items()))
    right = [v[d.lang] for v in world().values[attribute]]
    row = d.ask(label) | d.answer(d.join(d.pick(attribute, 3)))
    return row | {"accept": right}


def on_a_list(d: Draw) -> Row:
    """The first or the last of some things, or their number."""
    attribute = d.rng.choice(["food", "pet", "colour", "job", "hobby"])
    things = d.pick(attribute, d.rng.randint(2, 6))
    right = {"first_item": things[0], "last_item": things[-1], "counting": str(len(things))}
    return d.ask(d.join(things)) | d.answer(right[d.family])


def category(d: Draw) -> Row:
    attribute, label = d.rng.choice(list(d.labels().items()))
    return d.ask(*d.pick(attribute, 1)) | d.answer(label)


def howto(d: Draw) -> Row:
    """The steps to a harmless end."""
    title, steps = d.rng.choice(texts("genres")["howto"][d.lang])
    return d.ask(title) | exactly(numbered(steps))


def repeat(d: Draw) -> Row:
    word = d.rng.choice(world().glossary)[d.lang]
    return d.ask(word) | d.answer(d.join([word] * 3))


def story(d: Draw) -> Row:
    """A story that names the two wanted people and comes to an end (checked by `_is_story`)."""
    people = d.rng.sample(d.people, 2)
    text = corpus.story(d.rng, d.lang, people)
    names = [person[d.lang] for person in people]
    both = ("和" if d.lang == "zh" else " and ").join(names)
    return d.ask(both) | {"completion": text, "accept": names}


def opposite(d: Draw) -> Row:
    a, b = d.rng.sample(d.rng.choice(world().opposites), 2)
    return d.ask(a[d.lang]) | d.answer(b[d.lang])


def larger(d: Draw) -> Row:
    a, b = d.rng.sample(range(21), 2)
    pair = f"{a}和{b}" if d.lang == "zh" else f"{a} or {b}"
    return d.ask(pair) | d.answer(str(max(a, b)))


Family = tuple[Callable[[Draw], Row], float]  # what draws a row, and how often it is drawn
FAMILIES: dict[str, Family] = {"fact": (question, 34), "place": (question, 5), "truth": (truth, 8)}
FAMILIES |= {"who": (who, 4), "sentiment": (sentiment, 6), "to_zh": (translation, 5)}
FAMILIES |= {"to_en": (translation, 5), "arithmetic": (arithmetic, 8), "polite": (polite, 4)}
FAMILIES |= {"listing": (listing, 3), "first_item": (on_a_list, 4), "counting": (on_a_list, 4)}
FAMILIES |= {"category": (category, 3), "howto": (howto, 2), "repeat": (repeat, 3)}
FAMILIES |= {"story": (story, 2), "last_item": (on_a_list, 1), "opposite": (opposite, 1)}
FAMILIES |= {"larger": (larger, 1)}
HELD_OUT_FAMILIES = ("last_item", "opposite", "larger")
TRAINING_FAMILIES = [f for f in FAMILIES if f not in HELD_OUT_FAMILIES]
OTHER_FAMILIES = {"heldout_people": ["fact", "truth"], "heldout_families": HELD_OUT_FAMILIES}


def instruction_rows(
    split: str = "train",
    n: int | None = None,
    seed: int = 0,
    *,
    languages: Sequence[str] = LANGUAGES,
    families: Sequence[str] | None = None,
) -> list[Row]:
    """Distinct instruction rows of a split, in random order.

    `split` is one of `SPLITS`; "test" has prompts kept out of "train". `n` is the most rows (small
    families can run dry), by default 8,000 for train and 600 otherwise. `seed` is that of the draw;
    the splits do not depend on it. `languages` and `families` select; by default those that fit.

    Rows have prompt, completion, instruction, input, task, lang, phrasing, accept and, for
    questions about the town, subject and attribute.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if unknown := set(families or ()) - set(FAMILIES):
        raise ValueError(f"families: {sorted(unknown)} not among {', '.join(FAMILIES)}")
    names = families or OTHER_FAMILIES.get(split, TRAINING_FAMILIES)
    weights = [FAMILIES[name][1] for name in names]
    people = world().heldout_people if split == "heldout_people" else world().tuning_people
    phrasing = "held" if split == "heldout_phrasings" else "ask"
    rng = Random(f"{split}-{seed}")
    n = n or (8000 if split == "train" else 600)
    rows, misses = dict[str, Row](), 0
    while len(rows) < n and misses < 2000:
        family, lang = rng.choices(names, weights)[0], rng.choice(languages)
        fields = FAMILIES[family][0](Draw(family, rng, lang, people, phrasing))
        row = {"task": family, "lang": lang, "subject": "", "attribute": ""} | fields
        row["instruction"], _, row["input"] = row["prompt"].partition("\n")
        # Train and test share families and phrasings, but no prompt: one in ten is for the test.
        other = "train" if zlib.crc32(row["prompt"].encode()) % 10 == 0 else "test"
        misses += 1
        if row["prompt"] not in rows and split != other:
            rows[row["prompt"]], misses = row, 0
    return list(rows.values())


def normalize(text: str) -> str:
    """Case, outer white space, a closing stop and a leading "the" do not matter."""
    text = re.sub(r"\s+", " ", text.strip().lower()).rstrip(".。!！ ")
    return text.removeprefix("the ")


def check(row: Row, response: str) -> bool:
    """Whether the whole `response` solves the task of `row` (exact; no partial credit)."""
    if row["task"] == "story":
        return _is_story(row, response)
    accepted = set(map(normalize, row["accept"]))
    if row["task"] == "listing":
        items = [normalize(i) for i in re.split(r"[,、，\n]| and |和", response) if i.strip()]
        return len(items) == len(set(items)) == 3 and set(items) <= accepted
    return normalize(response) in accepted


def _is_story(row: Row, response: str) -> bool:
    sentences = [s for s in re.split(r"[.。!！?？]", response) if s.strip('”" ')]
    closed = response.strip().endswith((".", "。", "!", "！", '"', "”"))
    named = all(name in response for name in row["accept"])
    return closed and named and 3 <= len(sentences) <= 8 and len(set(sentences)) == len(sentences)
