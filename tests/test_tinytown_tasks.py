"""Instruction rows: disjoint splits, exact checkers, and no answer by counting words."""

import math
import random
import re
from collections import Counter

import pytest

from labkit.tinytown import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    SPLITS,
    check,
    instruction_rows,
    normalize,
    world,
)

TRAIN = instruction_rows("train", 6000)
OTHERS = {split: instruction_rows(split, 500) for split in SPLITS[1:]}


def names(rows):
    text = "\n".join(r["prompt"] + "\n" + r["completion"] for r in rows)
    return {
        p.en
        for p in world().residents
        if re.search(rf"\b{p.en}\b", text) or (p.zh in text and p.zh != "朱诺")
    }


def test_no_prompt_is_in_two_splits():
    prompts = {r["prompt"] for r in TRAIN}
    assert len(prompts) == len(TRAIN)
    for rows in OTHERS.values():
        assert rows and not prompts & {r["prompt"] for r in rows}


def test_people_phrasings_and_families_are_held_out():
    held = {p.en for p in world().heldout_people}
    who = [r for r in TRAIN if r["task"] != "truth" or r["attribute"] != "friend"]
    assert not names(who) & held
    assert {r["subject"] for r in OTHERS["heldout_people"]} <= held
    assert {r["phrasing"][:4] for r in OTHERS["heldout_phrasings"]} == {"held"}
    assert {r["phrasing"][:3] for r in TRAIN} == {"ask"}
    assert {r["task"] for r in OTHERS["heldout_families"]} == set(HELD_OUT_FAMILIES)
    assert not {r["task"] for r in TRAIN} & set(HELD_OUT_FAMILIES)


def test_no_row_of_training_names_a_held_out_person():
    assert not names(TRAIN) & {p.en for p in world().heldout_people}


def test_the_split_does_not_depend_on_the_seed():
    again = {r["prompt"] for r in instruction_rows("train", 6000, seed=1)}
    assert not again & {r["prompt"] for r in OTHERS["test"]}


def test_there_are_twelve_families_in_both_languages():
    seen = {(r["task"], r["lang"]) for r in TRAIN}
    families = set(FAMILIES) - set(HELD_OUT_FAMILIES)
    assert len(families) >= 12
    assert seen == {(f, lang) for f in families for lang in ("en", "zh")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checker_takes_the_answer_and_refuses_another_row_s(family):
    split = "heldout_families" if family in HELD_OUT_FAMILIES else "train"
    rows = instruction_rows(split, 40, families=[family])
    assert all(check(r, r["completion"]) for r in rows)
    assert not any(check(r, "") or check(r, "I am not sure.") for r in rows)
    assert not any(check(r, f"{r['completion']} {r['completion']}") for r in rows)
    right = [{normalize(a) for a in r["accept"]} for r in rows]
    different = [
        (a, b)
        for a, x in zip(rows, right, strict=True)
        for b, y in zip(rows, right, strict=True)
        if not x & y
    ]
    assert different and not any(check(a, b["completion"]) for a, b in different)


def test_answers_agree_with_the_town_and_with_arithmetic():
    for row in TRAIN:
        if row["task"] == "arithmetic":
            a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", row["prompt"]).groups()
            value = int(a) + int(b) if sign == "+" else int(a) - int(b)
            assert check(row, str(value)) and not check(row, str(value + 1))
        if row["task"] == "fact":
            fact = world().facts[row["subject"], row["attribute"]]
            assert row["completion"].lower().strip(".。") == fact.value[row["lang"]].lower()
            assert check(row, fact.statements(row["lang"])[0])


def test_lists_need_three_different_members():
    (row,) = instruction_rows("train", 1, families=["listing"], languages=["en"])
    a, b, c, d = row["accept"][:4]
    assert check(row, f"{a}, {b}, {c}.") and check(row, f"{a}, {b} and {c}")
    for wrong in (f"{a}, {b}", f"{a}, {a}, {b}", f"{a}, {b}, {c}, {d}", f"{a}, {b}, river"):
        assert not check(row, wrong)


def test_sentiment_cannot_be_told_by_counting_words():
    """Naive Bayes over words, given plenty of rows, stays well below what the task allows."""
    rows = instruction_rows("train", 2500, families=["sentiment"], languages=["en"])
    label = [r["accept"][0].startswith("Pos") for r in rows]
    words = [set(re.findall(r"\w+", r["prompt"].lower())) for r in rows]
    cut, counts, total = (
        len(rows) // 2,
        {True: Counter(), False: Counter()},
        Counter(label[: len(rows) // 2]),
    )
    for y, w in zip(label[:cut], words[:cut], strict=True):
        counts[y].update(w)
    vote = lambda w, y: sum(math.log((counts[y][x] + 1) / (total[y] + 2)) for x in w)  # noqa: E731
    right = sum(
        (vote(w, True) > vote(w, False)) == y for w, y in zip(words[cut:], label[cut:], strict=True)
    )
    assert right / (len(rows) - cut) < 0.85


def test_a_seed_gives_the_same_rows_whatever_was_drawn_before():
    random.seed(5)
    instruction_rows("test", 50, seed=9)
    assert instruction_rows("train", 100, seed=3) == instruction_rows("train", 100, seed=3)
    assert instruction_rows("train", 100, seed=3) != instruction_rows("train", 100, seed=4)


def test_wrong_arguments_name_what_would_be_right():
    with pytest.raises(ValueError, match="split: expected one of train"):
        instruction_rows("training")
    with pytest.raises(ValueError, match="poem"):
        instruction_rows(families=["poem"])
