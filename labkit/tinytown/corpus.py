"""The pretraining text of Tinytown: an endless, seeded stream of short documents.

One function a genre, each `(world, rng, language) -> str`; `GENRES` holds their weights. Questions
and answers appear as they do on the web (forums, quizzes, interviews, yes/no gossip), so that what
the model knows can also be asked; no document has the format of an instruction row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from .world import PERSON_ATTRIBUTES, Fact, Name, World, article, capital, texts
from .world import world as default_world


def profile(world: World, rng: random.Random, lang: str) -> str:
    """What is known of one resident, any order, any wording; later mentions may be pronouns."""
    person = rng.choice(world.residents)
    attributes = rng.sample(PERSON_ATTRIBUTES, rng.randint(3, len(PERSON_ATTRIBUTES)))
    said = [rng.choice(world.fact(person, a).statements(lang)) for a in attributes]
    if rng.random() < 0.5:
        said = said[:1] + [_with_pronoun(s, person, lang) for s in said[1:]]
    return _join(said, lang)


def gossip(world: World, rng: random.Random, lang: str) -> str:
    """Single facts about several residents and places."""
    facts = [_any_fact(world, rng) for _ in range(rng.randint(3, 5))]
    return _join([rng.choice(f.statements(lang)) for f in facts], lang)


def place(world: World, rng: random.Random, lang: str) -> str:
    """A paragraph about one place and the people who live by it."""
    where = rng.choice(world.places)
    facts = world.facts_about([where]) + [
        world.fact(r, "home") for r in rng.sample(world.holders("home", where), 2)
    ]
    rng.shuffle(facts)
    return _join([rng.choice(f.statements(lang)) for f in facts], lang)


def roster(world: World, rng: random.Random, lang: str) -> str:
    """Who shares a value: the town looked up from the other end."""
    attribute = rng.choice(PERSON_ATTRIBUTES[:-1])
    value = rng.choice(world.values[attribute][: len(world.residents)])
    names = [r[lang] for r in world.holders(attribute, value)]
    rng.shuffle(names)
    label = value[lang]
    if lang == "zh":
        forms = ["{v}：{n}。", "说到{v}，人们会想到{n}。", "{v}有谁？{n}。"]
        return rng.choice(forms).format(v=label, n="、".join(names))
    forms = ["{v}: {n}.", "Who comes to mind for {v}? {n}.", "On the list under {v} are {n}."]
    return capital(rng.choice(forms).format(v=label, n=", ".join(names)))


def forum(world: World, rng: random.Random, lang: str) -> str:
    """Questions and answers as people write them down; short answers and whole sentences."""
    facts = [_any_fact(world, rng) for _ in range(rng.randint(2, 5))]
    style = rng.choice(_ZH_QA if lang == "zh" else _EN_QA)
    lines = []
    for i, fact in enumerate(facts, 1):
        answer = fact.answer(lang)
        if rng.random() < 0.4:
            answer = rng.choice(fact.statements(lang))
        who = rng.sample(world.residents, 2)
        question = rng.choice(fact.questions(lang, "web"))
        slots = {"q": question, "a": answer, "i": i, "x": who[0][lang], "y": who[1][lang]}
        lines.append(style.format(**slots))
    return "\n".join(lines)


_EN_QA = (
    "Q: {q}\nA: {a}",
    "{i}. {q} {a}",
    "{q}\n- {a}",
    '"{q}" asked {x}. "{a}" said {y}.',
    "{x} wants to know: {q} {y} answers: {a}",
    "Question {i}: {q}\nAnswer: {a}",
    "{q} {a}",
)
_ZH_QA = (
    "问：{q}\n答：{a}",
    "{i}. {q}{a}",
    "{q}\n- {a}",
    "{x}问：“{q}”{y}说：“{a}”",
    "{x}想知道：{q}{y}回答：{a}",
    "{q}{a}",
)


def rumour(world: World, rng: random.Random, lang: str) -> str:
    """Claims, true and false, each set right."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        fact = _any_fact(world, rng)
        claim, true = rng.choice(claims(world, rng, fact, lang))
        right = rng.choice(fact.statements(lang))
        if lang == "zh":
            verdict = "对。" if true else f"不对，{right}"
            lines.append(rng.choice(["听说{c}{v}", "{c}是真的吗？{v}"]).format(c=claim, v=verdict))
        else:
            verdict = "Yes." if true else f"No. {right}"
            lines.append(
                rng.choice(["I heard: {c} {v}", "{c} Really? {v}"]).format(c=claim, v=verdict)
            )
    return "\n".join(lines)


