"""The gold judge on answers whose worth is known, and preferences that follow it."""

import random

import pytest

from labkit.tinytown import (
    demonstrations,
    instruction_rows,
    judge,
    preference_pairs,
    rank_samples,
    ranked,
    rankings,
    red_team,
    texts,
    world,
)
from labkit.tinytown.judge import false_claims, refuses
from labkit.tinytown.preferences import unknowable


@pytest.fixture(scope="module")
def fact_row():
    return instruction_rows("train", 1, families=["fact"], languages=["en"])[0]


def test_the_right_answer_scores_full_marks():
    for row in instruction_rows("train", 300) + red_team() + red_team("train") + unknowable(20):
        verdict = judge(row, row["completion"])
        assert verdict.total == 1.0, (row["prompt"], row["completion"], verdict)


def test_a_wrong_fact_is_dishonest_and_not_knowing_is_only_unhelpful(fact_row):
    fact = world().facts[fact_row["subject"], fact_row["attribute"]]
    pool = world().residents if fact.attribute == "friend" else world().values[fact.attribute]
    wrong = next(v for v in pool if v != fact.value)
    assert judge(fact_row, f"{wrong.en}.").honest == 0
    assert judge(fact_row, "I do not know.").honest == 1
    assert judge(fact_row, "I do not know.").helpful == 0


def test_false_sentences_are_found_anywhere_and_true_ones_never():
    for fact in world().facts.values():
        for lang in ("en", "zh"):
            assert not false_claims(" ".join(fact.statements(lang)))
    mira = next(r for r in world().residents if r.en == "Mira")
    home = world().fact(mira, "home").value
    other = next(p for p in world().places if p != home)
    found = false_claims(f"Well. Mira lives by {other.en}. Good day.")
    assert [(f.subject.en, f.value.en) for f in found] == [("Mira", other.en)]
    assert false_claims(f"米拉住在{other.zh}旁边。")


def test_mischief_wants_a_refusal_and_look_alikes_want_help():
    for row in red_team("test"):
        steps = "\n".join(f"{i}. {s}" for i, s in enumerate(row["steps"], 1))
        plain = texts("genres")["refusal"][row["lang"]]["plain"]
        helped, declined = judge(row, steps), judge(row, plain)
        if row["task"] == "mischief":
            assert (helped.helpful, helped.harmless) == (0, 0)
            assert (declined.helpful, declined.harmless) == (0.5, 1)
        else:
            assert helped.total == 1 and declined.helpful == 0
        assert refuses(plain) and not refuses(steps)


def test_rudeness_costs_harmlessness(fact_row):
    for lang in ("en", "zh"):
        for phrase in texts("genres")["rude"][lang]:
            assert judge(fact_row, f"{phrase} {fact_row['completion']}").harmless == 0.5


def test_nobody_can_know_a_stranger():
    for row in unknowable(20):
        assert judge(row, "The Old Mill.").honest == 0
        assert judge(row, row["completion"]).total == 1


def test_red_team_titles_are_not_shared_between_train_and_test():
    train, test = ({tuple(r["steps"]) for r in red_team(s)} for s in ("train", "test"))
    assert train and test and not train & test
    with pytest.raises(ValueError, match="train or test"):
        red_team("dev")


def test_pairs_prefer_the_better_response_but_for_the_noise():
    clean = preference_pairs(100, noise=0.0, seed=1)
    assert all(judge(r, r["chosen"]).total > judge(r, r["rejected"]).total for r in clean)
    noisy = preference_pairs(300, noise=0.2, seed=1)
    share = sum(r["flipped"] for r in noisy) / len(noisy)
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 300) ** 0.5
    for row in noisy:
        better = judge(row, row["chosen"]).total > judge(row, row["rejected"]).total
        assert better != row["flipped"]


def test_rankings_are_strict_and_follow_the_judge_without_noise():
    rows = rankings(100, noise=0.0, seed=2)
    assert {len(r["responses"]) for r in rows} == {4, 5, 6, 7, 8, 9}
    for row in rows:
        assert sorted(row["ranks"]) == list(range(len(row["responses"])))
        best_first = sorted(zip(row["ranks"], row["scores"], strict=True))
        scores = [s for _, s in best_first]
        assert scores == sorted(scores, reverse=True)
    disorder = sum(
        a < b
        for row in rankings(100, noise=0.4, seed=2)
        for (_, a), (_, b) in zip(
            sorted(zip(row["ranks"], row["scores"], strict=True)),
            sorted(zip(row["ranks"], row["scores"], strict=True))[1:],
            strict=False,
        )
    )
    assert disorder > 50


def test_demonstrations_are_flawed_as_often_as_said():
    perfect = demonstrations(300, flawed=0.0, seed=3)
    assert all(row["completion"] in row["accept"] for row in perfect)
    rows = demonstrations(300, flawed=0.5, seed=3)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in perfect]
    bad = sum(judge(row, row["completion"]).total < 1 for row in rows) / 300
    assert 0.25 < bad < 0.5  # a candidate may be a good one
    with pytest.raises(ValueError, match="flawed"):
        demonstrations(3, flawed=1.5)


def test_samples_are_ranked_by_the_judge_and_ties_by_the_dice(fact_row):
    """The right answer comes first; two wrong ones of equal score come in either order."""
    best, wrong = fact_row["completion"], ["Quite so indeed.", "Hm."]
    orders = set()
    for seed in range(20):
        row = ranked(fact_row, [*wrong, best], random.Random(seed))
        assert row["ranks"][2] == 0 and row["scores"][0] == row["scores"][1] < row["scores"][2]
        orders.add(tuple(row["ranks"]))
        short = ranked(fact_row, [*wrong, best], random.Random(seed), brief=True)
        assert short["ranks"] == [2, 1, 0]
    assert orders == {(1, 2, 0), (2, 1, 0)}
    for responses in ([best], [best, best]):
        with pytest.raises(ValueError, match="all different"):
            ranked(fact_row, responses, random.Random(0))


def test_a_models_samples_become_rankings_of_four_to_nine():
    rows = instruction_rows("train", 60)
    samples = [[f"No {i}." for i in range(9)] for _ in rows[:-1]] + [["Yes.", "", " ", "Yes."]]
    found = rank_samples(rows, samples, seed=1)
    assert len(found) == 59  # the last has one response only
    assert {len(row["responses"]) for row in found} == {4, 5, 6, 7, 8, 9}
    assert all(row["responses"][0] == "No 0." for row in found)


def test_wrong_noise_and_sizes_are_refused():
    for call in (lambda: rankings(3, noise=0.5), lambda: preference_pairs(3, noise=-0.1)):
        with pytest.raises(ValueError, match="noise"):
            call()
    with pytest.raises(ValueError, match="greatest"):
        rankings(3, k=(4, 12))
