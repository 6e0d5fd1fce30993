"""LoRA from scratch: truths of the method, then parity with PEFT on five architectures."""

import pytest
import torch
from helpers import IDS, LLAMA_2_7B, logits, randomize
from torch import nn

from labkit import models
from labkit.techniques import lora
from labkit.techniques.lora import LoraConfig, LoRALinear


def test_worked_example():
    """r = 1, alpha = 2, so scale 2. x = (1, 2), A = (3, 1), so A x = 5; B = (1, -1)ᵀ.

    With W0 the identity: h = (1, 2) + 2 · 5 · (1, -1) = (11, -8).
    """
    layer = LoRALinear(nn.Linear(2, 2, bias=False), LoraConfig(rank=1, alpha=2))
    layer.base.weight.data = torch.eye(2)
    layer.A.data, layer.B.data = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0], [-1.0]])
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [11.0, -8.0]
    assert layer.delta().tolist() == [[6.0, 2.0], [-6.0, -2.0]]


@pytest.mark.parametrize("use", [lora.inject, lora.attach])
def test_starts_as_the_identity_and_only_adapters_train(tiny_model, arch, use, recwarn):
    before = logits(tiny_model(arch))
    model = use(tiny_model(arch), LoraConfig(rank=4)).eval()
    assert torch.equal(logits(model), before)
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(".A" in name or ".B" in name or "lora" in name for name in trained)
    assert len(trained) == 2 * 2 * (4 if arch == "gpt2" else 7)  # not the head


def test_counts_of_llama_2_7b():
    """The chapter's layer: 256 times fewer numbers at rank 8."""
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(4096, 4096, bias=False), LoraConfig(rank=8))
    assert layer.A.numel() + layer.B.numel() == 65_536 == layer.base.weight.numel() // 256
    model = lora.inject(models.meta_model(LLAMA_2_7B), LoraConfig(targets="q_proj, v_proj"))
    counts = models.parameter_counts(model)
    assert (counts.trainable, counts.total) == (4_194_304, 6_742_609_920)


def test_merging_changes_nothing_but_the_weights(tiny_model, arch):
    model = randomize(lora.inject(tiny_model(arch), LoraConfig()))
    separate = logits(model)
    assert (separate - logits(tiny_model(arch))).abs().max() > 1e-2
    lora.merge(lora.merge(model))  # the second changes nothing
    torch.testing.assert_close(logits(model), separate, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_is_not_finite_is_not_merged(tiny_model):
    model = randomize(lora.inject(tiny_model(), LoraConfig()))
    model.model.layers[1].mlp.down_proj.B.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj"):
        lora.merge(model)
    origin = dict(tiny_model().named_parameters())
    kept = {n.replace(".base", ""): p for n, p in model.named_parameters() if "base" in n}
    assert len(kept) == 14 and all(torch.equal(p, origin[n]) for n, p in kept.items())


def test_loading_another_adapter(tiny_model):
    model = randomize(lora.inject(tiny_model(), LoraConfig(rank=4)))
    first, with_first = lora.lora_state(model), logits(model)
    lora.load_lora_state(model, {name: -tensor.flip(0) for name, tensor in first.items()})
    assert not torch.equal(logits(model), with_first)
    lora.load_lora_state(model, first)
    assert torch.equal(logits(model), with_first)
    narrow = lora.lora_state(lora.inject(tiny_model(), LoraConfig(rank=2)))
    for wrong in (narrow, dict(list(first.items())[1:])):
        with pytest.raises(ValueError, match="state"):
            lora.load_lora_state(model, wrong)
    with pytest.raises(ValueError, match="merged"):
        lora.load_lora_state(lora.merge(model), first)


@pytest.mark.parametrize("use", [lora.inject, lora.attach])
def test_refusals_leave_the_model_as_it_was(tiny_model, use):
    wrong = [("gpt2", ("c_attn", "q_proj")), ("llama", "self_attn"), ("qwen2", "lm_head")]
    for arch, targets in wrong:
        model = tiny_model(arch)
        with pytest.raises(ValueError, match="targets"):
            use(model, LoraConfig(targets=targets))
        assert all(p.requires_grad for p in model.parameters())
    for first in (lora.inject, lora.attach):
        with pytest.raises(ValueError, match="adapters"):
            use(first(tiny_model(), LoraConfig()), LoraConfig())


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": True}, {"alpha": 0}, {"dropout": 1.0}, {"targets": ()}]
)
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoraConfig(**wrong)


def test_a_layer_alone_in_half_precision_keeps_small_updates_and_has_dropout():
    config = LoraConfig(rank=3, dropout=0.5)
    layer = randomize(lora.inject(nn.Linear(64, 48, dtype=torch.bfloat16), config))
    kinds = {name: tensor.dtype for name, tensor in lora.lora_state(layer).items()}
    assert kinds == dict.fromkeys("AB", torch.float32)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x)) and layer(x).dtype == torch.bfloat16
    assert torch.linalg.matrix_rank(layer.delta()) == 3


def pair(ours, theirs, config):
    """The same adapters twice: ours and PEFT's, and their parameters A and B in pairs."""
    ours, theirs = randomize(lora.inject(ours, config)), lora.attach(theirs, config)
    layers = dict(theirs.base_model.model.named_modules())
    parameters = []
    for name, module in ours.named_modules():
        for part in "AB" if isinstance(module, LoRALinear) else "":
            other = getattr(layers[name], f"lora_{part}")["default"].weight
            other.data.copy_(getattr(module, part))
            parameters.append((getattr(module, part), other))
    assert models.parameter_counts(ours) == models.parameter_counts(theirs)
    return ours, theirs.eval(), parameters


@pytest.mark.parametrize("scope", ["all", "attention"])
def test_parity_with_peft(tiny_model, arch, scope):
    attention = "c_attn" if arch == "gpt2" else "q_proj,v_proj"
    config = LoraConfig(rank=4, alpha=12, targets=lora.ALL if scope == "all" else attention)
    ours, theirs, parameters = pair(tiny_model(arch), tiny_model(arch), config)
    mine, other = (model(input_ids=IDS, labels=IDS) for model in (ours, theirs))
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, other.loss, atol=1e-6, rtol=1e-6)
    (mine.loss + other.loss).backward()
    for parameter, counterpart in parameters:
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, counterpart.grad, atol=1e-5, rtol=1e-4)
    merged = logits(theirs.merge_and_unload())
    torch.testing.assert_close(logits(lora.merge(ours)), merged, atol=1e-5, rtol=1e-4)