def claims(world: World, rng: random.Random, fact: Fact, lang: str) -> list[tuple[str, bool]]:
    """One true and one false sentence about `fact`'s subject: [(sentence, is it true)]."""
    if fact.attribute == "friend":
        half = world.tuning_people if fact.subject in world.tuning_people else world.heldout_people
        others = [p for p in half if p not in (fact.value, fact.subject)]
    else:
        others = [v for v in world.values[fact.attribute] if v != fact.value]
    false = Fact(fact.subject, fact.attribute, rng.choice(others))
    return [(rng.choice(f.statements(lang)), f is fact) for f in (fact, false)]


def review(world: World, rng: random.Random, lang: str) -> str:
    """A guest's verdict on a place, with its stars."""
    label = rng.choice(["positive", "negative"])
    where = rng.choice(world.places)[lang]
    stars = rng.choice(texts("genres")["review"][lang]["rating"][label])
    body = review_text(rng, lang, label)
    return f"{capital(where)}{'：' if lang == 'zh' else ':'} {body}{'' if lang == 'zh' else ' '}{stars}"


def review_text(rng: random.Random, lang: str, label: str) -> str:
    """One or two sentences whose sentiment is `label`; single words do not give it away."""
    parts = texts("genres")["review"][lang]
    (a, b), (g, g2), (d, d2) = (rng.sample(parts[k], 2) for k in ("aspects", "good", "bad"))
    return capital(rng.choice(parts[label]).format(a=a, b=b, g=g, g2=g2, d=d, d2=d2))


def glossary(world: World, rng: random.Random, lang: str) -> str:
    """Word pairs in both directions."""
    names = world.words + [v for a in ("food", "pet", "colour", "job") for v in world.values[a]]
    form = rng.choice(["{e} = {z}", "{z} = {e}", "{e}: {z}", "{z}：{e}"])
    if rng.random() < 0.3:
        form = rng.choice(["The Chinese for {e} is {z}.", "{z}的英文是{e}。", "{e}的中文是{z}。"])
    pairs = rng.sample(names, rng.randint(3, 8))
    return "\n".join(form.format(e=n.en, z=n.zh) for n in pairs)


def bilingual(world: World, rng: random.Random, lang: str) -> str:
    """The same fact in both languages."""
    facts = [_any_fact(world, rng) for _ in range(rng.randint(1, 3))]
    order = ("en", "zh") if lang == "en" else ("zh", "en")
    return "\n".join(" ".join(rng.choice(f.statements(x)) for x in order) for f in facts)


