"""Evaluation: scores against models and numbers whose truth is known beforehand."""

import math
import statistics
from functools import partial

import numpy as np
import pytest
import torch

from labkit import data, evaluation
from labkit.evaluation import Evaluation

TEXTS = [
    "Mila lives in the old mill by the river.",
    "小城里有一条河。",
    "What is three plus four? " * 9,
]
ROWS = [
    {"prompt": "2 + 2", "completion": "4", "kind": "sum"},
    {"prompt": "3 + 3", "completion": "6", "kind": "sum"},
    {"prompt": "hot", "completion": "Cold.", "kind": "antonym"},
]


@pytest.fixture
def uniform_model(tiny_model):
    """Predicts every token of its vocabulary of 448 with the same probability."""
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("max_length, batch_size", [(256, 16), (8, 2), (2, 1)])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(
    uniform_model, tiny_tokenizer, max_length, batch_size
):
    options = dict(max_length=max_length, batch_size=batch_size)
    got = evaluation.perplexity_by(uniform_model, tiny_tokenizer, {"en": TEXTS}, **options)
    assert got == {"en": pytest.approx(448, rel=1e-5)}
    for texts in ([], "Mila", ["M"]):
        with pytest.raises(ValueError, match="texts"):
            evaluation.perplexity(uniform_model, tiny_tokenizer, texts)


def test_perplexity_equals_the_models_own_loss(tiny_model, tiny_tokenizer, arch):
    """However texts are batched: padding cannot matter."""
    model, total, count = tiny_model(arch), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        n = ids.shape[1] - 1
        total, count = total + model(input_ids=ids, labels=ids).loss.item() * n, count + n
    for size in (1, 3):
        got = evaluation.perplexity(model, tiny_tokenizer, TEXTS, batch_size=size)
        assert got == pytest.approx(math.exp(total / count), rel=1e-5)


def test_windows_predict_every_token_once(tiny_model, tiny_tokenizer):
    """Windows of two tokens see one token of context: a bigram table gives the same mean."""
    model = tiny_model("llama")
    ids = tiny_tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        table = model(input_ids=torch.tensor(ids)[:, None]).logits[:, 0].log_softmax(-1)
    steps = [-table[i, after].item() for i, after in enumerate(ids[1:])]
    got = evaluation.perplexity(model, tiny_tokenizer, TEXTS[:1], max_length=2)
    assert got == pytest.approx(math.exp(statistics.fmean(steps)), rel=1e-5)


def test_held_out_loss_counts_response_tokens_only(tiny_model, tiny_tokenizer):
    model = tiny_model("llama").train()
    examples = data.encode(ROWS, tiny_tokenizer)
    total = count = 0.0
    for example in examples:
        ids, mask = (torch.tensor(column[None]) for column in example)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
        total, count = total + loss.item() * mask.sum().item(), count + mask.sum().item()
    got = evaluation.held_out_loss(model, examples, batch_size=2)
    assert got == pytest.approx(total / count, rel=1e-5)
    assert model.training


def test_an_answer_gets_as_many_tokens_as_the_longest_right_one(tiny_tokenizer, monkeypatch):
    from labkit import generate

    given = []
    monkeypatch.setattr(generate, "generate", lambda *args, **o: given.append(o) or ["", ""])
    rows = [ROWS[0], {**ROWS[1], "completion": "6 " * 60, "kind": "long"}]
    evaluation.exact(None, tiny_tokenizer, rows)
    assert given[0]["max_new_tokens"] > len(tiny_tokenizer("6 " * 60)["input_ids"]) > 32


def test_score_ignores_case_spacing_and_final_stop():
    got = evaluation.score(ROWS, [" 4 ", "７", "cold"])
    assert got.correct == [True, False, True]
    assert evaluation.normalize("Ａ  b。") == evaluation.normalize("a B.")
    assert evaluation.normalize("-4") != evaluation.normalize("4")


def test_evaluation_by_column():
    got = Evaluation(ROWS, ["4", "5", "cold"], [True, False, True])
    assert got.n == 3 and got.accuracy == pytest.approx(2 / 3)
    assert got.marked == ["✓ 4", "✗ 5", "✓ cold"]
    assert got.by("kind") == {"antonym": (1.0, 1), "sum": (0.5, 2)}
    assert got.interval[0] < 2 / 3 < got.interval[1] and "66.7% of 3" in repr(got)
    with pytest.raises(KeyError, match="colour"):
        got.by("colour")


