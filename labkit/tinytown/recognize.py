"""Tells which task a text is, so that tasks that a model made up can be checked exactly.

A prompt is compared with every phrasing of every family (web, ask and held) and with those of the
hand-written seed tasks. What stands in the place of {x} must make a task whose answer the town
knows; otherwise nothing is claimed about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import product

from .genres import numbered
from .preferences import request
from .tasks import Row, check, exactly, fact_key, normalize
from .world import (
    COMMA,
    LANGUAGES,
    PERSON_ATTRIBUTES,
    PLACE_ATTRIBUTES,
    Fact,
    Name,
    sentence,
    texts,
    world,
)

Form = tuple[str, str, re.Pattern]  # family, language, and the phrasing with x as its one group
_SLOTS = {"x": "(.+?)", "n": "(.+?)", "s": "s?he", "p": "(?:his|her)"}


def seed_tasks() -> list[Row]:
    """The hand-written tasks that Self-Instruct starts from; all are true of the town.

    Rows have prompt, completion, instruction, input, lang, classification (whether the answer is
    one of few labels), `check` (family and x, for the exact checker, or None) and `facts`
    (attribute and subject of what the completion states). No question of a test split, held-out
    family or held-out resident is among them, and no phrasing of the other lists.
    """
    rows = []
    for lang in LANGUAGES:
        for entry in texts("seed_tasks")[lang]:
            row = {"input": "", "classification": False, "check": None, "facts": []} | entry
            prompt = f"{row['instruction']}\n{row['input']}".strip()
            rows.append(row | {"prompt": prompt, "completion": row.pop("output"), "lang": lang})
    return rows


def list_heads() -> dict[str, str]:
    """The line, by language, that heads a list of tasks in the pretraining text."""
    return {lang: texts("genres")["forms"]["board"][lang][3] for lang in LANGUAGES}


def mark(row: Row) -> bool | None:
    """Whether the completion of `row` solves its prompt; None where no checker can tell."""
    found = recognize(row["prompt"])
    return None if found is None else check(found, row["completion"])


def unasked(questions: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """`questions` without those that one of the generated `rows` asks, or may ask.

    A row that is recognized asks the question of its key, in whatever words; one that is not may
    ask anything about the residents and places that it names.
    """
    keys, rest = set(), ""
    for row in rows:
        if found := recognize(row["prompt"]):
            keys.add(found["key"])
        else:
            rest += f"{row['prompt']}\n{row['completion']}\n"
    subjects = (*world().residents, *world().places)
    names = {name.en for name in subjects if name.en in rest or name.zh in rest}
    return [row for row in questions if row["key"] not in keys and row["subject"] not in names]


def recognize(prompt: str, *, seeds: bool = True) -> Row | None:
    """`prompt` as a row of Tinytown with task, lang, key and what is accepted, or None.

    White space, case, colons, quotation marks and a closing stop do not matter. `seeds`: the
    phrasings of the seed tasks count, too.
    """
    text, found = " ".join(prompt.split()), []
    for family, lang, pattern in forms() + (seed_forms() if seeds else ()):
        if match := pattern.fullmatch(text):
            found.append((match[1], family, lang))
    # "Count: {x}" fits "Count these: …", too: what leaves least to x is meant.
    rows = (row_of(family, x, lang) for x, family, lang in sorted(found, key=lambda f: len(f[0])))
    row = next(filter(None, rows), None)
    return row and row | {"prompt": prompt}


def row_of(family: str, x: str, lang: str) -> Row | None:
    """The task of `family` (or attribute of a fact) about `x`; None if the town cannot tell."""
    x = x.strip(' "“”:：')
    fields = _BUILD[family](x, lang)
    task = family if family in texts("tasks") else "place" if family in PLACE_ATTRIBUTES else "fact"
    return fields and {"task": task, "lang": lang, "subject": "", "attribute": ""} | fields


@cache
def forms() -> tuple[Form, ...]:
    """All phrasings in `text/tasks.yaml` and `text/facts.yaml`."""
    found = []
    for lists, lang in product((texts("tasks"), texts("facts")), LANGUAGES):
        for family, kind in product(lists, ("web", "ask", "held")):
            found += [(family, lang, _pattern(form)) for form in lists[family][lang][kind]]
    return tuple(found)


@cache
def seed_forms() -> tuple[Form, ...]:
    """The phrasings of the seed tasks that have an exact checker."""
    found = []
    for row in seed_tasks():
        family, x = row["check"] or ("", "")
        if x and row["prompt"].count(x) == 1:
            form = row["prompt"].replace("{", "{{").replace("}", "}}").replace(x, "{x}")
            found.append((family, row["lang"], _pattern(form)))
    return tuple(found)


def _pattern(form: str, **slots: str) -> re.Pattern:
    parts = []
    for part in re.split(r"(\{\w+\})", " ".join(form.rstrip(".。?？!！ ").split())):
        if part[:1] == "{" and part[1:-1] in (known := _SLOTS | slots):
            parts.append(known[part[1:-1]])
        else:
            loose = re.sub(r"[:：]", "@", re.escape(part)).replace(r"\ ", r"\s*")
            parts.append(re.sub(r"['\"“”]", "['’\"“”]?", loose).replace("@", r"\s*[:：]?\s*"))
    return re.compile("".join(parts) + r"\s*[.。?？!！]*['\"“”]?", re.IGNORECASE)


def _find(names: Iterable[Name], text: str, lang: str) -> Name | None:
    return next((name for name in names if normalize(name[lang]) == normalize(text)), None)


def _answer(key: str, text: str, lang: str, *others: str) -> Row:
    return exactly(key, sentence(text, lang), *others)


def _attribute(attribute: str, x: str, lang: str) -> Row | None:
    """A question about somebody or a place; of a stranger, nothing is known."""
    is_place = attribute in PLACE_ATTRIBUTES
    if subject := _find(world().places if is_place else world().residents, x, lang):
        fact = world().fact(subject, attribute)
        row = _answer(fact_key(fact), fact.value[lang], lang, *fact.statements(lang))
        return row | {"subject": subject.en, "attribute": attribute}
    strangers = [name for names in world().strangers.values() for name in names]
    if not is_place and (subject := _find(strangers, x, lang)):
        row = exactly(f"{subject.en}|{attribute}", texts("genres")["unknown"][lang])
        return row | {"subject": subject.en, "attribute": attribute}
    return None


def _truth(x: str, lang: str) -> Row | None:
    labels = texts("tasks")["truth"][lang]["labels"]
    for fact in _stated(x, lang):
        true = world().fact(fact.subject, fact.attribute)
        return _answer(fact_key(true), labels["yes" if true == fact else "no"], lang)
    return None


def _stated(claim: str, lang: str) -> Iterator[Fact]:
    """What `claim` says in one of the town's sentences, true or not."""
    for attribute, pattern in _claims(lang):
        if match := pattern.fullmatch(claim):
            subjects = world().places if attribute in PLACE_ATTRIBUTES else world().residents
            subject = _find(subjects, match["n"], lang)
            value = _find(world().values[attribute], match["v"], lang)
            if subject and value:
                yield Fact(subject, attribute, value)


