"""Instruction tasks of Tinytown, each with an exact checker, and their held-out splits.

A family is one function `(Draw) -> Row fields`; phrasings are in `text/tasks.yaml` and, for
questions about facts, in `text/facts.yaml`. `splits` says what is held out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from zlib import crc32

from . import genres
from .genres import claims, numbered, request_pair, review_text, sum_of
from .splits import side
from .world import COMMA, LANGUAGES, Fact, Name, article, sentence, texts, world

Row = dict[str, Any]
OWN_FORM = {"en": "Q: {}\nA:", "zh": "问：{}\n答："}  # how a forum of Tinytown writes a question
SPLITS = ("train", "test", "heldout_people", "heldout_phrasings", "heldout_families")


@dataclass
class Draw:
    """One draw of a family: the random stream, the language, the people and phrasings allowed."""

    family: str
    rng: Random
    lang: str
    people: Sequence[Name]
    phrasing: str  # web, ask or held

    def ask(self, x: str) -> Row:
        """A phrasing of the family filled with `x`."""
        forms = texts("tasks")[self.family][self.lang]
        asked, web = ([f.format(x=x) for f in forms[kind]] for kind in (self.phrasing, "web"))
        return self.one_of(asked, web)

    def one_of(self, prompts: Sequence[str], web: Sequence[str]) -> Row:
        """One of the phrasings, and one of those of the web in a form that the base knows."""
        index = self.rng.randrange(len(prompts))
        own = web[crc32(prompts[index].encode()) % len(web)]
        row = {"prompt": prompts[index], "phrasing": f"{self.phrasing}{index}"}
        return row | {"own_form": OWN_FORM[self.lang].format(own)}

    def answer(self, key: str, text: str, *others: str) -> Row:
        return exactly(key, sentence(text, self.lang), *others)

    def pick(self, group: str, n: int) -> list[Name]:
        """`n` different members of a group; of residents, only those that may be named."""
        members = self.people if group == "resident" else world().groups[group]
        return self.rng.sample(members, n)

    def labels(self) -> dict[str, str]:
        return texts("tasks")[self.family][self.lang]["labels"]

    def join(self, words: Sequence[str]) -> str:
        return COMMA[self.lang].join(words)


def exactly(key: str, completion: str, *others: str) -> Row:
    """The answer to the question `key`: the completion; it and `others` are accepted."""
    return {"key": key, "completion": completion, "accept": [completion, *others]}


def fact_key(fact: Fact) -> str:
    """ "Mira|pet"; for a trade "job|baker", since `who` asks for it from the other end."""
    trade = fact.attribute == "job" and fact.subject in world().tuning_people
    return f"job|{fact.value.en}" if trade else f"{fact.subject.en}|{fact.attribute}"


def question(d: Draw) -> Row:
    """About a resident or a place: the value is right, and any true sentence that states it."""
    fact = world().any_fact(d.rng, world().places if d.family == "place" else d.people)
    prompt = d.one_of(*(fact.questions(d.lang, kind) for kind in (d.phrasing, "web")))
    row = {"subject": fact.subject.en, "attribute": fact.attribute} | prompt
    return row | d.answer(fact_key(fact), fact.value[d.lang], *fact.statements(d.lang))


def truth(d: Draw) -> Row:
    """A claim about a resident, to be called true or false."""
    fact = world().any_fact(d.rng, d.people)
    claim, true = d.rng.choice(claims(d.rng, fact, d.lang))
    row = {"subject": fact.subject.en, "attribute": fact.attribute} | d.ask(claim)
    return row | d.answer(fact_key(fact), d.labels()["yes" if true else "no"])


def who(d: Draw) -> Row:
    """Somebody with a given job; anyone who has it is right."""
    subject = d.rng.choice(d.people)
    fact = world().fact(subject, "job")
    right = [r[d.lang] for r in world().holders("job", fact.value)]
    row = d.ask(article(fact.value[d.lang]))
    return row | d.answer(fact_key(fact), subject[d.lang], *right)


def sentiment(d: Draw) -> Row:
    label = d.rng.choice(["positive", "negative"])
    review = review_text(d.rng, d.lang, label)
    return d.ask(review) | d.answer(review, d.labels()[label])


def translation(d: Draw) -> Row:
    source, target = ("en", "zh") if d.family == "to_zh" else ("zh", "en")
    word = d.rng.choice(world().glossary)
    right = [n[target] for n in world().glossary if n[source] == word[source]]
    row = d.ask(word[source]) | exactly(f"translate|{word.zh}", sentence(word[target], target))
    return row | {"accept": right}


def arithmetic(d: Draw) -> Row:
    expression, value = sum_of(d.rng)
    key = "+".join(sorted(expression.split(" + ")))  # 2 + 3 and 3 + 2 are one question
    return d.ask(expression) | d.answer(key, str(value))


def polite(d: Draw) -> Row:
    rude, courteous = request_pair(d.rng, d.lang)
    return d.ask(rude) | exactly(f"polite|{courteous}", courteous)


def listing(d: Draw) -> Row:
    """Any three different members of a group."""
    group, label = d.rng.choice(list(texts("tasks")["listing"][d.lang]["categories"].items()))
    right = [v[d.lang] for v in world().groups[group]]
    row, three = d.ask(label), d.join([v[d.lang] for v in d.pick(group, 3)])
    return row | d.answer(f"list|{group}", three) | {"accept": right}


def on_a_list(d: Draw) -> Row:
    """The first or the last of some things, or their number."""
    group = d.rng.choice(["food", "pet", "colour", "job", "hobby"])
    things = d.pick(group, d.rng.randint(2, 6))
    words = [thing[d.lang] for thing in things]
    right = {"first_item": words[0], "last_item": words[-1], "counting": str(len(words))}
    key = "|".join([d.family, *(thing.en for thing in things)])
    return d.ask(d.join(words)) | d.answer(key, right[d.family])


def category(d: Draw) -> Row:
    group, label = d.rng.choice(list(d.labels().items()))
    (word,) = d.pick(group, 1)
    return d.ask(word[d.lang]) | d.answer(f"category|{word.en}", label)


def howto(d: Draw) -> Row:
    """The steps to a harmless end."""
    titles = texts("genres")["howto"]
    i = d.rng.randrange(len(titles[d.lang]))
    title, steps = titles[d.lang][i]
    return d.ask(title) | exactly(f"howto|{titles['en'][i][0]}", numbered(steps))


def repeat(d: Draw) -> Row:
    word = d.rng.choice(world().glossary)
    return d.ask(word[d.lang]) | d.answer(f"repeat|{word.zh}", d.join([word[d.lang]] * 3))


def story(d: Draw) -> Row:
    """A story that names the two wanted people and comes to an end (checked by `_is_story`)."""
    people = d.rng.sample(d.people, 2)
    text = genres.story(d.rng, d.lang, people)
    names = [person[d.lang] for person in people]
    both = ("和" if d.lang == "zh" else " and ").join(names)
    key = "|".join(["story", *sorted(person.en for person in people)])
    return {"key": key} | d.ask(both) | {"completion": text, "accept": names}


def opposite(d: Draw) -> Row:
    a, b = d.rng.sample(d.rng.choice(world().opposites), 2)
    return d.ask(a[d.lang]) | d.answer(f"opposite|{a.en}", b[d.lang])


def larger(d: Draw) -> Row:
    a, b = d.rng.sample(range(21), 2)
    pair = f"{a}和{b}" if d.lang == "zh" else f"{a} or {b}"
    return d.ask(pair) | d.answer(f"larger|{pair}", str(max(a, b)))


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

    `split` is one of `SPLITS`; "test" has questions that are in no other, whatever the words. `n`
    is the most rows (small families can run dry), by default 8,000 for train and 600 otherwise.
    `seed` is that of the draw; the splits do not depend on it. `languages` and `families` select;
    by default those that fit.

    Rows have prompt, completion, instruction, input, task, lang, phrasing, accept, `key` (the
    question, see `splits`), `own_form` (see `in_own_form`) and, for questions about the town,
    subject and attribute.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if unknown := set(families or ()) - set(FAMILIES):
        raise ValueError(f"families: {sorted(unknown)} not among {', '.join(FAMILIES)}")
    names = families or OTHER_FAMILIES.get(split, TRAINING_FAMILIES)
    people = world().heldout_people if split == "heldout_people" else world().tuning_people
    phrasing = "held" if split == "heldout_phrasings" else "ask"
    rng = Random(f"{split}-{seed}")
    n = n or (8000 if split == "train" else 600)
    rows, misses = dict[str, Row](), 0
    while len(rows) < n and misses < 2000:
        row = draw(rng, names, languages, people, phrasing)
        misses += 1
        fits = split in OTHER_FAMILIES or side(row["key"]) == split
        if fits and row["prompt"] not in rows:
            rows[row["prompt"]], misses = row, 0
    return list(rows.values())


def draw(
    rng: Random, families: Sequence[str], languages: Sequence[str], people: list[Name], kind: str
) -> Row:
    """One row, of whatever split."""
    weights = [FAMILIES[name][1] for name in families]
    family, lang = rng.choices(families, weights)[0], rng.choice(languages)
    row = {"task": family, "lang": lang, "subject": "", "attribute": ""}
    row |= FAMILIES[family][0](Draw(family, rng, lang, people, kind))
    row["instruction"], _, row["input"] = row["prompt"].partition("\n")
    return row


def in_own_form(rows: Sequence[Row]) -> list[Row]:
    """`rows` asked as the base knows it from pretraining, "Q: … A:", for the template "bare".

    The fair baseline: behind the tokens of a chat, which it has never seen, the base can answer
    nothing. What it writes after the answer (the next question) does not count against it.
    """
    forms = (row.get("own_form") or OWN_FORM[row["lang"]].format(row["prompt"]) for row in rows)
    asked = [{"prompt": form, "instruction": form, "input": "", "own_form": form} for form in forms]
    return [row | new for row, new in zip(rows, asked, strict=True)]


def answer_in_own_form(row: Row, response: str) -> str:
    """Up to the next question, where `row` is one of `in_own_form`; else all of the response."""
    own = "own_form" in row and row["own_form"] == row["prompt"]
    return re.split(r"\n(?:Q:|问：)", response)[0].strip() if own else response


def normalize(text: str) -> str:
    """Case, outer white space, a closing stop and a leading "the" do not matter."""
    text = re.sub(r"\s+", " ", text.strip().lower()).rstrip(".。!！ ")
    return text.removeprefix("the ")


def check(row: Row, response: str) -> bool:
    """Whether the whole `response` solves the task of `row` (exact; no partial credit)."""
    response = answer_in_own_form(row, response)
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
