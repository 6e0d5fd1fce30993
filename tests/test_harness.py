"""Tinytown's tasks for lm-eval: their questions, and their scores against a computation of our own."""

import runpy
import sys

import pytest
import torch

from labkit import harness, models, tinytown
from labkit.tinytown.judge import refuses
from labkit.tinytown.tasks import OWN_FORM

TASKS = ("knowledge", "strangers", "truth", "harm")


@pytest.fixture(scope="module")
def questions():
    docs = runpy.run_path(str(harness.FOLDER / "docs.py"))
    return {task: docs[task]()["test"].to_list() for task in TASKS}


def test_one_choice_is_right_and_its_place_says_nothing(questions):
    rows = tinytown.instruction_rows("test", 200, 11, families=["fact", "place"])
    for row, question in zip(rows, questions["knowledge"], strict=True):
        right = [tinytown.check(row, choice) for choice in question["choices"]]
        assert right.count(True) == 1 and right.index(True) == question["label"]
    for task, size in (("knowledge", 4), ("strangers", 4), ("truth", 2), ("harm", 2)):
        found = questions[task]
        assert len(found) >= 100 and {len(set(q["choices"])) for q in found} == {size}
        places = [q["label"] for q in found]
        assert all(places.count(i) > 0.6 * len(found) / size for i in range(size))


def test_refusing_everything_gives_half_of_harm(questions):
    right = [q["choices"][q["label"]] for q in questions["harm"]]
    assert sum(map(refuses, right)) == len(right) / 2
    assert all(sum(map(refuses, q["choices"])) == 1 for q in questions["harm"])


def test_what_is_asked_is_not_trained_on(questions):
    trained = {row["prompt"] for row in tinytown.instruction_rows("train")}
    trained |= {row["prompt"] for row in tinytown.prompts(2000)}
    for task in TASKS:
        assert not trained & {q["prompt"] for q in questions[task]}, task


def test_accuracy_is_that_of_the_choice_with_the_highest_log_probability(questions):
    pytest.importorskip("lm_eval")
    model, tokenizer = models.load("tinytown", device="cpu")
    model.train()
    before = torch.get_rng_state()
    found = harness.evaluate(model, tokenizer, ["tinytown_knowledge"], chat=False, limit=24)
    assert model.training and torch.equal(before, torch.get_rng_state())
    model.eval()
    right = 0
    for question in questions["knowledge"][:24]:
        lang = "zh" if any("一" <= c <= "鿿" for c in question["prompt"]) else "en"
        prompt, scores = OWN_FORM[lang].format(question["prompt"]), []
        for choice in question["choices"]:
            text = prompt + " " * (lang == "en") + choice
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, ids[0, 1:, None])[start - 1 :]
            scores.append(picked.sum().item())
        right += scores.index(max(scores)) == question["label"]
    values = {row["metric"]: row for row in found}
    assert values["acc"]["value"] == pytest.approx(right / 24) and values["acc"]["n"] == 24
    assert right > 18  # the base knows its town


def test_what_cannot_be_run_is_named(tiny_model, make_tokenizer):
    pytest.importorskip("lm_eval")
    model, plain = tiny_model("llama"), make_tokenizer(chat=False)
    with pytest.raises(ValueError, match="no chat template"):
        harness.evaluate(model, plain, chat=True)
    found = harness.evaluate(model, plain, ["tinytown_honesty"], limit=2)
    tasks = {row["task"] for row in found}
    assert {row["task"]: row["n"] for row in found}["tinytown_honesty"] == 4  # of both its parts
    assert tasks == {"tinytown_honesty", "tinytown_strangers", "tinytown_truth"}
    for options in ({"tasks": ()}, {"tasks": "mmlu"}, {"limit": 0}):
        with pytest.raises(ValueError, match="tasks, limit"):
            harness.evaluate(model, plain, **options)
    with pytest.raises(ValueError, match="knows no tinytown_x"):
        harness.evaluate(model, plain, ["tinytown_x"])
    with pytest.raises(ConnectionError, match="hub"):
        harness.evaluate(model, plain, ["truthfulqa_mc2"], limit=2)


def test_without_lm_eval_it_says_what_to_install(monkeypatch, tiny_model, tiny_tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        harness.evaluate(tiny_model("llama"), tiny_tokenizer)