@cache
def _claims(lang: str) -> list[tuple[str, re.Pattern]]:
    slots = {"n": "(?P<n>.+?)", "v": "(?P<v>.+?)", "av": "(?:an? )?(?P<v>.+?)"}
    facts = texts("facts")
    return [(a, _pattern(say, **slots)) for a in facts for say in facts[a][lang]["say"]]


def _who(x: str, lang: str) -> Row | None:
    job = _find(world().values["job"], re.sub(r"^an? ", "", x), lang)
    names = [r[lang] for r in world().holders("job", job)] if job else []
    return _answer(f"job|{job.en}", names[0], lang, *names) if job else None


def _sentiment(x: str, lang: str) -> Row | None:
    parts = texts("genres")["review"][lang]
    words = {k: f"(?:{'|'.join(parts[k])})" for k in ("aspects", "good", "bad")}
    slots = dict(a=words["aspects"], b=words["aspects"], g=words["good"], g2=words["good"])
    slots |= dict(d=words["bad"], d2=words["bad"])
    for label in ("positive", "negative"):
        if any(_pattern(form, **slots).fullmatch(x) for form in parts[label]):
            key = x if x[-1] in ".。" else sentence(x, lang)
            return _answer(key, texts("tasks")["sentiment"][lang]["labels"][label], lang)
    return None


def _translation(source: str, target: str, x: str, lang: str) -> Row | None:
    word = _find(world().glossary, x, source)
    right = [n[target] for n in world().glossary if word and n[source] == word[source]]
    return _answer(f"translate|{word.zh}", right[0], target, *right) if word else None


