"""DPO: log 2 at the reference, TRL's numbers, and what a reference is."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_same, randomize
from torch.nn.functional import logsigmoid

from labkit import logprobs, training
from labkit.pairs import pack_pairs
from labkit.techniques import dpo, lora
from labkit.techniques.dpo import DPOConfig

TRL_NAMES = {"dpo": "sigmoid", "ipo": "ipo", "dpo_norm": "sigmoid_norm"}


@pytest.mark.parametrize("variant", ["dpo", "dpo_norm"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_at_the_reference_is_log_2(variant, smoothing):
    logps, lengths = torch.randn(4, 2), torch.randint(1, 9, (4, 2))
    config = DPOConfig(variant=variant, label_smoothing=smoothing, beta=0.3)
    value, metrics = dpo.loss(logps, logps, lengths, config)
    assert value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["accuracy"] == 0 and metrics["margin"] == 0  # a tie is not a win


def test_numbers_by_hand():
    """Ratios 2 - 0.5 and -1 - 1: h = 1.5 + 2 = 3.5; beta 2 gives -log sigma(7)."""
    logps = torch.tensor([[-2.0, -5.0]])
    reference, lengths = torch.tensor([[-3.5, -3.0]]), torch.tensor([[3, 2]])
    value, metrics = dpo.loss(logps, reference, lengths, DPOConfig(beta=2.0))
    assert value.item() == pytest.approx(math.log(1 + math.exp(-7)), rel=1e-4)
    assert metrics["reward_chosen"] == 3 and metrics["reward_rejected"] == -4
    ipo = dpo.loss(logps, reference, lengths, DPOConfig(beta=2.0, variant="ipo"))[0]
    assert ipo.item() == pytest.approx((1.5 / 3 + 2 / 2 - 1 / 4) ** 2)
    simpo = DPOConfig(beta=2.0, variant="simpo", margin=0.5)
    expected = -logsigmoid(torch.tensor(2 * (-2 / 3 + 5 / 2) - 0.5))
    assert dpo.loss(logps, reference, lengths, simpo)[0].item() == pytest.approx(expected.item())
    with_nll = dpo.loss(logps, reference, lengths, DPOConfig(beta=2.0, nll=0.5))[0]
    assert with_nll.item() == pytest.approx(value.item() + 0.5 * 2 / 3)


def test_the_gradient_weighs_what_the_policy_has_the_wrong_way_round():
    """dL/dh = -beta sigma(-beta h): near beta for a pair that is wrong, near 0 for one that is right."""
    reference, lengths = torch.zeros(2, 2), torch.ones(2, 2)
    logps = torch.tensor([[-40.0, -1.0], [-1.0, -40.0]], requires_grad=True)
    (2 * dpo.loss(logps, reference, lengths, DPOConfig(beta=0.5))[0]).backward()
    torch.testing.assert_close(logps.grad[:, 0], torch.tensor([-0.5, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(logps.grad[:, 0], -logps.grad[:, 1])


@pytest.mark.parametrize("tuned", ["full", "lora"])
@pytest.mark.parametrize("variant", TRL_NAMES)
def test_loss_rewards_and_every_gradient_are_trls(
    tiny_model, tiny_tokenizer, make_pairs, tmp_path, arch, variant, tuned
):
    import trl
    from datasets import Dataset

    pairs, base = make_pairs(), tiny_model(arch)
    known, moved = dpo.with_reference(pairs, base), tiny_model(arch, seed=1)
    if tuned == "lora":
        moved = lora.attach(base, lora.LoraConfig(rank=4))
    options = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    options |= dict(beta=0.3, loss_type=TRL_NAMES[variant])
    data = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    given = dict(train_dataset=data, processing_class=tiny_tokenizer)
    reference = None if tuned == "lora" else base
    trainer = trl.DPOTrainer(moved, reference, trl.DPOConfig(str(tmp_path), **options), **given)
    for name, p in moved.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(p, std=0.1)
    config = DPOConfig(beta=0.3, variant=variant)
    ours, metrics = dpo.pair_loss(moved, pack_pairs(known), config)
    inputs = []
    for pair in pairs:
        ids = {"prompt_ids": pair.chosen.ids[pair.chosen.mask == 0].tolist()}
        ids["chosen_ids"] = pair.chosen.ids[pair.chosen.mask == 1].tolist()
        ids["rejected_ids"] = pair.rejected.ids[pair.rejected.mask == 1].tolist()
        inputs.append(ids)
    assert_same(moved, ours, trainer._compute_loss(moved, trainer.data_collator(inputs), False))
    seen = {name: values[-1] for name, values in max(trainer._metrics.values(), key=len).items()}
    names = {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected"}
    names |= {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    names |= {"logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"}
    for name, theirs_name in names.items():
        assert metrics[name].item() == pytest.approx(seen[theirs_name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("tuned", ["full", "lora", "adapter that trained"])
def test_training_starts_at_log_2_and_learns(tiny_model, make_pairs, tuned):
    """Also where LoRA continues a trained adapter: the reference is that adapter, not the base."""
    model = tiny_model()
    if tuned != "full":
        model = lora.attach(model, lora.LoraConfig(rank=4))
    if tuned == "adapter that trained":
        randomize(model, std=0.2)
    pairs = dpo.with_reference(make_pairs(12), model)
    config = DPOConfig(max_steps=20, batch_size=12, learning_rate=3e-3, warmup_ratio=0.0)
    loss = partial(dpo.pair_loss, config=config)
    result = training.fit(model, pairs, loss, config, collate=pack_pairs, progress=False)
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.history[-1]["loss"] < 0.4 and result.history[-1]["accuracy"] > 0.9


def test_the_reference_is_kept_for_this_model_and_these_pairs(
    tiny_model, make_pairs, tmp_path, monkeypatch
):
    model, pairs = tiny_model(), make_pairs()
    known = dpo.with_reference(pairs, model, tmp_path)
    calls, forward = [], logprobs.response_logps
    counted = lambda *a, **k: calls.append(1) or forward(*a, **k)  # noqa: E731
    monkeypatch.setattr(logprobs, "response_logps", counted)
    again = dpo.with_reference(pairs, model, tmp_path)
    assert not calls
    for one, other in zip(known, again, strict=True):
        assert np.array_equal(one.reference, other.reference)
    with torch.no_grad():
        next(iter(model.parameters()))[3, 3] += 1.0
    dpo.with_reference(pairs, model, tmp_path)
    dpo.with_reference(make_pairs(seed=1), tiny_model(), tmp_path)
    assert len(calls) == 2


def test_a_reference_is_needed(tiny_model, make_pairs):
    with pytest.raises(ValueError, match="reference"):
        dpo.pair_loss(tiny_model(), pack_pairs(make_pairs()), DPOConfig())
    dpo.pair_loss(tiny_model(), pack_pairs(make_pairs()), DPOConfig(variant="simpo"))


ANSWERS = {n: {"chosen": f"It is {n + 1}.", "rejected": "Bread " * (n % 3 + 1)} for n in range(12)}
ROWS = [{"prompt": f"What is {n} plus one?"} | both for n, both in ANSWERS.items()]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_a_killed_run_goes_on_with_the_same_reference(tiny_model, tiny_tokenizer, tmp_path, tuned):
    """Bit for bit what an uninterrupted run gives; another start is refused."""

    def start(seed=0):
        model = tiny_model("gpt2", seed)
        return model if tuned == "full" else lora.attach(model, lora.LoraConfig(rank=4))

    def run(model, place, **options):
        config = DPOConfig(batch_size=4, epochs=2, learning_rate=1e-3, save_steps=4, **options)
        given = dict(output_dir=tmp_path / place, progress=False)
        return dpo.train(model, tiny_tokenizer, ROWS, config, **given).history, weights(model)

    torch.manual_seed(0)
    first = start()
    copy_of = {name: p.clone() for name, p in first.state_dict().items()}
    whole, expected = run(first, "whole")
    assert len(whole) == 6 and whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    again = start()
    again.load_state_dict(copy_of)
    resumed, found = run(again, "more", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="resume"):
        run(start(seed=1), "other", resume=str(tmp_path / "whole"))


def test_held_out_rows_have_their_own_reference(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    config = DPOConfig(max_steps=1, batch_size=4, learning_rate=1e-12)
    options = dict(eval_rows=ROWS[8:], output_dir=tmp_path, progress=False)
    result = dpo.train(model, tiny_tokenizer, ROWS[:8], config, **options)
    assert result.eval_loss == pytest.approx(math.log(2), abs=1e-5)
    assert len([*tmp_path.glob("reference-*.safetensors")]) == 2
