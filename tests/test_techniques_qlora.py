"""QLoRA: layer and model from scratch, parity with bitsandbytes and PEFT, and the guards."""

import gc

import pytest
import torch
from helpers import IDS, logits, randomize
from torch import nn

from labkit import data, models, training
from labkit.techniques import lora, qlora
from labkit.techniques.lora import LoraConfig
from labkit.techniques.qlora import Linear4, QloraConfig

CONFIG = QloraConfig(LoraConfig(rank=4, alpha=12))


def bnb_layers(model):
    from bitsandbytes.nn import Linear4bit

    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def reference(model, config=CONFIG):
    """The model that computes with the dequantized weights, in full precision."""
    return qlora.dequantize_model(qlora.quantize_model(model, config))


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


def attached_and_reference(make, arch="llama", config=CONFIG):
    """The same adapters on bitsandbytes' four bits and on dequantized weights."""
    model = randomize(qlora.attach(make(arch), config)).eval()
    other = lora.attach(reference(make(arch), config), config.lora).eval()
    return model, copy_adapters(model, other)


def assert_equal_step(model, other):
    """Logits, loss and all gradients agree."""
    mine, theirs = (m(input_ids=IDS, labels=IDS) for m in (model, other))
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-6, rtol=1e-4)
    (mine.loss + theirs.loss).backward()
    twins = adapters(other)
    for name, parameter in adapters(model).items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, twins[name].grad, atol=1e-5, rtol=1e-4)


def test_the_layer_computes_with_dequantized_weights():
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
    """Between forward and backward pass there is no tensor of the size of Ŵ."""
    layer, x = Linear4(nn.Linear(256, 256), QloraConfig()), torch.randn(2, 256, requires_grad=True)

    def full_weights():
        alive = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        return sum(t.is_floating_point() and t.numel() == 256 * 256 for t in alive)

    before = full_weights()
    out = layer(x)
    assert full_weights() == before
    weight = layer.weight
    assert full_weights() > before  # it would be seen
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, -1))


def test_attached_starts_as_the_quantized_model(tiny_model, arch):
    """The scales of 8 bits may differ at the middle of two codes, so `inject` is only close."""
    expected = logits(reference(tiny_model(arch)))
    assert (expected - logits(tiny_model(arch))).abs().max() > 1e-2
    for use, tolerance in ((qlora.attach, 1e-5), (qlora.inject, 5e-3)):
        found = logits(use(tiny_model(arch), CONFIG).eval())
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_all_but_the_head_is_in_four_bits(tiny_model):
    config = QloraConfig(LoraConfig(targets="q_proj,v_proj"))
    ours, theirs = qlora.inject(tiny_model(), config), qlora.attach(tiny_model(), config)
    found = [sum(isinstance(m, Linear4) for m in ours.modules()), len(bnb_layers(theirs))]
    assert found == 2 * [2 * 7]
    assert adapters(ours).keys() == adapters(theirs).keys() and len(adapters(ours)) == 2 * 2 * 2


def test_attached_equals_the_reference(tiny_model, arch):
    assert_equal_step(*attached_and_reference(tiny_model, arch))


def test_injected_equals_attached(tiny_model, arch):
    config = QloraConfig(CONFIG.lora, "fp4", block_size=32, double_quantization=False)
    ours = randomize(qlora.inject(tiny_model(arch), config))
    assert_equal_step(ours, copy_adapters(ours, qlora.attach(tiny_model(arch), config).eval()))


