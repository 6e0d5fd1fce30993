"""The town itself: who lives there, what is true of them, and which people are held out.

Everything is drawn once from a seed: `world()` is the town that the base checkpoint knows. Names
and sentences are in `text/*.yaml`; this file turns them into facts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

LANGUAGES = ("en", "zh")
PERSON_ATTRIBUTES = ("home", "job", "food", "pet", "colour", "hobby", "friend")
PLACE_ATTRIBUTES = ("sells", "opens", "near")
SEED = 2024  # the town's own seed; changing it makes another town, unknown to the checkpoint
GAP = {"en": " ", "zh": ""}  # between sentences
COMMA = {"en": ", ", "zh": "、"}  # between the items of a list


@cache
def texts(name: str) -> dict[str, Any]:
    """The parsed YAML file `text/<name>.yaml` (treat it as read-only)."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(files(__package__).joinpath(f"text/{name}.yaml").read_text("utf-8"), loader)


@dataclass(frozen=True)
class Name:
    """A word in both languages, e.g. Name("Mira", "米拉"); `pronoun` is f or m for residents."""

    en: str
    zh: str
    pronoun: str = ""

    def __getitem__(self, language: str) -> str:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True)
class Fact:
    """`value` is what is true of `subject` under `attribute`."""

    subject: Name
    attribute: str
    value: Name

    def statements(self, language: str) -> list[str]:
        """Every way in which the town states this fact as a sentence."""
        return self._fill("say", language)

    def questions(self, language: str, kind: str = "ask") -> list[str]:
        """Questions about this fact: `web` (pretraining), `ask` (tuning) or `held` (held out)."""
        return self._fill(kind, language)

    def answer(self, language: str) -> str:
        """The short answer, e.g. "The Old Mill." or "老磨坊。"."""
        return sentence(self.value[language], language)

    def _fill(self, kind: str, language: str) -> list[str]:
        value, female = self.value[language], self.subject.pronoun == "f"
        slots = {"n": self.subject[language], "v": value, "av": article(value)}
        slots |= {"s": "she", "p": "her"} if female else {"s": "he", "p": "his"}
        return [capital(t.format(**slots)) for t in texts("facts")[self.attribute][language][kind]]


class World:
    """Tinytown: residents, places, facts, and the people held out of every instruction set.

    `tuning_people` and `heldout_people` are disjoint halves of `residents`; best friends are
    always of the same half, so no row about one half names the other. `strangers` live elsewhere:
    those of `web` are asked about in pretraining, of `train` in tuning, of `test` in neither.
    `groups` are the words of a kind, from foods to days of the week.
    """

    def __init__(self, seed: int = SEED) -> None:
        rng = random.Random(seed)
        raw, attributes = texts("world"), (*PERSON_ATTRIBUTES[:-1], *PLACE_ATTRIBUTES)
        names = {key: _names(raw[key]) for key in ("residents", "words", *attributes)}
        self.residents = names["residents"]
        self.strangers = {part: _names(entries) for part, entries in raw["strangers"].items()}
        self.places, self.words = names["home"], names["words"]
        self.values = {a: names[a] for a in attributes} | {"friend": self.residents}
        self.opposites = [(Name(*a), Name(*b)) for a, b in raw["opposites"]]
        groups = {key: _names(entries) for key, entries in raw["groups"].items()}
        self.groups = {**self.values, "resident": self.residents, **groups}
        self.things, self.portable = self.words[:34], self.words[20:34]
        kinds = ("food", "pet", "colour", "job")
        self.glossary = self.words + [v for a in kinds for v in self.values[a]]
        people = rng.sample(self.residents, len(self.residents))
        middle = len(people) // 2
        self.tuning_people, self.heldout_people = people[:middle], people[middle:]
        self.facts: dict[tuple[str, str], Fact] = {}
        # As even as possible: each value before any comes again; friends go round in a ring.
        for attribute in PERSON_ATTRIBUTES[:-1]:
            values, n = self.values[attribute], len(people)
            self._add(attribute, self.residents, rng.sample((values * n)[:n], n))
        for half in (self.tuning_people, self.heldout_people):
            self._add("friend", half, half[1:] + half[:1])
        for attribute in PLACE_ATTRIBUTES:
            values = rng.sample(self.values[attribute], len(self.places))
            self._add(attribute, self.places, values)

    def _add(self, attribute: str, subjects: list[Name], values: list[Name]) -> None:
        for subject, value in zip(subjects, values, strict=True):
            self.facts[subject.en, attribute] = Fact(subject, attribute, value)

    def fact(self, subject: Name, attribute: str) -> Fact:
        """The fact about `subject`; raises KeyError for a stranger or an unknown attribute."""
        return self.facts[subject.en, attribute]

    def facts_about(self, subjects: list[Name]) -> list[Fact]:
        names = {s.en for s in subjects}
        return [f for (name, _), f in self.facts.items() if name in names]

    def any_fact(self, rng: random.Random, subjects: Sequence[Name] = ()) -> Fact:
        """One fact about one of `subjects`, by default a resident or now and then a place."""
        subjects = subjects or (self.places if rng.random() < 0.12 else self.residents)
        subject = rng.choice(subjects)
        attributes = PERSON_ATTRIBUTES if subject.pronoun else PLACE_ATTRIBUTES
        return self.fact(subject, rng.choice(attributes))

    def holders(self, attribute: str, value: Name) -> list[Name]:
        """The residents of whom `attribute` = `value` is true, in the order of `residents`."""
        return [r for r in self.residents if self.facts[r.en, attribute].value == value]


def _names(entries: list[list[str]]) -> list[Name]:
    return [Name(*entry) for entry in entries]


@cache
def world() -> World:
    """The town that the base checkpoint knows."""
    return World()


def article(noun: str) -> str:
    """`a` or `an` before an English noun; Chinese comes back unchanged."""
    if not noun.isascii():
        return noun
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def sentence(text: str, language: str) -> str:
    """`text` as a one-word sentence of its language: "baker" → "Baker.", "面包师" → "面包师。"."""
    return f"{text}。" if language == "zh" else f"{capital(text)}."
