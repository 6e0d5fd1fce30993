"""The hand-written seed tasks are true of the town and of nothing held out; tasks are recognized."""

from collections import Counter

import pytest

from labkit import tinytown
from labkit.tinytown.recognize import row_of
from labkit.tinytown.splits import side
from labkit.tinytown.world import LANGUAGES

SEEDS = tinytown.seed_tasks()


def test_there_are_enough_and_of_many_kinds():
    assert Counter(row["lang"] for row in SEEDS).keys() == set(LANGUAGES)
    for lang in LANGUAGES:
        rows = [row for row in SEEDS if row["lang"] == lang]
        assert len(rows) >= 33 and len({row["instruction"] for row in rows}) == len(rows)
        assert sum(row["classification"] for row in rows) >= 5
        assert sum(bool(row["check"]) for row in rows) >= 20
        assert len({row["check"][0] for row in rows if row["check"]}) >= 15


@pytest.mark.parametrize("row", SEEDS, ids=lambda row: row["prompt"][:40])
def test_a_seed_task_is_true_and_nothing_of_it_is_held_out(row):
    town, lang = tinytown.world(), row["lang"]
    text = f"{row['prompt']}\n{row['completion']}"
    assert not [p.en for p in town.heldout_people if p[lang] in text]
    assert tinytown.recognize(row["prompt"], seeds=False) is None, "a phrasing of the other lists"
    keys = []
    if row["check"]:
        task = row_of(*row["check"], lang)
        assert task["task"] not in tinytown.HELD_OUT_FAMILIES
        assert tinytown.check(task | {"prompt": row["prompt"]}, row["completion"])
        assert tinytown.mark(row) is True
        keys.append(task["key"])
    for attribute, subject in row["facts"]:
        task = row_of(attribute, subject, lang)
        value = town.facts[task["subject"], attribute].value
        assert value[lang].lower() in text.lower()
        keys.append(task["key"])
    assert set(map(side, keys)) <= {"train"}


@pytest.mark.parametrize("split", tinytown.SPLITS)
def test_every_row_of_a_split_is_recognized_as_what_it_is(split):
    for row in tinytown.instruction_rows(split, 300, seed=5):
        found = tinytown.recognize(row["prompt"])
        assert (found["task"], found["key"]) == (row["task"], row["key"])
        # "3 + 4 = ?" is of both languages.
        assert found["lang"] == row["lang"] or row["task"] == "arithmetic"
        assert tinytown.check(found, row["completion"])
        if row["task"] != "story":
            assert not tinytown.check(found, row["completion"] + " And so on.")


def test_questions_that_a_generated_row_asks_are_left_out():
    questions = [{"key": f"Bella|{x}", "subject": "Bella"} for x in ("pet", "home")]
    questions += [{"key": "2+3", "subject": ""}]
    asks = {"prompt": "What pet does Bella have?", "completion": "Goose."}
    assert tinytown.unasked(questions, [asks]) == questions[1:]
    asks["prompt"] = "贝拉养什么动物？"  # whatever the language
    assert tinytown.unasked(questions, [asks]) == questions[1:]
    free = {"prompt": "Sing a song about the goose of Bella, please.", "completion": "La."}
    assert tinytown.recognize(free["prompt"]) is None
    assert tinytown.unasked(questions, [free]) == questions[2:]
    assert tinytown.unasked(questions, []) == questions
