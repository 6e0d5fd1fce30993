"""ORPO: odds near certainty, numbers by hand, TRL's numbers."""

import math

import pytest
import torch
from helpers import assert_same

from labkit.pairs import pack_pairs
from labkit.techniques import lora, orpo
from labkit.techniques.orpo import ORPOConfig


@pytest.mark.parametrize("p", [1e-30, 0.01, 0.3, 0.49, 0.51, 0.9, 1 - 1e-6])
def test_log_odds_are_exact(p):
    logp = torch.tensor(p, dtype=torch.float64).log()
    exact = (logp - torch.log1p(-logp.exp())).item()
    assert orpo.log_odds(logp).item() == pytest.approx(exact, rel=2e-2 if p > 0.99 else 1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_certainty_is_finite_with_its_gradient(kind):
    logps = torch.tensor([[0.0, -1e-9], [-1e-8, -100.0]], dtype=kind, requires_grad=True)
    value, _ = orpo.loss(logps, -logps[:, 0].float(), 0.1)
    value.backward()
    assert value.isfinite() and logps.grad.isfinite().all()


def test_numbers_by_hand():
    """P 0.8 and 0.5: odds 4 and 1, ratio 4, -log sigma(log 4) = log(5/4)."""
    logps = torch.tensor([[0.8, 0.5]]).log()
    value, metrics = orpo.loss(logps, -logps[:, 0], lam=0.5)
    penalty = math.log(5 / 4)
    assert metrics["odds_ratio"].item() == pytest.approx(penalty)
    assert value.item() == pytest.approx(-math.log(0.8) + 0.5 * penalty)
    assert metrics["odds_share"].item() == pytest.approx(0.5 * penalty / value.item())


def test_the_nll_of_prompts_counts_their_tokens_only_where_asked(tiny_model, make_pairs):
    pairs, model = make_pairs(), tiny_model()
    response, everything = (pack_pairs(pairs, learn_prompts=on) for on in (False, True))
    assert response.in_response.all() and not everything.in_response.all()
    with torch.no_grad():
        one = orpo.pair_loss(model, response, ORPOConfig())[1]
        other = orpo.pair_loss(model, everything, ORPOConfig())[1]
    torch.testing.assert_close(one["odds_ratio"], other["odds_ratio"])
    assert abs(one["nll"] - other["nll"]) > 1e-4


@pytest.mark.parametrize("tuned", ["full", "lora"])
@pytest.mark.parametrize("length", [40, 14])
def test_loss_and_every_gradient_are_trls(
    tiny_model, tiny_tokenizer, make_pairs, tmp_path, arch, tuned, length
):
    """TRL's trainer has its NLL on prompt and response, a mean over all tokens of a batch: so one pair
    at a time."""
    from datasets import Dataset
    from trl.experimental import orpo as library

    model = tiny_model(arch)
    if tuned == "lora":
        model = lora.attach(model, lora.LoraConfig(rank=4))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    options = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    arguments = library.ORPOConfig(str(tmp_path), beta=0.3, remove_unused_columns=False, **options)
    rows = {"prompt": ["What is two?"], "chosen": [" It is two."], "rejected": [" No."]}
    given = dict(train_dataset=Dataset.from_dict(rows), processing_class=tiny_tokenizer)
    trainer = library.ORPOTrainer(model, arguments, **given)
    for pair in make_pairs(3, seed=length):
        batch = pack_pairs([pair], learn_prompts=True)
        ours, metrics = orpo.pair_loss(model, batch, ORPOConfig(lam=0.3))
        inputs = {}
        for side, example in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = torch.tensor(example.ids)[None]
            labels = ids.masked_fill(torch.tensor(example.mask)[None] == 0, -100)
            inputs |= {f"{side}_input_ids": ids, f"{side}_labels": labels}
            inputs |= {f"{side}_attention_mask": torch.ones_like(ids)}
        theirs, seen = trainer.get_batch_loss_metrics(model, inputs)
        assert_same(model, ours, theirs)
        names = {"nll": "nll_loss", "log_odds_ratio": "log_odds_chosen"}
        names |= {"accuracy": "rewards/accuracies", "logp_chosen": "logps/chosen"}
        for name, theirs_name in names.items():
            assert metrics[name].item() == pytest.approx(seen[theirs_name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("nll", ["response", "all"])
def test_it_learns_what_is_chosen(tiny_model, tiny_tokenizer, nll):
    rows = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": "Bread."} for n in range(8)]
    config = ORPOConfig(max_steps=20, batch_size=8, learning_rate=3e-3, nll=nll, lam=1.0)
    options = dict(eval_rows=rows[:4], progress=False)
    result = orpo.train(tiny_model(), tiny_tokenizer, rows, config, **options)
    first, last = result.history[0], result.history[-1]
    assert last["nll"] < first["nll"] / 2 and last["accuracy"] == 1
    assert last["log_odds_ratio"] > first["log_odds_ratio"] and result.eval_loss < first["loss"]
