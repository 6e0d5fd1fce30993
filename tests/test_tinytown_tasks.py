"""Instruction rows: disjoint splits, exact checkers, and no answer by counting words."""

import math
import re
from collections import Counter
from itertools import permutations

import pytest

from labkit import tinytown
from labkit.tinytown import FAMILIES, HELD_OUT_FAMILIES, check, instruction_rows, world

TRAIN = instruction_rows("train", 6000)
OTHERS = {split: instruction_rows(split, 500) for split in tinytown.SPLITS[1:]}
SEEN_FAMILIES = set(FAMILIES) - set(HELD_OUT_FAMILIES)


def test_people_phrasings_and_families_are_held_out():
    held = {p.en for p in world().heldout_people}
    text = "\n".join(r["prompt"] + "\n" + r["completion"] for r in TRAIN)
    for person in world().heldout_people:
        assert not re.search(rf"\b{person.en}\b", text)
        assert person.zh not in text or person.zh == "朱诺"
    assert {r["subject"] for r in OTHERS["heldout_people"]} <= held
    assert {r["phrasing"][:4] for r in OTHERS["heldout_phrasings"]} == {"held"}
    assert {r["phrasing"][:3] for r in TRAIN} == {"ask"}
    assert {r["task"] for r in OTHERS["heldout_families"]} == set(HELD_OUT_FAMILIES)
    seen = {(r["task"], r["lang"]) for r in TRAIN}
    assert seen == {(family, lang) for family in SEEN_FAMILIES for lang in ("en", "zh")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checker_takes_the_answer_and_refuses_that_of_another_row(family):
    split = "train" if family in SEEN_FAMILIES else "heldout_families"
    rows = instruction_rows(split, 40, families=[family])
    assert all(check(r, r["completion"]) for r in rows)
    for wrong in ("", "I am not sure.", "{0} {0}"):
        assert not any(check(r, wrong.format(r["completion"])) for r in rows)
    right = [{tinytown.normalize(a) for a in r["accept"]} for r in rows]
    pairs = permutations(zip(rows, right, strict=True), 2)
    different = [(a, b["completion"]) for (a, x), (b, y) in pairs if not x & y]
    assert different and not any(check(row, response) for row, response in different)


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
    data = [(set(re.findall(r"\w+", r["prompt"].lower())), r["completion"]) for r in rows]
    train, test = data[:1250], data[1250:]
    total = Counter(label for _, label in train)
    counts = Counter((word, label) for words, label in train for word in words)

    def predicted(words):
        vote = {y: sum(math.log((counts[w, y] + 1) / (total[y] + 2)) for w in words) for y in total}
        return max(vote, key=vote.get)

    assert sum(predicted(words) == label for words, label in test) / len(test) < 0.85


@pytest.mark.parametrize("wrong", [{"split": "training"}, {"families": ["poem"]}])
def test_unknown_splits_and_families_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        instruction_rows(**wrong)