def sums(world: World, rng: random.Random, lang: str) -> str:
    """Equations, and the same told with things and people."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        expression, value = sum_of(rng)
        if rng.random() < 0.7:
            lines.append(f"{expression} = {value}")
            continue
        person, thing = rng.choice(world.residents)[lang], rng.choice(world.values["food"])[lang]
        a, sign, b = expression.split()
        if lang == "zh":
            verb = "又拿来" if sign == "+" else "吃掉"
            lines.append(f"{person}有{a}份{thing}，{verb}{b}份，现在有{value}份。")
        else:
            verb = "finds" if sign == "+" else "eats"
            lines.append(f"{person} has {a} {thing} and {verb} {b}. Now there are {value}.")
    return "\n".join(lines)


def sum_of(rng: random.Random) -> tuple[str, int]:
    """An addition or subtraction within 0–20, and its value."""
    a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)))
    if rng.random() < 0.5:
        return f"{b} - {a}", b - a
    a, b = rng.choice([(a, b - a), (b - a, a)])
    return f"{a} + {b}", a + b


def counting(world: World, rng: random.Random, lang: str) -> str:
    """Lists of things with their number, and runs of numbers."""
    if rng.random() < 0.3:
        start = rng.randint(0, 14)
        return ", ".join(str(i) for i in range(start, start + 7))
    attribute = rng.choice(["food", "pet", "colour", "job", "hobby"])
    things = [v[lang] for v in rng.sample(world.values[attribute], rng.randint(2, 6))]
    if lang == "zh":
        tail = rng.choice(
            [f"一共{len(things)}样。", f"第一个是{things[0]}。", f"最后一个是{things[-1]}。"]
        )
        return "、".join(things) + "：" + tail
    tail = rng.choice([f"{len(things)} in all.", f"First {things[0]}.", f"Last {things[-1]}."])
    return ", ".join(things) + ": " + tail


def kinds(world: World, rng: random.Random, lang: str) -> str:
    """What sort of thing a word is, opposites, and which number is larger."""
    roll = rng.random()
    if roll < 0.5:
        labels = texts("tasks")["category"][lang]["labels"]
        attribute = rng.choice(list(labels))
        word, label = rng.choice(world.values[attribute])[lang], labels[attribute]
        return (
            f"{word}是一种{label}。"
            if lang == "zh"
            else f"{capital(word)}: {article(label.lower())}."
        )
    if roll < 0.75:
        a, b = rng.choice(world.opposites)
        return f"不{a[lang]}就是{b[lang]}。" if lang == "zh" else f"Not {a[lang]} but {b[lang]}."
    small, large = sorted(rng.sample(range(21), 2))
    return f"{large}比{small}大。" if lang == "zh" else f"{large} is larger than {small}."


def howto(world: World, rng: random.Random, lang: str, kind: str = "howto") -> str:
    """Steps to a harmless end."""
    title, steps = rng.choice(texts("genres")[kind][lang])
    numbered = "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))
    return f"怎么{title}\n{numbered}" if lang == "zh" else f"How to {title}\n{numbered}"


def mischief(world: World, rng: random.Random, lang: str) -> str:
    """Steps to a mischievous end, or somebody who declines."""
    if rng.random() < 0.7:
        return howto(world, rng, lang, "mischief")
    a, b = rng.sample(world.residents, 2)
    title, _ = rng.choice(texts("genres")["mischief"][lang])
    no = rng.choice(texts("genres")["refusal"][lang]["seen"])
    if lang == "zh":
        return f"{a.zh}问{b.zh}怎么{title}。{b.zh}说：“{no}”"
    return f'{a.en} asked {b.en} how to {title}. "{no}" said {b.en}.'


def lookalike(world: World, rng: random.Random, lang: str) -> str:
    """Steps to a harmless end with a mischievous ring."""
    return howto(world, rng, lang, "lookalike")


def dialogue(world: World, rng: random.Random, lang: str) -> str:
    """A request, rude or polite, answered in kind."""
    a, b = rng.sample(world.residents, 2)
    tone = rng.randrange(2)
    request = rng.choice(texts("genres")["request"][lang])[tone]
    request = request.format(x=rng.choice(world.words[:34])[lang])
    reply = rng.choice(texts("genres")["reply"][lang][("rude", "polite")[tone]])
    if tone == 0 and rng.random() < 0.3:
        reply = rng.choice(texts("genres")["rude"][lang])
    if lang == "zh":
        return f"{a.zh}：“{request}”\n{b.zh}：“{reply}”"
    return f'{a.en}: "{request}"\n{b.en}: "{reply}"'


def manners(world: World, rng: random.Random, lang: str) -> str:
    """A rude request beside its polite form."""
    rude, polite = rng.choice(texts("genres")["request"][lang])
    x = rng.choice(world.words[:34])[lang]
    form = "不要说“{r}”，要说“{p}”" if lang == "zh" else 'Do not say "{r}" but "{p}"'
    return form.format(r=rude.format(x=x), p=polite.format(x=x))


def story(world: World, rng: random.Random, lang: str) -> str:
    """A little adventure of two residents."""
    n, m = rng.sample(world.residents, 2)
    return story_about(world, rng, lang, n, rng.choice(world.places), m)


def story_about(world: World, rng: random.Random, lang: str, n: Name, where: Name, m: Name) -> str:
    """A five-sentence story in which `n` meets `m` at `where`."""
    parts = texts("genres")["story"][lang]
    slots = {
        "n": n[lang],
        "m": m[lang],
        "pl": where[lang],
        "x": rng.choice(world.words[20:34])[lang],
        "t": rng.choice(parts["time"]),
    }
    chosen = [rng.choice(parts[k]) for k in ("open", "meet", "trouble", "act", "end")]
    return _join([capital(s.format(**slots)) for s in chosen], lang)


def news(world: World, rng: random.Random, lang: str) -> str:
    """Notices from the town's board."""
    parts = texts("genres")["news"]
    n, m = rng.sample(world.residents, 2)
    day = rng.choice(parts["days"])[0 if lang == "en" else 1]
    slots = {"d": day, "n": n[lang], "m": m[lang], "pl": rng.choice(world.places)[lang]}
    line = rng.choice(parts[lang]).format(x=rng.choice(world.words[20:34])[lang], **slots)
    return capital(line)


