"""The script that makes the base checkpoint: its card says what is there, a killed run goes on."""

import importlib.util
import json
import re
import shlex
import shutil
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from labkit.tinytown import base_folder

FILE = Path(__file__).parents[1] / "scripts" / "pretrain_tinytown.py"
SPEC = importlib.util.spec_from_file_location("pretrain_tinytown", FILE)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def test_the_card_has_the_numbers_and_the_command(tiny_model, tmp_path):
    model, parse = tiny_model("llama"), script.parser().parse_args
    model.save_pretrained(tmp_path)
    options = vars(parse(shlex.split("--out DIR --steps 29 --no-compile --shape '{\"a\": 1}'")))
    facts = {"tokens_seen": 12_288, "minutes": 0.4, "device": "2 CPU cores"}
    facts |= {"perplexity": {"profile": 2.0, "sums": 8.0}} | options | {"out": "DIR"}
    (tmp_path / "pretraining.json").write_text(json.dumps(facts))
    asked = {"method": "full", "rows": 6000} | dict.fromkeys(script.ASKED, 0.853)
    (tmp_path / "askability.json").write_text(json.dumps({"runs": [asked]}))
    script.write_card(tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert f"{model.num_parameters():,} parameters" in text and "12,288 tokens" in text
    assert "| geometric mean | 4.00 |" in text and "| full | 6000 | 85.3% |" in text
    command = re.search(r"scripts/pretrain_tinytown\.py (.+)", text)[1]
    assert vars(parse(shlex.split(command))) == options


def test_the_base_checkpoint_has_the_card_that_the_script_writes(tmp_path):
    shutil.copytree(base_folder(), tmp_path, dirs_exist_ok=True)
    script.write_card(tmp_path)
    new, committed = ((f / "README.md").read_text("utf-8") for f in (tmp_path, base_folder()))
    assert new == committed


def test_a_killed_run_goes_on(tiny_tokenizer, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(script, "train_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setattr(script.evaluation, "perplexity_by", lambda *args: {})
    monkeypatch.setattr(script, "SAVE_EVERY", 2)
    update, rates = script.update, []

    def spied(model, both, block):
        rates.append([group["lr"] for optimizer in both for group in optimizer.param_groups])
        return update(model, both, block)

    monkeypatch.setattr(script, "update", spied)
    options = "--out . --steps 4 --rows 2 --length 8 --no-compile --shape".split()
    args = script.parser().parse_args([*options, json.dumps(SHAPE)])
    loader, (whole, killed) = script.DataLoader, map(tmp_path_factory.mktemp, ("whole", "killed"))
    script.pretrain(whole, args)
    with monkeypatch.context() as patch:
        three = lambda *a, **options: chain(islice(loader(*a, **options), 3), [None])  # noqa: E731
        patch.setattr(script, "DataLoader", three)
        with pytest.raises(TypeError):  # step 4 has nothing to train on; step 2 is saved
            script.pretrain(killed, args)
    script.pretrain(killed, args)
    assert rates == rates[:4] + rates[:3] + rates[2:4] and len(rates) == 9
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]


def test_processes_that_write_text_have_streams_of_their_own(tiny_tokenizer):
    blocks = script.Blocks(tiny_tokenizer, rows=2, length=8)
    assert all(torch.equal(a, b) for a, b in islice(zip(blocks, blocks, strict=False), 3))
    loader = script.DataLoader(blocks, None, num_workers=2)
    first, second, third = islice(loader, 3)
    alone = list(islice(blocks, 2))
    assert torch.equal(first, alone[0]) and torch.equal(third, alone[1])
    assert not torch.equal(first, second)


def test_tokens_of_no_text_are_told_apart(tiny_model):
    """Their embeddings were parallel; the others stay."""
    model, tokens = tiny_model("llama"), [0, 2, 3]
    weight = model.get_input_embeddings().weight
    weight.data[tokens] = weight.data[5].clone()
    before = weight.detach().clone()
    script.tell_apart(model, tokens)
    changed = (weight != before).any(1).nonzero()[:, 0].tolist()
    assert changed == tokens
    alike = torch.nn.functional.cosine_similarity(weight[[0, 0, 2]], weight[[2, 3, 3]])
    assert (alike < 0.9).all()


def test_the_learning_rate_warms_up_stays_and_falls_to_nothing():
    shares = [script.share_of_rate(step, 1000, 0.4) for step in range(1000)]
    assert shares[0] == pytest.approx(1 / 60) and set(shares[59:601]) == {1.0}
    assert shares[800] == pytest.approx(0.5) and shares[-1] == pytest.approx(1 / 400)


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6)])
def test_muon_steps_as_that_of_torch(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="original")
    for optimizer, its in ((script.Muon([ours], 0.1), ours), (reference, theirs)):
        for step in range(3):
            its.grad = torch.sin(weight * (step + 1))
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=0.01)  # that of torch iterates in bfloat16


def test_two_processes_make_the_steps_of_one(tmp_path):
    """Two halves of a batch, their gradients summed and the matrices shared out."""
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = _three_steps(slice(None))
    for ours, *others in zip(alone, *halves, strict=True):
        assert all(torch.allclose(ours, other, atol=1e-5) for other in others)


def _one_of_two(rank, folder):
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    weights = _three_steps(slice(rank, None, 2))
    torch.save(weights, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def _three_steps(rows):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(script.base_config(32, **SHAPE))
    blocks = torch.randint(32, (3, 4, 9))
    both = script.optimizers(model, script.parser().parse_args(["--out", "."]))
    for block in blocks:
        script.update(model, both, block[rows])
    return [weight.detach() for weight in model.parameters()]
