"""What people of Tinytown write: one function per genre, each `(rng, language) -> str`.

`text/genres.yaml` holds the sentences; `corpus` adds the genres that are made of tasks and replies,
and mixes all of them into the pretraining text.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from .world import COMMA, GAP, PERSON_ATTRIBUTES, Fact, Name, capital, texts, world


def profile(rng: Random, lang: str) -> str:
    """What is known of one resident, in any order and wording; later sentences may say he or she."""
    person = rng.choice(world().residents)
    attributes = rng.sample(PERSON_ATTRIBUTES, rng.randint(3, len(PERSON_ATTRIBUTES)))
    sentences = [state(world().fact(person, a), rng, lang) for a in attributes]
    if rng.random() < 0.5:
        sentences[1:] = [_with_pronoun(s, person, lang) for s in sentences[1:]]
    return GAP[lang].join(sentences)


def _with_pronoun(statement: str, person: Name, lang: str) -> str:
    """`statement` with its leading name replaced by he or she, his or her, 他 or 她."""
    for ending, pronouns in _PRONOUNS[lang].items():
        if statement.startswith(person[lang] + ending):
            return pronouns[person.pronoun] + statement.removeprefix(person[lang] + ending)
    return statement


_PRONOUNS: dict[str, dict[str, dict[str, str]]] = {"zh": {"": {"f": "她", "m": "他"}}}
_PRONOUNS["en"] = {"'s ": {"f": "Her ", "m": "His "}, " ": {"f": "She ", "m": "He "}}


def gossip(rng: Random, lang: str) -> str:
    """Single facts about several residents and places."""
    facts = [world().any_fact(rng) for _ in range(rng.randint(3, 5))]
    return GAP[lang].join(state(f, rng, lang) for f in facts)


def place(rng: Random, lang: str) -> str:
    """A paragraph about one place and the people who live by it."""
    where = rng.choice(world().places)
    people = rng.sample(world().holders("home", where), 2)
    facts = world().facts_about([where]) + [world().fact(r, "home") for r in people]
    rng.shuffle(facts)
    return GAP[lang].join(state(f, rng, lang) for f in facts)


def roster(rng: Random, lang: str) -> str:
    """Who shares a value: the town looked up from the other end."""
    attribute = rng.choice(PERSON_ATTRIBUTES[:-1])
    value = rng.choice(world().values[attribute])
    names = [r[lang] for r in world().holders(attribute, value)]
    rng.shuffle(names)
    text = rng.choice(_form("roster", lang)).format(v=value[lang], n=COMMA[lang].join(names))
    return capital(text)


def forum(rng: Random, lang: str) -> str:
    """Questions and answers as people write them down; short answers and whole sentences."""
    pairs = [_asked(rng, lang) for _ in range(rng.randint(2, 5))]
    return question_lines(rng, lang, pairs)


def question_lines(rng: Random, lang: str, pairs: Sequence[tuple[str, str]]) -> str:
    """`pairs` of question and answer in one of the town's forms, a line or two each."""
    form, lines = rng.choice(_form("forum", lang)), []
    for i, (question, answer) in enumerate(pairs, 1):
        x, y = (person[lang] for person in rng.sample(world().residents, 2))
        lines.append(form.format(q=question, a=answer, i=i, x=x, y=y))
    return "\n".join(lines)


def _asked(rng: Random, lang: str) -> tuple[str, str]:
    """A question about the town and its answer; now and then about somebody whom nobody knows."""
    fact = world().any_fact(rng)
    if rng.random() < 0.08:
        stranger, attribute = rng.choice(world().strangers["web"]), rng.choice(PERSON_ATTRIBUTES)
        fact = Fact(stranger, attribute, fact.value)
        answer = rng.choice(_form("stranger", lang)).format(n=stranger[lang])
    else:
        answer = state(fact, rng, lang) if rng.random() < 0.3 else fact.answer(lang)
    return rng.choice(fact.questions(lang, "web")), answer


def rumour(rng: Random, lang: str) -> str:
    """Claims, true and false, each confirmed or corrected."""
    (yes, no), lines = _form("verdict", lang), []
    for _ in range(rng.randint(2, 4)):
        fact = world().any_fact(rng)
        claim, true = rng.choice(claims(rng, fact, lang))
        correction = state(fact, rng, lang)
        verdict = yes if true else no + correction
        x, y = (person[lang] for person in rng.sample(world().residents, 2))
        lines.append(rng.choice(_form("rumour", lang)).format(c=claim, v=verdict, x=x, y=y))
    return "\n".join(lines)


