"""QLoRA: layer and model from scratch, parity with bitsandbytes and PEFT, and the guards."""

import math
import warnings

import pytest
import torch
from torch import nn

from labkit import data, models, training
from labkit import quantization as q
from labkit.techniques import lora, qlora
from labkit.techniques.lora import LoraConfig
from labkit.techniques.qlora import Linear4, QloraConfig

IDS = torch.arange(5, 29).reshape(2, 12)


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


def bnb_layers(model):
    from bitsandbytes.nn import Linear4bit

    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def needs_avx512bf16():
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, for which bitsandbytes packs weights anew")


# The layer and the model ----------------------------------------------------------------------


def test_the_layer_computes_with_rebuilt_weights():
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 48), torch.randn(5, 64, requires_grad=True)
    layer = Linear4(plain, QloraConfig())
    assert layer.weight.shape == (48, 64) and layer.packed.nbytes == 48 * 64 // 2
    assert 0 < (layer.weight - plain.weight).abs().mean() < 0.1 * plain.weight.abs().mean()
    torch.testing.assert_close(layer(x), x @ layer.weight.T + plain.bias)
    layer(x).square().sum().backward()
    expected = torch.autograd.grad((x @ layer.weight.T + plain.bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_full_weights_are_not_kept_for_the_backward_pass():
    layer, x = Linear4(nn.Linear(256, 256), QloraConfig()), torch.randn(2, 256, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        layer(x)
    assert sum(kept) < 256 * 256
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        x @ layer.weight.T
    assert sum(kept) >= 256 * 256  # what an ordinary product keeps


def reference(model, config):
    """The model that computes with the rebuilt weights, in full precision."""
    return qlora.dequantize_model(qlora.quantize_model(model, config))


def test_starts_as_the_quantized_model(tiny_model, arch):
    """The constants of 8 bits may differ at the middle of two codes, so `inject` is only close."""
    config = QloraConfig(LoraConfig(rank=4))
    expected = logits(reference(tiny_model(arch), config))
    assert (expected - logits(tiny_model(arch))).abs().max() > 1e-2
    for use, tolerance in ((qlora.attach, 1e-5), (qlora.inject, 5e-3)):
        found = logits(use(tiny_model(arch), config).eval())
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_all_but_the_head_is_in_four_bits(tiny_model, arch):
    names = "c_attn" if arch == "gpt2" else "q_proj,v_proj"
    config = QloraConfig(LoraConfig(targets=names))
    ours, theirs = qlora.inject(tiny_model(arch), config), qlora.attach(tiny_model(arch), config)
    found = [sum(isinstance(m, Linear4) for m in ours.modules()), len(bnb_layers(theirs))]
    assert found == 2 * [2 * (4 if arch == "gpt2" else 7)]
    for model in (ours, theirs):
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 2 * len(names.split(","))
        assert all(".A" in n or ".B" in n or "lora_" in n for n in trained)


def adapters(model):
    """A and B by layer and part, of our model or of PEFT's."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace("base_model.model.", "").replace("lora_", "")
            found[name.removesuffix(".default.weight")] = parameter
    return found


def copy_adapters(source, target):
    ours, theirs = adapters(source), adapters(target)
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        parameter.data.copy_(ours[name].data)
    return target


def assert_equal_step(model, other, tolerance=1e-4):
    """Logits, loss and all gradients agree."""
    torch.testing.assert_close(logits(model), logits(other), atol=1e-4, rtol=tolerance)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, other)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=tolerance)
    for loss in losses:
        loss.backward()
    theirs = adapters(other)
    for name, parameter in adapters(model).items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=tolerance)


@pytest.mark.parametrize("double", [False, True])
def test_attached_equals_the_reference(tiny_model, arch, double):
    config = QloraConfig(LoraConfig(rank=4, alpha=12), double_quantization=double)
    model = randomize(qlora.attach(tiny_model(arch), config)).eval()
    other = lora.attach(reference(tiny_model(arch), config), config.lora).eval()
    assert_equal_step(model, copy_adapters(model, other))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_injected_equals_attached(tiny_model, arch, name):
    config = QloraConfig(LoraConfig(rank=4), name, block_size=32, double_quantization=False)
    ours = randomize(qlora.inject(tiny_model(arch), config))
    theirs = qlora.attach(tiny_model(arch), config).eval()
    assert_equal_step(ours, copy_adapters(ours, theirs))


# What goes wrong in the libraries -------------------------------------------------------------


def test_blocks_that_run_over_the_end_of_a_row_are_refused(tiny_model):
    """There bitsandbytes rebuilds wrong weights on a CPU; the codes are right."""
    from bitsandbytes import functional

    weight = torch.randn(256, 96, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    right = q.rebuild(q.Stored(packed, state.absmax), weight.shape, q.nf4(), 64)
    assert (right - weight).abs().mean() < 0.08
    wrong = (functional.dequantize_4bit(packed, state) - weight).abs().mean()
    assert wrong > 0.15, "bitsandbytes is right by now: _check_width has become needless"
    for use in (qlora.attach, qlora.quantize_model):
        model = tiny_model()
        with pytest.raises(ValueError, match="block_size: .*divisor of 64.*q_proj'.* use 64 or"):
            use(model, QloraConfig(block_size=128))
        assert not bnb_layers(model)  # refused before anything was changed
    assert qlora.inject(tiny_model(), QloraConfig(block_size=128))


def test_weights_are_never_packed_anew(tiny_model, tiny_folder, monkeypatch):
    """Holds on every processor: what has AVX512-BF16 is told apart when a layer is made."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = QloraConfig()
    made = [qlora.attach(tiny_model(), config), qlora.load(tiny_folder(), config, device="cpu")[0]]
    loaded = by_transformers(tiny_folder())
    assert next(iter(bnb_layers(loaded).values())).support_avx512bf16_for_cpu
    for model in (*made, qlora.attach(loaded, config)):
        assert not any(m.support_avx512bf16_for_cpu for m in bnb_layers(model).values())


def by_transformers(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )


def test_evaluation_does_not_change_training(tiny_model):
    needs_avx512bf16()
    config = QloraConfig(LoraConfig(rank=4))
    model = randomize(qlora.attach(tiny_model(), config)).eval()
    other = copy_adapters(model, lora.attach(reference(tiny_model(), config), config.lora))
    before = {n: m.weight.data.clone() for n, m in bnb_layers(model).items()}
    for _ in range(2):
        logits(model)
    assert all(torch.equal(m.weight.data, before[n]) for n, m in bnb_layers(model).items())
    assert_equal_step(model.train(), other.train())


def test_without_the_guard_it_would(tiny_model):
    needs_avx512bf16()
    config = QloraConfig(LoraConfig(rank=4))
    model = randomize(qlora.attach(tiny_model(), config)).eval()
    other = copy_adapters(model, lora.attach(reference(tiny_model(), config), config.lora))
    for layer in bnb_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    logits(model)
    with pytest.raises(AssertionError):
        assert_equal_step(model.train(), other.train())
    with pytest.raises(ValueError, match="expected weights as quantized"):
        qlora.quantize_model(model, config)


def encoded(tokenizer):
    rows = [{"prompt": f"What is {i} plus one?", "completion": f"{i + 1}."} for i in range(8)]
    return data.encode(rows, tokenizer, max_length=64).dataset


def test_training_keeps_adapters_in_float32(tiny_model, tiny_tokenizer):
    """TRL would round them to bfloat16; trained so, they would not equal the reference."""
    config = QloraConfig(LoraConfig(rank=4))
    torch.manual_seed(0)
    model = qlora.attach(tiny_model(), config)
    other = copy_adapters(model, lora.attach(reference(tiny_model(), config), config.lora))
    settings = training.TrainConfig(
        learning_rate=1e-2, max_steps=3, batch_size=4, precision="fp32", optimizer="sgd"
    )
    for network in (model, other):
        training.sft(network, tiny_tokenizer, encoded(tiny_tokenizer), settings, progress=False)
    theirs = adapters(other)
    for name, parameter in adapters(model).items():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, theirs[name], atol=1e-7, rtol=1e-4)
    assert any(parameter.abs().max() > 0 for n, parameter in theirs.items() if n.endswith("B"))


# Save, reload, merge --------------------------------------------------------------------------


def test_a_saved_adapter_comes_back(tiny_model, tiny_tokenizer, tmp_path):
    config = QloraConfig(LoraConfig(rank=4))
    tuned = randomize(qlora.attach(tiny_model(), config)).eval()
    folder = models.save(tuned, tiny_tokenizer, tmp_path / "adapter")
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000
    again = qlora.restore(tiny_model(), folder, config)
    assert torch.equal(logits(again), logits(tuned))
    assert not hasattr(again, "is_loaded_in_4bit")
    with pytest.raises(FileNotFoundError, match="folder: expected a saved adapter"):
        qlora.restore(tiny_model(), tmp_path / "nowhere", config)


def test_merged_is_the_same_model_and_a_plain_one(tiny_model, tiny_tokenizer, tmp_path, arch):
    tuned = randomize(qlora.attach(tiny_model(arch), QloraConfig(LoraConfig(rank=4)))).eval()
    separate = logits(tuned)
    merged = qlora.merge(tuned)
    torch.testing.assert_close(logits(merged), separate, atol=1e-4, rtol=1e-4)
    assert not bnb_layers(merged) and not hasattr(merged, "peft_config")
    kinds = [type(module) for module in tiny_model(arch).modules()]
    assert [type(module) for module in merged.modules()] == kinds
    again, _ = models.load(models.save(merged, tiny_tokenizer, tmp_path / "merged"), device="cpu")
    assert torch.equal(logits(again), logits(merged))


def test_a_model_quantized_by_transformers_merges_into_a_plain_one(
    tiny_folder, tiny_tokenizer, tmp_path
):
    tuned = randomize(qlora.attach(by_transformers(tiny_folder()), QloraConfig())).eval()
    separate = logits(tuned)
    folder = models.save(qlora.merge(tuned), tiny_tokenizer, tmp_path / "merged")
    again, _ = models.load(str(folder), device="cpu")
    torch.testing.assert_close(logits(again), separate, atol=1e-4, rtol=1e-4)


def test_a_merge_into_four_bits_rounds_once_more(tiny_model):
    """PEFT's: the reason for `merge`. The update is lost only in part."""
    config = QloraConfig(LoraConfig(rank=4))
    tuned = randomize(qlora.attach(tiny_model(), config)).eval()
    separate = logits(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rounded = (logits(tuned.merge_and_unload()) - separate).abs().mean()
    start = (logits(reference(tiny_model(), config)) - separate).abs().mean()
    assert 0.05 * start < rounded < start


def test_the_injected_model_merges_and_swaps_as_lora(tiny_model):
    model = randomize(qlora.inject(tiny_model(), QloraConfig(LoraConfig(rank=4))))
    separate, state = logits(model), lora.lora_state(model)
    lora.swap(model, {name: -tensor.flip(0) for name, tensor in state.items()})
    assert not torch.equal(logits(model), separate)
    lora.load_lora_state(model, state)
    merged = qlora.merge(model)
    assert not any(isinstance(module, Linear4) for module in merged.modules())
    torch.testing.assert_close(logits(merged), separate, atol=1e-4, rtol=1e-4)


# Loading, refusals, optimizers ----------------------------------------------------------------


def test_loading_gives_what_quantizing_gives(tiny_folder):
    folder, config = tiny_folder(), QloraConfig()
    model, tokenizer = qlora.load(str(folder), config, device="cpu")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    expected = bnb_layers(qlora.quantize_model(models.load(str(folder), device="cpu")[0], config))
    theirs = bnb_layers(by_transformers(folder))
    found = bnb_layers(model)
    assert found.keys() == expected.keys() == theirs.keys()
    for name, layer in found.items():
        assert torch.equal(layer.weight.data, expected[name].weight.data)
        assert torch.equal(layer.weight.data, theirs[name].weight.data)
    half = qlora.load(str(folder), config, device="cpu", dtype="bfloat16")[0]
    assert half.dtype == logits(half).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device: expected"):
        qlora.load(str(folder), config, device="gpu0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, torch sees none")
def test_loading_never_fills_the_gpu(tiny_model):
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=64
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    full = sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    qlora.quantize_model(model, QloraConfig(), "cuda")
    assert torch.cuda.max_memory_allocated() - before < 0.6 * full


def test_refusals(tiny_model, tiny_folder):
    with pytest.raises(ValueError, match="data_type: expected nf4 or fp4.*int4"):
        qlora.attach(tiny_model(), QloraConfig(data_type="int4"))
    assert qlora.inject(tiny_model(), QloraConfig(data_type="int4"))
    with pytest.raises(ValueError, match="targets.*'nothing'"):
        model = tiny_model()
        qlora.attach(model, QloraConfig(LoraConfig(targets="nothing")))
    assert not bnb_layers(model)
    for first in (qlora.attach, qlora.inject, lora.attach):
        with pytest.raises(ValueError, match="adapters|has them already"):
            settings = QloraConfig() if first is not lora.attach else LoraConfig()
            qlora.attach(first(tiny_model(), settings), QloraConfig())
    quantized = qlora.quantize_model(tiny_model(), QloraConfig())
    with pytest.raises(ValueError, match=r"model: .*q_proj: expected \('fp4', 64, True\)"):
        qlora.attach(quantized, QloraConfig(data_type="fp4"))
    assert qlora.attach(quantized, QloraConfig())


@pytest.mark.parametrize(
    ("name", "value"), [("data_type", "nf3"), ("block_size", 48), ("block_size", 0)]
)
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        QloraConfig(**{name: value})


def test_optimizers_are_known_and_the_reasons_true(tiny_model, tiny_tokenizer):
    import bitsandbytes as bnb

    for device in ("cpu", "cuda", "cuda:0"):
        assert training.TrainConfig(optimizer=qlora.paged_optimizer(device)[0])
    assert "paged" in qlora.paged_optimizer("cuda")[0]
    weight = nn.Parameter(torch.ones(400, 400))
    weight.grad = torch.ones_like(weight)
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        bnb.optim.PagedAdamW32bit([weight]).step()
    eight = bnb.optim.AdamW8bit([weight])
    eight.step()
    assert eight.state[weight]["state1"].dtype == torch.uint8
    model = qlora.attach(tiny_model(), QloraConfig())
    settings = training.TrainConfig(max_steps=1, batch_size=2, optimizer="adamw_8bit")
    result = training.sft(model, tiny_tokenizer, encoded(tiny_tokenizer), settings, progress=False)
    assert math.isfinite(result.loss)
