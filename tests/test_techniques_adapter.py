"""The bottleneck adapter: truths, the same computation by hand, and its life inside PEFT."""

import inspect

import peft
import pytest
import torch
from helpers import IDS, logits, randomize
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from labkit import models
from labkit.techniques import adapter, qlora
from labkit.techniques.adapter import AdapterConfig, Bottleneck, BottleneckConfig

SMALL = AdapterConfig(bottleneck=6)


def bottlenecks(model, name="default"):
    """The adapters called `name`, in the order of the layers."""
    found = [m.bottleneck for m in model.modules() if isinstance(m, adapter.AdaptedLayer)]
    return [layer[name] for layer in found if name in layer]


def test_worked_example():
    """D = (1, -1), b = 1/2, U = (2, 0)ᵀ, c = (0, 1), f = relu.

    h = (3, 1): D h + b = 2.5, so h' = (3, 1) + (5, 0) + (0, 1) = (8, 2).
    h = (1, 3): D h + b = -1.5, which relu makes 0, so h' = (1, 3) + (0, 1) = (1, 4).
    """
    layer = Bottleneck(2, AdapterConfig(bottleneck=1))
    layer.D.data, layer.b.data = torch.tensor([[1.0, -1.0]]), torch.tensor([0.5])
    layer.U.data, layer.c.data = torch.tensor([[2.0], [0.0]]), torch.tensor([0.0, 1.0])
    assert layer(torch.tensor([[3.0, 1.0], [1.0, 3.0]])).tolist() == [[8.0, 2.0], [1.0, 4.0]]


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_starts_as_the_identity_and_at_first_only_u_trains(tiny_model, arch, placement):
    """dL/dD passes through U, which is zero: the first step moves U and c alone."""
    tuned = adapter.attach(tiny_model(arch), AdapterConfig(6, placement)).eval()
    assert torch.equal(logits(tuned), logits(tiny_model(arch)))
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    trained = {id(p) for p in tuned.parameters() if p.grad is not None}
    assert trained == {id(p) for one in bottlenecks(tuned) for p in one.parameters()}
    for one in bottlenecks(tuned):
        assert not one.D.grad.any() and not one.b.grad.any()
        assert one.U.grad.any() and one.c.grad.any()
    count = models.parameter_counts(tuned).trainable
    assert count == {"houlsby": 4, "pfeiffer": 2}[placement] * (2 * 64 * 6 + 64 + 6)
    assert count == adapter.parameters(64, 2, AdapterConfig(6, placement))
    assert adapter.parameters(4096, 32, AdapterConfig(64)) == 33_820_672  # Llama-2-7B
    half = adapter.attach(tiny_model(arch).bfloat16(), SMALL)
    assert {p.dtype for one in bottlenecks(half) for p in one.parameters()} == {torch.float32}
    assert logits(half).dtype == torch.bfloat16


def by_hand(model, arch, placement, weights, f):
    """A frozen model with the equation in hooks on layers named here; `weights` (D, b, U, c)."""
    blocks = model.transformer.h if arch == "gpt2" else model.model.layers
    names = {"gpt2": ["attn.c_proj", "mlp.c_proj"]}.get(arch, ["self_attn.o_proj", "mlp.down_proj"])
    wanted = names if placement == "houlsby" else names[1:]
    outlets = [block.get_submodule(name) for block in blocks for name in wanted]
    for layer, (d, b, u, c) in zip(outlets, weights, strict=True):

        def hook(module, inputs, h, d=d, b=b, u=u, c=c):
            inner = torch.einsum("btk,mk->btm", h, d) + b
            return h + torch.einsum("btm,km->btk", f(inner), u) + c

        layer.register_forward_hook(hook)
    return model.requires_grad_(False)


def assert_equals_hand(tuned, plain, arch, placement="houlsby", f=torch.relu):
    names = ("D", "b", "U", "c")
    weights = [
        [getattr(one, n).detach().clone().requires_grad_() for n in names]
        for one in bottlenecks(tuned)
    ]
    before = logits(plain)
    hand = by_hand(plain, arch, placement, weights, f)
    mine, other = (m(input_ids=IDS, labels=IDS) for m in (tuned, hand))
    assert (mine.logits - before).abs().max() > 0.05
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine.loss, other.loss, atol=1e-6, rtol=1e-5)
    (mine.loss + other.loss).backward()
    for one, twins in zip(bottlenecks(tuned), weights, strict=True):
        for name, twin in zip(names, twins, strict=True):
            assert twin.grad.any()
            torch.testing.assert_close(getattr(one, name).grad, twin.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("placement", "name"), [("houlsby", "relu"), ("pfeiffer", "silu")])
def test_parity_with_hooks_on_a_frozen_model(tiny_model, arch, placement, name):
    tuned = randomize(
        adapter.attach(tiny_model(arch), AdapterConfig(6, placement, name)).eval(), 0.1
    )
    assert_equals_hand(tuned, tiny_model(arch), arch, placement, getattr(nn.functional, name))


