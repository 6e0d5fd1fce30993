"""LoRA from scratch: truths of the method, then parity with PEFT on five architectures."""

import copy

import pytest
import torch
from torch import nn

from labkit import models
from labkit.techniques import lora
from labkit.techniques.lora import LoraConfig, LoRALinear

IDS = torch.arange(5, 29).reshape(2, 12)
LLAMA_2_7B = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                  num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False)  # fmt: skip


def randomize(model):
    """Adapters as after training: B is no longer zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_worked_example():
    """r = 1, alpha = 2, so scale 2. x = (1, 2), A = (3, 1), so A x = 5; B = (1, -1)ᵀ.

    With W0 the identity: h = (1, 2) + 2 · 5 · (1, -1) = (11, -8).
    """
    layer = LoRALinear(nn.Linear(2, 2, bias=False), LoraConfig(rank=1, alpha=2))
    with torch.no_grad():
        layer.base.weight.copy_(torch.eye(2))
        layer.A.copy_(torch.tensor([[3.0, 1.0]]))
        layer.B.copy_(torch.tensor([[1.0], [-1.0]]))
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [11.0, -8.0]
    assert layer.delta().tolist() == [[6.0, 2.0], [-6.0, -2.0]]


def test_starts_as_the_identity(tiny_model, arch):
    model = tiny_model(arch)
    before = logits(model)
    assert torch.equal(logits(lora.inject(model, LoraConfig())), before)


def test_only_adapters_train(tiny_model, arch):
    model = lora.inject(tiny_model(arch), LoraConfig(rank=4))
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"A", "B"}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n[-2:] not in (".A", ".B"))


def test_rank_limits_the_update():
    layer = randomize(LoRALinear(nn.Linear(32, 48), LoraConfig(rank=3)))
    assert torch.linalg.matrix_rank(layer.delta()) == 3


def test_counts_of_the_chapter():
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(4096, 4096, bias=False), LoraConfig(rank=8))
    assert layer.A.numel() + layer.B.numel() == 65_536
    assert layer.base.weight.numel() == 16_777_216 == 256 * 65_536


def test_counts_of_llama_2_7b():
    model = lora.inject(models.meta_model(LLAMA_2_7B), LoraConfig(targets=("q_proj", "v_proj")))
    counts = models.parameter_counts(model)
    assert (counts.trainable, counts.total) == (4_194_304, 6_742_609_920)


def test_merge_changes_nothing_but_the_weights(tiny_model, arch):
    model = randomize(lora.inject(tiny_model(arch), LoraConfig()))
    separate = logits(model)
    origin = {n: p.clone() for n, p in model.named_parameters()}
    assert (separate - logits(tiny_model(arch))).abs().max() > 1e-2
    lora.merge(lora.merge(model))  # the second changes nothing
    torch.testing.assert_close(logits(model), separate, atol=1e-4, rtol=1e-4)
    lora.unmerge(lora.unmerge(model))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, origin[name], atol=1e-6, rtol=0)


def test_adapters_swap(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model = randomize(lora.inject(tiny_model(), LoraConfig()))
    first, with_first = lora.lora_state(model), logits(model)
    second = {name: -tensor.flip(0) for name, tensor in first.items()}
    returned = lora.swap(model, second)
    assert not torch.equal(logits(model), with_first)
    save_file(returned, tmp_path / "first.safetensors")
    lora.swap(model, load_file(tmp_path / "first.safetensors"))
    assert torch.equal(logits(model), with_first)


def test_state_must_fit(tiny_model):
    model = lora.inject(tiny_model(), LoraConfig(rank=4))
    other = lora.lora_state(lora.inject(tiny_model(), LoraConfig(rank=2)))
    with pytest.raises(ValueError, match=r"state: .*expected \(4, 128\), got \(2, 128\)"):
        lora.load_lora_state(model, other)
    state = lora.lora_state(model)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="got 'nothing'"):
        lora.load_lora_state(model, state)
    with pytest.raises(ValueError, match="unmerge"):
        lora.load_lora_state(lora.merge(model), lora.lora_state(model))


def test_top_level_layers():
    alone = lora.inject(nn.Linear(4, 6), LoraConfig(rank=2))
    assert isinstance(alone, LoRALinear) and set(lora.lora_state(alone)) == {"A", "B"}
    lora.load_lora_state(alone, lora.lora_state(alone))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert isinstance(lora.inject(model, LoraConfig(rank=2))[0], LoRALinear)


def test_all_linear_leaves_the_head_alone(tiny_model, arch):
    model = lora.inject(tiny_model(arch), LoraConfig())
    wrapped = [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(wrapped) == 2 * (4 if arch == "gpt2" else 7)
    assert not isinstance(model.get_output_embeddings(), LoRALinear)


@pytest.mark.parametrize("use", [lora.inject, lora.attach])
def test_refusals(tiny_model, use):
    with pytest.raises(ValueError, match="targets.*'q_proj'.*c_attn, c_fc, c_proj"):
        use(tiny_model("gpt2"), LoraConfig(targets="c_attn,q_proj"))
    with pytest.raises(ValueError, match="'model.layers.0.self_attn' is a LlamaAttention"):
        use(tiny_model(), LoraConfig(targets=("self_attn",)))
    with pytest.raises(ValueError, match="targets.*shares its weight"):
        use(tiny_model("qwen2"), LoraConfig(targets=("lm_head",)))
    for first in (lora.inject, lora.attach):
        with pytest.raises(ValueError, match="has them already"):
            use(first(tiny_model(), LoraConfig()), LoraConfig())


def test_a_refusal_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError):
        lora.inject(model, LoraConfig(targets=("q_proj", "nothing")))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", -1), ("rank", 0), ("rank", 2.5), ("rank", True), ("alpha", 0), ("dropout", 1.0),
     ("dropout", -0.1), ("alpha", float("nan")), ("targets", ()), ("targets", " , ")],
)  # fmt: skip
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        LoraConfig(**{name: value})


def test_half_precision_keeps_small_updates():
    layer = LoRALinear(nn.Linear(8, 8, dtype=torch.bfloat16), LoraConfig(rank=2))
    assert layer.A.dtype == layer.B.dtype == torch.float32
    assert layer(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_only_in_training():
    layer = randomize(LoRALinear(nn.Linear(64, 64), LoraConfig(dropout=0.5)))
    x = torch.ones(1, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def pair(make, arch, config):
    """The same adapters twice: ours, and PEFT's with our weights copied in."""
    ours = randomize(lora.inject(make(arch), config))
    theirs = lora.attach(make(arch), config)
    layers = dict(theirs.base_model.model.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            for part in "AB":
                linear = getattr(layers[name], f"lora_{part}")["default"]
                linear.weight.data.copy_(getattr(module, part))
    return ours, theirs.eval()


@pytest.mark.parametrize("scope", ["all", "attention"])
def test_parity_with_peft(tiny_model, arch, scope):
    attention = "c_attn" if arch == "gpt2" else "q_proj,v_proj"
    config = LoraConfig(rank=4, alpha=12, targets=lora.ALL if scope == "all" else attention)
    ours, theirs = pair(tiny_model, arch, config)
    assert models.parameter_counts(ours) == models.parameter_counts(theirs)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    layers = dict(theirs.base_model.model.named_modules())
    compared = 0
    for name, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            for part in "AB":
                grad = getattr(layers[name], f"lora_{part}")["default"].weight.grad
                assert grad.abs().max() > 0
                torch.testing.assert_close(getattr(module, part).grad, grad, atol=1e-5, rtol=1e-4)
                compared += 1
    assert compared == sum(p.requires_grad for p in ours.parameters())


def test_merging_agrees_with_peft(tiny_model, arch):
    ours, theirs = pair(tiny_model, arch, LoraConfig(rank=4))
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(lora.merge(ours)), logits(merged), atol=1e-5, rtol=1e-4)


def test_peft_starts_as_the_identity_without_a_warning(tiny_model, arch, recwarn):
    model = tiny_model(arch)
    before = logits(model)
    assert torch.equal(logits(lora.attach(copy.deepcopy(model), LoraConfig()).eval()), before)
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]


def test_a_saved_adapter_comes_back(tiny_model, tiny_tokenizer, tmp_path):
    tuned = randomize(lora.attach(tiny_model(), LoraConfig(rank=4))).eval()
    models.save(tuned, tiny_tokenizer, tmp_path / "adapter")
    assert torch.equal(logits(lora.restore(tiny_model(), tmp_path / "adapter")), logits(tuned))
    with pytest.raises(FileNotFoundError, match="folder: expected a saved adapter"):
        lora.restore(tiny_model(), tmp_path / "nowhere")