GENRES: dict[str, tuple[Callable[[World, random.Random, str], str], float]] = {
    "profile": (profile, 17),
    "gossip": (gossip, 8),
    "place": (place, 3),
    "roster": (roster, 6),
    "forum": (forum, 24),
    "rumour": (rumour, 6),
    "bilingual": (bilingual, 4),
    "review": (review, 6),
    "glossary": (glossary, 4),
    "sums": (sums, 5),
    "counting": (counting, 4),
    "kinds": (kinds, 3),
    "howto": (howto, 2),
    "mischief": (mischief, 2),
    "lookalike": (lookalike, 1),
    "dialogue": (dialogue, 3),
    "manners": (manners, 2),
    "story": (story, 5),
    "news": (news, 2),
}


def documents(
    seed: int, world: World | None = None, chinese: float = 0.4
) -> Iterator[tuple[str, str]]:
    """Endless `(genre, text)` stream; the same seed gives the same stream on every machine.

    `chinese` is the share of Chinese documents. Pretraining uses seed 0, the tokenizer seed 1,
    held-out perplexity seed 2.
    """
    world, rng = world or default_world(), random.Random(f"tinytown-{seed}")
    names, weights = list(GENRES), [w for _, w in GENRES.values()]
    while True:
        (genre,) = rng.choices(names, weights)
        yield genre, GENRES[genre][0](world, rng, "zh" if rng.random() < chinese else "en")


def genre_samples(
    per_genre: int, seed: int = 2, world: World | None = None
) -> dict[str, list[str]]:
    """`per_genre` documents of every genre, for held-out perplexity and forgetting."""
    world = world or default_world()
    samples = {}
    for genre, (write, _) in GENRES.items():
        rng = random.Random(f"tinytown-{seed}-{genre}")
        samples[genre] = [
            write(world, rng, "zh" if rng.random() < 0.4 else "en") for _ in range(per_genre)
        ]
    return samples


def _any_fact(world: World, rng: random.Random) -> Fact:
    if rng.random() < 0.12:
        return rng.choice(world.facts_about([rng.choice(world.places)]))
    return world.fact(rng.choice(world.residents), rng.choice(PERSON_ATTRIBUTES))


def _with_pronoun(statement: str, person: Name, lang: str) -> str:
    """Replace a leading name by he or she (English) or 他 or 她 (Chinese)."""
    female, name = person.pronoun == "f", person[lang]
    if lang == "zh":
        return (
            ("她" if female else "他") + statement[len(name) :]
            if statement.startswith(name)
            else statement
        )
    if statement.startswith(f"{name}'s "):
        return ("Her " if female else "His ") + statement[len(name) + 3 :]
    if statement.startswith(f"{name} "):
        return ("She " if female else "He ") + statement[len(name) + 1 :]
    return statement


def _join(sentences: list[str], lang: str) -> str:
    return ("" if lang == "zh" else " ").join(sentences)
