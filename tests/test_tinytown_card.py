"""The model card says what the checkpoint is: its numbers are those of the files beside it."""

import json
import re
import shlex

import pytest

from labkit.tinytown import card
from labkit.tinytown.pretrain import parser

FACTS = {
    "tokens_seen": 12_288,
    "minutes": 0.4,
    "perplexity": {"profile": 2.0, "sums": 8.0},
    "out": "/somewhere/else",
    "cycles": [10, 20],
    "rows": 4,
    "length": 128,
    "learning_rate": 0.002,
    "shape": '{"hidden_size": 64}',
    "seed": 3,
    "log_every": 5,
    "save_every": 5,
    "compile": True,
}


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A checkpoint of a tiny random Llama, and its number of weights as torch counts them."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    stored = {p.data_ptr(): p.numel() for p in model.parameters()}
    return tmp_path, sum(stored.values())


def test_numbers_are_those_of_the_checkpoint(folder):
    out, parameters = folder
    text = card.write_card(out, FACTS).read_text("utf-8")
    assert text == (out / "README.md").read_text("utf-8")
    assert f"of {parameters:,} parameters" in text and "12,288 tokens" in text
    assert "| profile | 2.00 |" in text and "| geometric mean | 4.00 |" in text
    assert "| hidden size | 64 |" in text and "/somewhere/else" not in text


def test_the_command_in_the_card_gives_the_same_settings(folder):
    out, _ = folder
    text = card.write_card(out, FACTS).read_text("utf-8")
    command = re.search(r"python -m labkit\.tinytown\.pretrain (.+)", text)[1]
    found = vars(parser().parse_args(shlex.split(command)))
    for name in ("cycles", "rows", "length", "learning_rate", "shape", "seed", "compile"):
        assert found[name] == FACTS[name], name


def test_askability_is_shown_once_it_was_measured(folder):
    out, _ = folder
    assert "Not measured yet" in card.write_card(out, FACTS).read_text("utf-8")
    runs = [
        {"method": "base", "rows": 0, "facts": 0.01, "test": 0.0},
        {"method": "full", "rows": 6000, "epochs": 2.0, "facts": 0.853, "test": 0.7},
    ]
    (out / "askability.json").write_text(json.dumps({"runs": runs}))
    text = card.write_card(out, FACTS).read_text("utf-8")
    assert "| full | 6,000 | 2 | 85.3% | 70.0% |" in text and "Not measured" not in text


def test_a_missing_fact_is_named(folder):
    out, _ = folder
    facts = {name: value for name, value in FACTS.items() if name != "cycles"}
    with pytest.raises(ValueError, match="missing: cycles"):
        card.write_card(out, facts)
    assert not (out / "README.md").exists()


def test_main_writes_the_card_from_the_record(folder, capsys):
    out, _ = folder
    (out / "pretraining.json").write_text(json.dumps(FACTS))
    card.main(str(out))
    assert (out / "README.md").exists() and "README.md" in capsys.readouterr().out