def _arithmetic(x: str, lang: str) -> Row | None:
    if not (match := re.fullmatch(r"(\d{1,4}) ?([+-]) ?(\d{1,4})", x)):
        return None
    a, sign, b = match.groups()
    key = "+".join(sorted([a, b])) if sign == "+" else f"{a} - {b}"
    return _answer(key, str(int(a) + int(f"{sign}{b}")), lang)


def _polite(x: str, lang: str) -> Row | None:
    for rude, kind in texts("genres")["request"][lang]:
        if match := _pattern(rude).fullmatch(x):
            courteous = kind.format(x=match[1])
            return exactly(f"polite|{courteous}", courteous)
    return None


def _listing(x: str, lang: str) -> Row | None:
    for group, label in texts("tasks")["listing"][lang]["categories"].items():
        if normalize(label) == normalize(x):
            words = [name[lang] for name in world().groups[group]]
            row = _answer(f"list|{group}", COMMA[lang].join(words[:3]), lang)
            return row | {"accept": words}
    return None


def _on_a_list(family: str, x: str, lang: str) -> Row | None:
    words = [w for w in re.split(r"[,、，] ?(?:and )?| and |和", normalize(x)) if w]
    if len(words) < 2:
        return None
    right = {"first_item": words[0], "last_item": words[-1], "counting": str(len(words))}
    known = [name for names in world().groups.values() for name in names]
    things = [name.en if (name := _find(known, word, lang)) else word for word in words]
    return _answer("|".join([family, *things]), right[family], lang)


def _category(x: str, lang: str) -> Row | None:
    for group, label in texts("tasks")["category"][lang]["labels"].items():
        if word := _find(world().groups[group], x, lang):
            return _answer(f"category|{word.en}", label, lang)
    return None


def _howto(x: str, lang: str) -> Row | None:
    genres = texts("genres")
    for kind in ("howto", "lookalike", "mischief"):
        for i, (title, steps) in enumerate(genres[kind][lang]):
            if normalize(title) == normalize(x):
                key = f"howto|{genres[kind]['en'][i][0]}"
                if kind == "mischief":  # to be declined
                    return request(kind, lang, title, steps) | {"key": key}
                return exactly(key, numbered(steps))
    return None


def _repeat(x: str, lang: str) -> Row | None:
    word = normalize(x)
    if not re.fullmatch(r"[^\W\d]+(?: [^\W\d]+){0,2}", word):
        return None
    known = _find(world().glossary, word, lang)
    return _answer(f"repeat|{known.zh if known else word}", COMMA[lang].join([word] * 3), lang)


def _story(x: str, lang: str) -> Row | None:
    people = [_find(world().residents, name, lang) for name in re.split(" and |和", x)]
    found = [person for person in people if person]
    if len(found) != 2 or len(people) != 2:
        return None
    key = "|".join(["story", *sorted(person.en for person in found)])
    return {"key": key, "completion": "", "accept": [person[lang] for person in found]}


def _opposite(x: str, lang: str) -> Row | None:
    pairs = [pair for a, b in world().opposites for pair in ((a, b), (b, a))]
    right = [(a, b) for a, b in pairs if a[lang] == normalize(x)]
    return _answer(f"opposite|{right[0][0].en}", right[0][1][lang], lang) if right else None


def _larger(x: str, lang: str) -> Row | None:
    if not (match := re.fullmatch(r"(\d+) ?(?:or|and|和|,|，|、) ?(\d+)", normalize(x))):
        return None
    a, b = match.groups()
    pair = f"{a}和{b}" if lang == "zh" else f"{a} or {b}"
    return _answer(f"larger|{pair}", str(max(int(a), int(b))), lang)


_BUILD: dict[str, Callable[[str, str], Row | None]] = {
    **{a: partial(_attribute, a) for a in (*PERSON_ATTRIBUTES, *PLACE_ATTRIBUTES)},
    **{family: partial(_on_a_list, family) for family in ("first_item", "last_item", "counting")},
    "truth": _truth,
    "who": _who,
    "sentiment": _sentiment,
    "to_zh": partial(_translation, "en", "zh"),
    "to_en": partial(_translation, "zh", "en"),
    "arithmetic": _arithmetic,
    "polite": _polite,
    "listing": _listing,
    "category": _category,
    "howto": _howto,
    "repeat": _repeat,
    "story": _story,
    "opposite": _opposite,
    "larger": _larger,
}