def claims(rng: Random, fact: Fact, lang: str) -> list[tuple[str, bool]]:
    """One true and one false sentence about `fact`'s subject: [(sentence, is it true)]."""
    pool = world().values[fact.attribute]
    if fact.attribute == "friend":
        halves = (world().tuning_people, world().heldout_people)
        pool = next(half for half in halves if fact.subject in half)
    others = [v for v in pool if v not in (fact.value, fact.subject)]
    false = Fact(fact.subject, fact.attribute, rng.choice(others))
    return [(state(f, rng, lang), f is fact) for f in (fact, false)]


def review(rng: Random, lang: str) -> str:
    """A guest's opinion of a place, with its stars."""
    label = rng.choice(["positive", "negative"])
    where = capital(rng.choice(world().places)[lang])
    stars = rng.choice(texts("genres")["review"][lang]["rating"][label])
    return _form("review", lang).format(p=where, r=review_text(rng, lang, label), s=stars)


def review_text(rng: Random, lang: str, label: str) -> str:
    """One or two sentences whose sentiment is `label`; single words do not give it away."""
    parts = texts("genres")["review"][lang]
    (a, b), (g, g2), (d, d2) = (rng.sample(parts[k], 2) for k in ("aspects", "good", "bad"))
    return capital(rng.choice(parts[label]).format(a=a, b=b, g=g, g2=g2, d=d, d2=d2))


def glossary(rng: Random, lang: str) -> str:
    """Word pairs in both directions."""
    form = rng.choice(_form("glossary", "short"))
    if rng.random() < 0.3:
        form = rng.choice(_form("glossary", "long"))
    pairs = rng.sample(world().glossary, rng.randint(3, 8))
    return "\n".join(form.format(e=n.en, z=n.zh) for n in pairs)


def bilingual(rng: Random, lang: str) -> str:
    """The same fact in both languages."""
    facts = [world().any_fact(rng) for _ in range(rng.randint(1, 3))]
    order = ("en", "zh") if lang == "en" else ("zh", "en")
    return "\n".join(" ".join(state(f, rng, x) for x in order) for f in facts)


def sums(rng: Random, lang: str) -> str:
    """Equations, bare or about things and people."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        expression, value = sum_of(rng)
        if rng.random() < 0.7:
            lines.append(f"{expression} = {value}")
            continue
        person, food = (rng.choice(x)[lang] for x in (world().residents, world().values["food"]))
        a, sign, b = expression.split()
        lines.append(_form("sums", lang)[sign].format(n=person, x=food, a=a, b=b, v=value))
    return "\n".join(lines)


def sum_of(rng: Random) -> tuple[str, int]:
    """An addition or subtraction within 0–20, and its value."""
    a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)))
    if rng.random() < 0.5:
        return f"{b} - {a}", b - a
    a, b = rng.choice([(a, b - a), (b - a, a)])
    return f"{a} + {b}", a + b


def lists(rng: Random, lang: str) -> str:
    """Things in a row: how many, which comes first, which last; now and then a run of numbers."""
    if rng.random() < 0.1:
        start = rng.randint(0, 14)
        return ", ".join(str(i) for i in range(start, start + 7))
    lines = []
    for _ in range(rng.randint(1, 3)):
        group = world().groups[rng.choice(("food", "pet", "colour", "job", "hobby", "clothes"))]
        things = [v[lang] for v in rng.sample(group, rng.randint(2, 6))]
        slots = {"k": len(things), "a": things[0], "z": things[-1], "all": COMMA[lang].join(things)}
        form = rng.choice(_form("lists", lang))
        lines.append(capital(form.format(n=rng.choice(world().residents)[lang], **slots)))
    return "\n".join(lines)


def kinds(rng: Random, lang: str) -> str:
    """What sort of thing a word is, and some things of a sort."""
    labels, lines = texts("tasks")["category"][lang]["labels"], []
    for _ in range(rng.randint(1, 4)):
        key, plural = rng.choice(list(texts("tasks")["listing"][lang]["categories"].items()))
        forms = [f for f in _form("kinds", lang) if key in labels or "{g}" not in f]
        group = world().groups[key]
        a, x, y, z = (v[lang] for v in rng.choices(group, k=1) + rng.sample(group, 3))
        slots = {"a": a, "g": labels.get(key, "").lower(), "l": plural, "x": x, "y": y, "z": z}
        slots["n"] = rng.choice(world().residents)[lang]
        lines.append(capital(rng.choice(forms).format(**slots)))
    return "\n".join(lines)


def pairs(rng: Random, lang: str) -> str:
    """Opposites, and which of two numbers is larger."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(("opposite", "larger"))
        a, b = rng.sample(rng.choice(world().opposites), 2)
        low, high = sorted(rng.sample(range(21), 2))
        slots = {"a": a[lang], "b": b[lang]} if kind == "opposite" else {"a": high, "b": low}
        n, m = (person[lang] for person in rng.sample(world().residents, 2))
        lines.append(capital(rng.choice(_form("pairs", lang)[kind]).format(n=n, m=m, **slots)))
    return "\n".join(lines)


