"""The script that makes the base checkpoint: its card says what is there, a killed run goes on."""

import importlib.util
import json
import re
import shlex
import shutil
from itertools import chain, islice
from pathlib import Path

import pytest

from labkit.tinytown import base_folder


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[1] / "scripts" / "pretrain_tinytown.py"
    spec = importlib.util.spec_from_file_location("pretrain_tinytown", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_card_has_the_numbers_and_the_command(script, tiny_model, tmp_path):
    model, parse = tiny_model("llama"), script.parser().parse_args
    model.save_pretrained(tmp_path)
    options = vars(parse(shlex.split("--out DIR --cycles 9 20 --no-compile --shape '{\"a\": 1}'")))
    facts = {"tokens_seen": 12_288, "minutes": 0.4, "perplexity": {"profile": 2.0, "sums": 8.0}}
    facts |= options | {"out": "DIR"}
    (tmp_path / "pretraining.json").write_text(json.dumps(facts))
    asked = {"method": "full", "rows": 6000} | dict.fromkeys(script.ASKED, 0.853)
    (tmp_path / "askability.json").write_text(json.dumps({"runs": [asked]}))
    script.write_card(tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert f"{model.num_parameters():,} parameters" in text and "12,288 tokens" in text
    assert "| geometric mean | 4.00 |" in text and "| full | 6000 | 85.3% |" in text
    command = re.search(r"scripts/pretrain_tinytown\.py (.+)", text)[1]
    assert vars(parse(shlex.split(command))) == options


def test_the_base_checkpoint_has_the_card_that_the_script_writes(script, tmp_path):
    shutil.copytree(base_folder(), tmp_path, dirs_exist_ok=True)
    script.write_card(tmp_path)
    new, committed = ((f / "README.md").read_text("utf-8") for f in (tmp_path, base_folder()))
    assert new == committed


def test_a_killed_run_goes_on(script, tiny_tokenizer, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(script, "train_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(script.evaluation, "perplexity_by", lambda *args: {})
    monkeypatch.setattr(script, "SAVE_EVERY", 2)
    update, rates = script.update, []
    monkeypatch.setattr(script, "update", lambda *a: (rates.append(a[-1]), update(*a))[1])
    options = "--out . --cycles 2 2 --rows 2 --length 8 --no-compile"
    args = script.parser().parse_args(options.split())
    batches, (whole, killed) = script.batches, map(tmp_path_factory.mktemp, ("whole", "killed"))
    script.pretrain(whole, args)
    with monkeypatch.context() as patch:
        patch.setattr(script, "batches", lambda *a: chain(islice(batches(*a), 3), [None]))
        with pytest.raises(AttributeError):  # step 4 has nothing to train on; step 2 is saved
            script.pretrain(killed, args)
    script.pretrain(killed, args)
    assert rates == rates[:4] + rates[:3] + rates[2:4] and len(rates) == 9
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth_in_each_cycle(script):
    rates = [script.learning_rate(step, [100, 200], 1.0) for step in range(300)]
    assert rates[59] == rates[60] == rates[159] == rates[160] == 1.0
    assert rates[0] == rates[100] == pytest.approx(1 / 60)
    assert rates[99] == pytest.approx(0.05, abs=0.01) == rates[299]