def by_transformers(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, **kind)
    options = dict(quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_weights_are_never_packed_anew(tiny_model, tiny_folder, monkeypatch):
    """Holds on every processor: what has AVX512-BF16 is recognized when a layer is made."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = QloraConfig()
    made = [qlora.attach(tiny_model(), config), qlora.load(tiny_folder(), config, device="cpu")[0]]
    loaded = by_transformers(tiny_folder())
    assert next(iter(bnb_layers(loaded).values())).support_avx512bf16_for_cpu
    for model in (*made, qlora.attach(loaded, config)):
        assert not any(m.support_avx512bf16_for_cpu for m in bnb_layers(model).values())


def test_training_keeps_adapters_in_float32(tiny_model, tiny_tokenizer):
    """TRL would round them to bfloat16; trained so, they would not equal the reference."""
    rows = [{"prompt": f"What is {i} plus one?", "completion": f"{i + 1}."} for i in range(8)]
    encoded = data.encode(rows, tiny_tokenizer, max_length=64)
    model, other = attached_and_reference(tiny_model)
    assert not hasattr(model, "is_loaded_in_4bit")
    start = {name: p.detach().clone() for name, p in adapters(model).items()}
    size = dict(max_steps=3, batch_size=4)
    settings = training.TrainConfig(1e-2, precision="fp32", optimizer="sgd", **size)
    for network in (model, other):
        training.fit(network, encoded, training.sft_loss, settings, progress=False)
    for name, parameter in adapters(model).items():
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, start[name])
        torch.testing.assert_close(parameter, adapters(other)[name], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("use", [qlora.attach, qlora.inject])
def test_merged_is_the_same_model_and_a_plain_one(tiny_model, arch, use):
    tuned = randomize(use(tiny_model(arch), CONFIG)).eval()
    separate = logits(tuned)
    merged = qlora.merge(tuned)
    torch.testing.assert_close(logits(merged), separate, atol=1e-4, rtol=1e-4)
    assert not hasattr(merged, "peft_config") and not bnb_layers(merged)
    assert not any(isinstance(module, Linear4) for module in merged.modules())


def test_a_merge_that_is_not_finite_is_refused(tiny_model):
    tuned = randomize(qlora.attach(tiny_model(), CONFIG)).eval()
    next(iter(adapters(tuned).values())).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        qlora.merge(tuned)
    assert len(bnb_layers(tuned)) == 14


def test_loading_gives_what_quantizing_gives(tiny_folder, tiny_tokenizer, tmp_path):
    folder, config = tiny_folder(), QloraConfig()
    model, _ = qlora.load(str(folder), config, device="cpu")
    expected = bnb_layers(qlora.quantize_model(models.load(str(folder), device="cpu")[0], config))
    loaded = by_transformers(folder)
    theirs = bnb_layers(loaded)
    assert bnb_layers(model).keys() == expected.keys() == theirs.keys()
    for name, layer in bnb_layers(model).items():
        assert torch.equal(layer.weight.data, expected[name].weight.data)
        assert torch.equal(layer.weight.data, theirs[name].weight.data)
    half = qlora.load(str(folder), config, device="cpu", dtype="bfloat16")[0]
    assert half.dtype == logits(half).dtype == torch.bfloat16
    tuned = randomize(qlora.attach(loaded, config)).eval()
    separate = logits(tuned)
    merged = models.save(qlora.merge(tuned), tiny_tokenizer, tmp_path / "merged")
    again, _ = models.load(str(merged), device="cpu")
    torch.testing.assert_close(logits(again), separate, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, torch sees none")
def test_loading_never_fills_the_gpu():
    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=64)
    model = models.meta_model(dict(model_type="llama", **shape)).bfloat16().to_empty(device="cpu")
    full = sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    qlora.quantize_model(model, QloraConfig(), "cuda")
    assert torch.cuda.max_memory_allocated() - before < 0.6 * full


def test_refusals(tiny_model):
    """Blocks that cross rows: there bitsandbytes dequantizes wrongly on a CPU."""
    model = tiny_model()
    for wrong in ({"data_type": "int4"}, {"block_size": 128}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            qlora.attach(model, QloraConfig(**wrong))
        assert qlora.inject(tiny_model(), QloraConfig(**wrong))
    with pytest.raises(ValueError, match="targets"):
        qlora.attach(model, QloraConfig(LoraConfig(targets="nothing")))
    assert not bnb_layers(model)
    with pytest.raises(ValueError, match="adapters"):
        qlora.attach(qlora.attach(tiny_model(), CONFIG), CONFIG)
    quantized = qlora.quantize_model(tiny_model(), CONFIG)
    with pytest.raises(AttributeError):
        lora.merge(qlora.inject(tiny_model(), CONFIG))
    with pytest.raises(ValueError, match="model: .*q_proj"):
        qlora.attach(quantized, QloraConfig(data_type="fp4"))
    assert qlora.attach(quantized, CONFIG)
    for wrong in ({"data_type": "nf3"}, {"block_size": 48}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QloraConfig(**wrong)