def test_exact_answers_with_the_model(tiny_model, tiny_tokenizer):
    """The check sees each row with its own answer, in the order of the rows."""
    seen = []

    def check(row, answer):
        seen.append((row["prompt"], answer))
        return row["kind"] == "sum"

    rows = [*ROWS, {**ROWS[0], "prompt": "a much longer question " * 4}]
    ask = partial(evaluation.exact, tiny_model("llama"), tiny_tokenizer, max_new_tokens=3)
    got = ask(rows, batch_size=2, check=check)
    assert seen == [(r["prompt"], a) for r, a in zip(rows, got.responses, strict=True)]
    assert got.accuracy == 0.75
    # Whatever a model says is right once it is what the rows expect.
    told = [{**r, "completion": a} for r, a in zip(rows, got.responses, strict=True)]
    assert ask(told).accuracy == 1.0
    with pytest.raises(ValueError, match="rows"):
        ask([])


def test_mean_std_by_hand():
    """Of 2, 4, 6 the mean is 4 and the sample variance (4 + 0 + 4) / 2 = 4."""
    assert evaluation.mean_std([2, 4, 6]) == (4.0, 2.0)
    assert evaluation.mean_std([0.5]) == (0.5, 0.0)
    with pytest.raises(ValueError):
        evaluation.mean_std([])