def test_a_four_bit_base(tiny_model, tiny_tokenizer, tmp_path):
    """Against the same model with its weights taken out of four bits."""

    def base():
        return qlora.quantize_model(tiny_model(), qlora.QloraConfig())

    tuned = adapter.attach(base(), SMALL).eval()
    assert torch.equal(logits(tuned), logits(base()))
    assert_equals_hand(randomize(tuned, 0.1), qlora.dequantize_model(base()), "llama")
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), logits(base()))
    folder = models.save(tuned, tiny_tokenizer, tmp_path / "adapter")
    torch.testing.assert_close(logits(models.load_adapter(base(), folder)), logits(tuned.eval()))


def test_adapters_are_switched_and_disabled(tiny_model, arch):
    """Two adapters of different width and place; the first trains until the second is chosen."""
    before = logits(tiny_model(arch))
    tuned = randomize(adapter.attach(tiny_model(arch), SMALL).eval())
    first = logits(tuned)
    assert not torch.equal(first, before)
    adapter.attach(tuned, AdapterConfig(3, "pfeiffer"), name="second").eval()
    assert torch.equal(logits(tuned), first)
    tuned.set_adapter("second")
    assert torch.equal(logits(tuned), before)
    assert {n.split(".")[-2] for n, p in tuned.named_parameters() if p.requires_grad} == {"second"}
    assert not torch.equal(logits(randomize(tuned, seed=2)), first)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    with pytest.raises(ValueError, match="second"):
        adapter.attach(tuned, SMALL, name="second")
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    with pytest.raises(NotImplementedError):
        tuned.merge_and_unload()
    assert torch.equal(logits(tuned.unload()), before)


def test_a_saved_adapter_comes_back_under_any_name(tiny_model, tiny_tokenizer, tmp_path):
    tuned = adapter.attach(tiny_model(), AdapterConfig(6, "pfeiffer", "gelu"))
    folder = models.save(randomize(tuned.eval()), tiny_tokenizer, tmp_path / "adapter")
    other = adapter.attach(tiny_model(), SMALL, name="mine").eval()
    other.load_adapter(folder, adapter_name="theirs")
    other.set_adapter("theirs")
    assert torch.equal(logits(other), logits(tuned))


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, arch):
    found = []
    for enable in (False, True):
        tuned = randomize(adapter.attach(tiny_model(arch), SMALL)).train()
        for module in tuned.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if enable:
            tuned.activation_checkpointing_enable()
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        found.append([one.D.grad for one in bottlenecks(tuned)])
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.any()
        torch.testing.assert_close(plain, checkpointed)


def test_refusals(tiny_model):
    for wrong in ({"bottleneck": True}, {"placement": "after"}, {"activation": "step"}):
        for config in (AdapterConfig, BottleneckConfig):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                config(**wrong)
    opt = models.meta_model({"model_type": "opt", "num_hidden_layers": 2})
    lora = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    injected = adapter.attach(tiny_model(), SMALL).get_base_model()
    for model in (opt, lora, injected):
        with pytest.raises(ValueError, match="model"):
            adapter.attach(model, SMALL)


TUNER, LAYER = BaseTuner, BaseTunerLayer
REPLACE = "self peft_config adapter_name target target_name parent current_key parameter_name"
INSIDE = [
    (TUNER, "_prepare_adapter_config", "self peft_config model_config"),
    (TUNER, "_prepare_model", "self peft_config model"),
    (TUNER, "_create_and_replace", REPLACE),
    (TUNER, "_replace_module", "self parent child_name new_module child"),
    (LAYER, "merge", "self safe_merge adapter_names"),
    (LAYER, "adapter_layer_names", ""),
    (LAYER, "active_adapters", ""),
    (LAYER, "disable_adapters", ""),
]


@pytest.mark.parametrize(("owner", "name", "arguments"), INSIDE)
def test_what_peft_keeps_inside(owner, name, arguments):
    """Every part of PEFT without a promise that the module builds on; a red line names the part."""
    where = f"{owner.__name__}.{name} of peft {peft.__version__}"
    fix = "adjust the last section of labkit/techniques/adapter.py, or stay with peft 0.21.2"
    assert hasattr(owner, name), f"{where} is gone: {fix}"
    if arguments:
        found = " ".join(inspect.signature(getattr(owner, name)).parameters)
        assert found == arguments, f"{where} takes {found}, not {arguments}: {fix}"


def test_peft_finds_methods_by_plain_strings():
    fix = "adjust the last lines of labkit/techniques/adapter.py"
    for kind in ("CONFIG", "TUNER", "PREFIX"):
        table = getattr(mapping, f"PEFT_TYPE_TO_{kind}_MAPPING")
        assert "LORA" in table, f"PEFT_TYPE_TO_{kind}_MAPPING is not keyed by strings: {fix}"
        assert adapter.METHOD in table
    taken = {str(kind.value) for kind in peft.PeftType}
    assert adapter.METHOD not in taken, f"PEFT has its own {adapter.METHOD}: {fix}"
