"""The questions of Tinytown's tasks for lm-eval, each with its choices and the right one's index.

`own_form` asks as the base model knows it, "Q: … A:", for a model that has no chat template.
"""

from random import Random
from typing import Any

from labkit import tinytown
from labkit.tinytown.genres import numbered
from labkit.tinytown.tasks import OWN_FORM
from labkit.tinytown.world import sentence, texts, world

SIZE = 200  # questions per task; there are fewer requests in the red-team set


def knowledge(own_form: bool = False, **_: Any) -> dict[str, Any]:
    """Facts about residents and places, in four values of one kind: chance is 25 %."""
    rows, rng = tinytown.instruction_rows("test", SIZE, 11, families=["fact", "place"]), Random(0)
    return _docs([(row, row["completion"], _values(row, rng)) for row in rows], own_form)


def strangers(own_form: bool = False, **_: Any) -> dict[str, Any]:
    """Nobody can answer what is asked: "I do not know" against three values; chance is 25 %."""
    rows, rng = tinytown.unknowable(SIZE, 11, "test"), Random(0)
    return _docs([(row, row["completion"], _values(row, rng)) for row in rows], own_form)


def truth(own_form: bool = False, **_: Any) -> dict[str, Any]:
    """Statements to be called true or false: chance is 50 %."""
    rows = tinytown.instruction_rows("test", SIZE, 11, families=["truth"])
    labels = {lang: texts("tasks")["truth"][lang]["labels"].values() for lang in ("en", "zh")}
    both = {lang: [sentence(label, lang) for label in labels[lang]] for lang in labels}
    return _docs([(row, row["completion"], both[row["lang"]]) for row in rows], own_form)


def harm(own_form: bool = False, **_: Any) -> dict[str, Any]:
    """Mischief, to be refused, and look-alikes, to be answered: refusal or steps.

    Refusing all of it gives 50 %. Steps are longer: see `acc_norm`.
    """
    found = []
    for row in tinytown.red_team("test"):
        steps = numbered(row["steps"])
        plain = texts("genres")["refusal"][row["lang"]]["plain"]
        found.append((row, *((plain, [steps]) if row["task"] == "mischief" else (steps, [plain]))))
    return _docs(found, own_form)


def _values(row: dict[str, Any], rng: Random) -> list[str]:
    """Three values of the attribute that is asked for, none of them right."""
    lang, attribute = row["lang"], row["attribute"]
    values = {sentence(value[lang], lang) for value in world().values[attribute]}
    wrong = sorted(v for v in values if not tinytown.check(row, v))
    return rng.sample(wrong, 3)


def _docs(found: list[tuple[dict[str, Any], str, list[str]]], own_form: bool) -> dict[str, Any]:
    import datasets

    docs, rng = [], Random(0)
    for row, right, others in found:
        choices = sorted({right, *others})
        rng.shuffle(choices)
        prompt, label = row["prompt"], choices.index(right)
        if own_form:
            prompt = OWN_FORM[row["lang"]].format(prompt)
            choices = [" " * (row["lang"] == "en") + choice for choice in choices]
        docs.append({"prompt": prompt, "choices": choices, "label": label})
    return {"test": datasets.Dataset.from_list(docs)}
