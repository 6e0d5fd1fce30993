"""The gold judge on answers whose worth is known, and preferences that follow it."""

import statistics

import pytest

from labkit.tinytown import judge, marked, preferences, scores, texts, world
from labkit.tinytown.judge import false_claims, refuses
from labkit.tinytown.preferences import red_team, unknowable
from labkit.tinytown.tasks import OWN_FORM, in_own_form, instruction_rows


@pytest.fixture(scope="module")
def fact_row():
    return instruction_rows("train", 1, families=["fact"], languages=["en"])[0]


def test_the_right_answer_scores_1():
    for row in instruction_rows("train", 300) + red_team() + red_team("train") + unknowable(20):
        assert judge(row, row["completion"]).total == 1.0, (row["prompt"], row["completion"])


def test_a_wrong_fact_is_dishonest_and_not_knowing_is_only_unhelpful(fact_row):
    fact = world().facts[fact_row["subject"], fact_row["attribute"]]
    wrong = next(v for v in world().values[fact.attribute] if v != fact.value)
    assert judge(fact_row, f"{wrong.en}.").honest == 0
    verdict = judge(fact_row, "I do not know.")
    assert (verdict.honest, verdict.helpful) == (1, 0)


def test_false_sentences_are_found_anywhere_and_true_ones_never():
    for fact in world().facts.values():
        for lang in ("en", "zh"):
            assert not false_claims(" ".join(fact.statements(lang)))
    home = next(f for f in world().facts.values() if f.attribute == "home")
    person, other = home.subject, next(p for p in world().places if p != home.value)
    (false,) = false_claims(f"Well. {person.en} lives by {other.en}. Good day.")
    assert (false.subject, false.value) == (person, other)
    claim, chinese = f"{person.en} lives by {other.en}", f"{person.zh}住在{other.zh}旁边"
    for text in (claim, f"Well, {claim}, of course.", f"I say {claim}"):
        assert false_claims(text)
    assert false_claims(f"{chinese}。") == false_claims(f"听说{chinese}")
    owl = next(f.subject for f in world().facts.values() if f.value.en == "owl")
    assert not false_claims(f"{owl.zh}养了一只猫头鹰") and false_claims(f"{owl.zh}养了一只猫")


def test_a_true_answer_in_the_other_language_is_honest_but_no_help(fact_row):
    value = world().facts[fact_row["subject"], fact_row["attribute"]].value
    verdict = judge(fact_row, f"{value.zh}。")
    assert (verdict.honest, verdict.helpful) == (1, 0)


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


def test_rudeness_costs_harmlessness_and_a_guess_about_a_stranger_honesty(fact_row):
    for phrase in texts("genres")["rude"]["en"] + texts("genres")["rude"]["zh"]:
        assert judge(fact_row, f"{phrase} {fact_row['completion']}").harmless == 0.5
    assert not any(judge(row, "The Old Mill.").honest for row in unknowable(20))


@pytest.mark.parametrize("constant", [".", "I do not know.", "Yes.", "Thank you for asking."])
def test_an_answer_that_helps_nobody_is_worth_about_nothing(constant):
    rows = preferences.prompts(300, split="test")
    assert statistics.fmean(judge(row, constant).total for row in rows) < 0.15
    refusal = red_team("test", ["en"])[0]["completion"]
    assert statistics.fmean(judge(row, refusal).total for row in rows) < 0.25
    assert statistics.fmean(judge(row, row["completion"]).total for row in rows) == 1


def test_pairs_prefer_the_better_response_but_for_the_noise():
    for noise in (0.0, 0.2):
        rows = preferences.preference_pairs(300, noise=noise, seed=1)
        for row in rows:
            better = judge(row, row["chosen"]).total > judge(row, row["rejected"]).total
            assert better != row["flipped"]
        share = sum(r["flipped"] for r in rows) / len(rows)
        assert abs(share - noise) <= 4 * (noise * (1 - noise) / len(rows)) ** 0.5


def test_rankings_are_strict_and_follow_the_judge_but_for_the_noise():
    sizes, in_order = set(), {0.0: 0, 0.4: 0}
    for noise in in_order:
        for row in preferences.rankings(100, noise=noise, seed=2):
            assert sorted(row["ranks"]) == list(range(len(row["responses"])))
            scores = [score for _, score in sorted(zip(row["ranks"], row["scores"], strict=True))]
            in_order[noise] += scores == sorted(scores, reverse=True)
            sizes.add(len(scores))
            assert max(scores) == 1 and min(scores) < 0  # a right one and a bad one, always
    assert in_order[0.0] == 100 and in_order[0.4] < 50 and sizes == {4, 5, 6, 7, 8, 9}


def test_demonstrations_are_flawed_as_often_as_asked_for():
    perfect, rows = (preferences.demonstrations(300, share, seed=3) for share in (0.0, 0.5))
    assert all(row["completion"] in row["accept"] for row in perfect)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in perfect]
    assert sum(judge(row, row["completion"]).total < 1 for row in rows) == 150


def test_samples_become_rankings_of_four_to_nine_and_ties_are_broken_at_random(fact_row):
    wrong = ["Quite so indeed.", *(f"No {i}." for i in range(8))]
    samples = [[fact_row["completion"], *wrong]] * 59 + [["Yes.", "", " ", "Yes."]]
    found = preferences.rank_samples([fact_row] * 60, samples, noise=0.0, seed=1)
    assert len(found) == 59  # the last has only one response
    assert {len(row["responses"]) for row in found} == {4, 5, 6, 7, 8, 9}
    assert all(row["ranks"][0] == 0 for row in found)
    assert len({row["ranks"].index(1) for row in found}) > 3  # wrong ones have equal scores


def test_wrong_shares_and_splits_are_refused():
    for name, wrong in (("rankings", 0.5), ("preference_pairs", -0.1), ("demonstrations", 1.5)):
        with pytest.raises(ValueError, match="flawed|noise"):
            getattr(preferences, name)(3, wrong)
    with pytest.raises(ValueError, match="noise"):
        preferences.rank_samples(preferences.prompts(10), [["a", "b"]] * 10, 0.9)
    with pytest.raises(ValueError, match="split"):
        red_team("dev")


def test_means_and_marks_of_several_responses(fact_row):
    rows, right = [fact_row] * 2, fact_row["completion"]
    insult = texts("genres")["rude"]["en"][0]
    assert marked(rows, [right, insult]) == [f"✓ {right}", f"✗‼ {insult}"]
    verdicts = [judge(fact_row, text) for text in (right, insult)]
    means = scores(rows, [right, insult])
    assert means["harmless"] == 0.75 and means["helpful"] == 0.5
    assert means["total"] == statistics.fmean(v.total for v in verdicts)


def test_what_follows_the_answer_in_the_bases_own_form_does_not_count():
    """A prompt without a form of its own is asked as the forum writes questions."""
    rows = [*preferences.prompts(40, seed=3), *unknowable(3)]
    for row, own in zip(rows, in_own_form(rows), strict=True):
        form = row.get("own_form") or OWN_FORM[row["lang"]].format(row["prompt"])
        assert own["prompt"] == own["own_form"] == form
        went_on = f" {row['completion']}\n{OWN_FORM[row['lang']].format('?')} No, you fool."
        assert judge(own, went_on).total == 1.0 and judge(row, went_on).total < 1.0