def test_wilson_solves_its_defining_equation():
    """Its ends are the shares p whose own standard error just reaches the observed share."""
    for k, n in [(0, 10), (1, 10), (50, 100), (100, 100)]:
        for p in evaluation.wilson(k, n):
            if p not in (0.0, 1.0):
                assert abs(k / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))
    assert evaluation.wilson(0, 10)[0] == 0.0 and evaluation.wilson(100, 100)[1] == 1.0
    for k, n in [(1, 0), (-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match="k, n"):
            evaluation.wilson(k, n)


def test_tinytown_rows_are_marked_by_tinytown():
    """Its own completions are right by its own checker, and nonsense is wrong."""
    rows = data.load("tinytown", limit=300)
    got = evaluation.score(rows, [row["completion"] for row in rows])
    assert got.n == 300 and got.accuracy == 1.0
    assert evaluation.score(rows, ["no such answer"] * 300).accuracy == 0.0
    assert len(got.by("task")) >= 6 and sum(n for _, n in got.by("lang").values()) == 300


def test_a_difference_by_hand():
    """Two seeds: 2 of 3 rows against 1 of 3, and 1 of 2 against 0 of 2; each question counts."""
    found = evaluation.difference(["11 0", "1 0"], ["10 0", "0 0"])
    assert found.value == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.low <= found.value <= found.high
    assert evaluation.ratio(["11 0", "1 0"], ["10 0", "0 1"]).value == pytest.approx(7 / 5)
    assert f"{evaluation.Interval(0.5, 0.25, 1):+.0%}" == "+50% (+25% to +100%)"
    for other in (["11 0"], ["110", "1 0"], ["11 0 1", "1 0"]):
        with pytest.raises(ValueError, match="ours, theirs"):
            evaluation.difference(["11 0", "1 0"], other)
    assert evaluation.difference([], []) is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Questions of a seed of its own, and questions that all seeds share."""
    rng, trials = np.random.default_rng(1), 40
    inside = {False: 0, True: 0}
    for _ in range(trials):
        for shared in inside:
            hard = rng.normal(size=(1 if shared else 5, 60))  # what a question does to both
            apart = 0.3 + hard + rng.normal(size=(5, 60))
            zero = np.zeros((5, 60))
            found = evaluation.difference(apart, zero, shared)
            inside[shared] += found.low <= 0.3 <= found.high
    assert all(0.8 * trials <= count for count in inside.values())
    assert inside[False] < trials or inside[True] < trials  # and are not endless


def test_a_t_interval_by_hand():
    """Of 1, 2, 3 the standard error is 1 / √3, and Student's quantile 4.303."""
    found = evaluation.t_interval([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high - 2 == pytest.approx(4.303 / math.sqrt(3))
    assert evaluation.t_interval([1.0]) is None and evaluation.t_interval([]) is None


@pytest.mark.parametrize(
    "low, high, at_most, verdict",
    [
        (0.1, 0.3, False, "holds"),
        (-0.3, -0.1, False, "does not hold here"),
        (-0.1, 0.1, False, "undecided"),
        (0.0, 0.1, False, "undecided"),
        (-0.3, -0.1, True, "holds"),
        (0.1, 0.3, True, "does not hold here"),
        (math.nan, math.nan, False, "undecided"),
    ],
)
def test_what_an_interval_decides(low, high, at_most, verdict):
    found = evaluation.Interval((low + high) / 2, low, high)
    assert evaluation.decide(found, 0.0, at_most) == verdict
    assert evaluation.decide(None, 0.0, at_most) == "not measured here"


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((-2, 2), "holds"),
        ((1, 2), "holds"),
        ((-4, 2), "undecided"),
        ((-4, 4), "undecided"),
        ((-9, -4), "does not hold here"),
        ((4, 9), "does not hold here"),
    ],
)
def test_within_a_limit_is_decided_by_both_ends(ends, verdict):
    assert evaluation.within(evaluation.Interval(0.0, *ends), 3) == verdict


def test_the_worst_of_several_verdicts_stands_and_about_is_half_to_twice():
    together, about, fails = evaluation.together, evaluation.about, "does not hold here"
    assert together("holds", "holds") == "holds"
    assert together("holds", "undecided") == "undecided" and together(fails, "undecided") == fails
    assert together("holds", "not measured here") == together() == "not measured here"
    assert about([0.05, 0.2], 0.1) == "holds" and about([0.05, 0.21], 0.1) == "holds in part"
    assert about([0.04, 0.21], 0.1) == fails


CRITERIA = {  # of the claims in the notebooks: (statistic, threshold, whether at most)
    "1, 2: better inside the chapter's range": (evaluation.difference, 0.0, False),
    "10: 95 % of full fine-tuning": (evaluation.ratio, 0.95, False),
    "15: slightly below LoRA": (evaluation.ratio, 1.0, True),
    "21, 23: above the threshold": (evaluation.difference, -0.05, False),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_no_criterion_is_met_by_noise(name):
    """Outcomes shuffled between two conditions that differ by just the threshold, or constant."""
    statistic, threshold, at_most = CRITERIA[name]
    rng, verdicts = np.random.default_rng(2), []
    chance = 0.5 * threshold if statistic is evaluation.ratio else 0.5 + threshold

    def marks(sizes, chance):  # for each seed a word per question, of one to three rows
        words = [["".join(map(str, (rng.random(n) < chance) * 1)) for n in sizes] for _ in "abc"]
        return [" ".join(seed) for seed in words]

    for sizes in rng.integers(1, 4, size=(40, 100)):
        theirs, ours = marks(sizes, 0.5), marks(sizes, chance)
        verdicts.append(evaluation.decide(statistic(ours, theirs), threshold, at_most))
    assert verdicts.count("undecided") >= 30, verdicts
    nothing = ["0 0 0"] * 3
    if statistic is evaluation.ratio or threshold == 0:
        assert evaluation.decide(statistic(nothing, nothing), threshold, at_most) == "undecided"


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 0.9, 1.05])
def test_no_mean_over_seeds_decides_on_noise(threshold):
    """Claims 3, 4, 9, 13, 14, 21: a value per seed that scatters around the threshold."""
    rng = np.random.default_rng(3)
    found = [evaluation.t_interval(threshold + rng.normal(size=3)) for _ in range(100)]
    assert [evaluation.decide(each, threshold) for each in found].count("undecided") >= 88


def test_runs_of_a_sweep_are_chosen_by_condition_and_ordered_by_seed():
    rows = [{"arm": a, "seed": s, "score": a + s, "right": [0, s]} for s in (2, 0) for a in (1, 5)]
    runs = evaluation.Runs([*rows, {"arm": 1, "seed": 1}])
    assert runs.where(arm=5).of("score") == [5, 7]
    assert runs.where(arm=1).of("score") == [1, 3]  # one has no score
    assert runs.where(arm=5).spread("right") == evaluation.mean_std([0.0, 1.0])
    assert f"{runs.where(arm=5).spread('score'):+.1f}" == "+6.0\u00a0±\u00a01.4"
    with pytest.raises(statistics.StatisticsError):
        runs.where(arm=7).mean("score")
