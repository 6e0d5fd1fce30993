"""What the notebooks on fine-tuning share: a training that is the run's, and scores of models."""

import json

import pytest

from labkit import data, lab, record, show

ROWS = [{"prompt": f"river {i}", "completion": "mill"} for i in range(8)]


@pytest.fixture
def run(tmp_path):
    opened = record.start("lab", {}, root=tmp_path)
    yield opened
    opened.finish()


def test_a_main_training_is_logged_and_scores_are_metrics(run, tiny_model, tiny_tokenizer):
    model, rows = tiny_model(), data.encode(ROWS, tiny_tokenizer)
    scores = lab.Scores(run, tiny_tokenizer, {"accuracy": ROWS, "again": ROWS[:4]}, rows, "auto")
    scores.add("before", model)
    settings = dict(learning_rate=3e-2, epochs=12.0, batch_size=4)
    result = lab.tune(run, model, rows, main=True, **settings)
    scores.add("LoRA r = 8, after", model)
    before, after = scores.of.values()
    assert after["loss"] < before["loss"] and after["accuracy"] == after["again"] == 1.0
    assert scores.answers["LoRA r = 8, after"] == ["✓ mill"] * 8  # to the first set
    names = ["before", "LoRA r = 8, after"]
    assert [row["model"] for row in scores.table().rows] == names
    assert scores.table().rows[1]["accuracy"] == "100.0%"
    found = json.loads((run.folder / "record.json").read_text("utf-8"))
    assert found["metrics"]["accuracy_lora_r8_after"] == 1.0 and len(found["metrics"]) == 6
    assert len(found["history"]) == result.steps
    assert set(found["timings"]) == {"training", "evaluation"}
    shown = scores.samples("nobody", "before", "LoRA r = 8, after")
    assert shown.columns[-2:] == names and shown.rows[0]["LoRA r = 8, after"] == "✓ mill"
    question, _, answers = scores.ask({"LoRA": model}).children
    assert question.value == "river 0" and len(question.options) == 8
    assert "mill" in str(answers.outputs)
    lab.tune(run, model, rows, **settings)
    assert len(run.record["history"]) == result.steps  # only the main training's


def test_a_prediction_is_kept_or_broken():
    verdicts = {True: "kept", False: "broken", "holds": "kept", "undecided": "undecided"}
    table = show.outcomes([("it rises", "+1", verdict) for verdict in verdicts])
    assert [row[2] for row in table.cells()] == list(verdicts.values())