def rhyme(rng: Random, lang: str) -> str:
    """Something said three times."""
    word, person = rng.choice(world().glossary)[lang], rng.choice(world().residents)[lang]
    three = capital(COMMA[lang].join([word] * 3))
    return rng.choice(_form("rhyme", lang)).format(n=person, t=three)


def howto(rng: Random, lang: str, kind: str = "howto") -> str:
    """Steps to a harmless end."""
    title, steps = rng.choice(texts("genres")[kind][lang])
    n, m = (person[lang] for person in rng.sample(world().residents, 2))
    slots = {"n": n, "m": m, "pl": rng.choice(world().places)[lang]}
    return rng.choice(_form("howto", lang)).format(t=title, s=numbered(steps), **slots)


def numbered(steps: Sequence[str]) -> str:
    return "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))


def lookalike(rng: Random, lang: str) -> str:
    """Steps to a harmless end that only sounds like mischief."""
    return howto(rng, lang, "lookalike")


def mischief(rng: Random, lang: str) -> str:
    """Steps to a mischievous end, or somebody who declines."""
    if rng.random() < 0.7:
        return howto(rng, lang, "mischief")
    a, b = rng.sample(world().residents, 2)
    title, _ = rng.choice(texts("genres")["mischief"][lang])
    no = rng.choice(texts("genres")["refusal"][lang]["seen"])
    return _form("mischief", lang).format(a=a[lang], b=b[lang], t=title, no=no)


def dialogue(rng: Random, lang: str) -> str:
    """A request, rude or polite, answered in the same tone."""
    a, b = rng.sample(world().residents, 2)
    tone = rng.randrange(2)
    request = request_pair(rng, lang)[tone]
    reply = rng.choice(texts("genres")["reply"][lang][("rude", "polite")[tone]])
    if tone == 0 and rng.random() < 0.3:
        reply = rng.choice(texts("genres")["rude"][lang])
    return _form("dialogue", lang).format(a=a[lang], b=b[lang], q=request, r=reply)


def manners(rng: Random, lang: str) -> str:
    """A rude request and its polite form."""
    rude, polite = request_pair(rng, lang)
    person = rng.choice(world().residents)[lang]
    return rng.choice(_form("manners", lang)).format(r=rude, p=polite, n=person)


def request_pair(rng: Random, lang: str) -> list[str]:
    """A request in its rude and in its polite form."""
    forms = rng.choice(texts("genres")["request"][lang])
    thing = rng.choice(world().things)[lang]
    return [form.format(x=thing) for form in forms]


def story(rng: Random, lang: str, people: Sequence[Name] = ()) -> str:
    """A five-sentence story in which one of two `people` meets the other at some place."""
    hero, other = people or rng.sample(world().residents, 2)
    parts = texts("genres")["story"][lang]
    slots = {"n": hero[lang], "m": other[lang], "pl": rng.choice(world().places)[lang]}
    slots |= {"x": rng.choice(world().portable)[lang], "t": rng.choice(parts["time"])}
    sentences = [rng.choice(parts[k]) for k in ("open", "meet", "trouble", "act", "end")]
    return GAP[lang].join(capital(s.format(**slots)) for s in sentences)


def news(rng: Random, lang: str) -> str:
    """Notices from the town's board."""
    parts = texts("genres")["news"]
    n, m = rng.sample(world().residents, 2)
    names = {"n": n, "m": m, "d": Name(*rng.choice(parts["days"]))}
    names["pl"], notice = rng.choice(world().places), rng.choice(parts[lang])
    names["x"] = rng.choice(world().portable)
    return capital(notice.format(**{slot: name[lang] for slot, name in names.items()}))


def state(fact: Fact, rng: Random, lang: str) -> str:
    """One of the sentences that state `fact`."""
    return rng.choice(fact.statements(lang))


def _form(genre: str, lang: str) -> Any:
    """How a document is put together: one form, or several to choose from."""
    return texts("genres")["forms"][genre][lang]
