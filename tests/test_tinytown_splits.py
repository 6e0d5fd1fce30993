"""What is held out is held out: by question, stranger, title, phrasing and text, for every seed."""

import re
from itertools import combinations, islice

import pytest

from labkit import tinytown
from labkit.tinytown import corpus, preferences, texts, world

SEEDS = (0, 1, 2, 3, 4, 100)  # those of the sweeps, of their tuning, and more
KINDS = ("web", "ask", "held")


def rows(split, n=400):
    """Everything that is tuned or measured on in `split`, for every seed."""
    found = [r for seed in SEEDS for r in tinytown.instruction_rows(split, n, seed)]
    if split in ("train", "test"):
        for seed in SEEDS:
            found += preferences.prompts(200, seed, split)
            found += preferences.unknowable(50, seed, split)
        found += preferences.red_team(split)
    return found


@pytest.fixture(scope="module")
def splits():
    return {split: rows(split) for split in tinytown.SPLITS}


def test_no_question_is_in_two_splits(splits):
    for one, other in combinations(splits, 2):
        assert not {r["key"] for r in splits[one]} & {r["key"] for r in splits[other]}
        assert not {r["prompt"] for r in splits[one]} & {r["prompt"] for r in splits[other]}


def test_a_trade_asked_from_either_end_is_one_question(splits):
    """Who is a baker? Mira. What is Mira's trade? Baker. One answers the other."""
    trades = {}
    for split in ("train", "test", "heldout_phrasings"):
        of = [r for r in splits[split] if r["task"] == "who" or r["attribute"] == "job"]
        trades[split] = {r["key"] for r in of if r["task"] != "unknown"}
        assert trades[split] and all(key.startswith("job|") for key in trades[split])
    assert not trades["train"] & (trades["test"] | trades["heldout_phrasings"])


def test_strangers_and_titles_are_held_out_like_people(splits):
    def names(split, tasks):
        return {str(r.get("steps") or r["subject"]) for r in splits[split] if r["task"] in tasks}

    for tasks in (["unknown"], ["mischief", "lookalike"], ["howto"]):
        assert names("test", tasks) and names("train", tasks)
    assert not names("test", ["unknown"]) & names("train", ["unknown"])
    red = ["mischief", "lookalike"]
    assert not names("test", red) & names("train", red)
    seen = "\n".join(text for _, text in islice(corpus.documents(0), 5000))
    for part in ("train", "test"):
        for stranger in world().strangers[part]:
            assert not re.search(rf"\b{stranger.en}\b", seen) and stranger.zh not in seen


def test_phrasings_of_pretraining_tuning_and_of_neither_are_disjoint():
    found = {kind: [] for kind in KINDS}
    for file in ("facts", "tasks"):
        for languages in texts(file).values():
            for lists in languages.values():
                for kind in KINDS:
                    found[kind] += lists[kind]
    for one, other in combinations(KINDS, 2):
        assert not set(found[one]) & set(found[other])
    for phrasings in found.values():
        assert len(phrasings) == len(set(phrasings))


def test_no_question_of_tuning_or_testing_stands_in_pretraining(splits):
    text = "\n".join(text for _, text in islice(corpus.documents(0), 20_000)).lower()
    for found in splits.values():
        asked = [r["prompt"] for r in found if r["task"] in ("fact", "place", "unknown")]
        assert not any(prompt.lower() in text for prompt in asked[:300])


def test_every_family_has_questions_in_every_split_that_trains_or_tests_it(splits):
    families = set(tinytown.FAMILIES) - set(tinytown.HELD_OUT_FAMILIES)
    for split in ("train", "test", "heldout_phrasings"):
        seen = {r["task"] for r in splits[split]}
        assert families <= seen
