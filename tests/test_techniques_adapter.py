"""The bottleneck adapter: truths, a computation by hand beside it, and its life inside PEFT."""

import inspect
import shutil
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from labkit import models, training
from labkit.generate import generate
from labkit.techniques import adapter
from labkit.techniques.adapter import AdapterConfig, Bottleneck, BottleneckConfig

IDS = torch.arange(5, 29).reshape(2, 12)
SMALL = AdapterConfig(bottleneck=6)
LLAMA_2_7B = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                  num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(params=["houlsby", "pfeiffer"])
def placement(request):
    return request.param


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomize(model, seed=1):
    """Adapters as after training: U and c are no longer zero."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def bottlenecks(model, name="default"):
    """The adapters called `name`, in the order of the layers."""
    found = [m.bottleneck for m in model.modules() if isinstance(m, adapter.AdaptedLayer)]
    return [layer[name] for layer in found if name in layer]


def rows(count=6):
    """Prompt and response of different lengths, as `data.encode` gives them."""
    columns = {"input_ids": [], "completion_mask": []}
    for i in range(count):
        words = list(range(10, 13 + i))
        columns["input_ids"].append([3, *words, 4, *words, 1])
        columns["completion_mask"].append([0] * (len(words) + 2) + [1] * (len(words) + 1))
    return Dataset.from_dict(columns)


def test_worked_example():
    """D = (1, -1), b = 1/2, U = (2, 0)ᵀ, c = (0, 1), f = relu.

    h = (3, 1): D h + b = 2.5, so h' = (3, 1) + (5, 0) + (0, 1) = (8, 2).
    h = (1, 3): D h + b = -1.5, which relu makes 0, so h' = (1, 3) + (0, 1) = (1, 4).
    """
    layer = Bottleneck(2, AdapterConfig(bottleneck=1))
    with torch.no_grad():
        for name, value in {"D": [[1.0, -1.0]], "b": [0.5], "U": [[2.0], [0.0]], "c": [0.0, 1.0]}.items():  # fmt: skip
            getattr(layer, name).copy_(torch.tensor(value))
    assert layer(torch.tensor([[3.0, 1.0], [1.0, 3.0]])).tolist() == [[8.0, 2.0], [1.0, 4.0]]


def test_starts_as_the_identity(tiny_model, arch, placement):
    before = logits(tiny_model(arch))
    tuned = adapter.attach(tiny_model(arch), AdapterConfig(6, placement)).eval()
    assert torch.equal(logits(tuned), before)


def test_a_random_up_projection_changes_the_model(tiny_model, arch):
    """The chapter's adapter: both layers as nn.Linear makes them."""
    before = logits(tiny_model(arch))
    tuned = adapter.attach(tiny_model(arch), SMALL).eval()
    for one in bottlenecks(tuned):
        fresh = nn.Linear(6, 64)
        one.U.data.copy_(fresh.weight)
        one.c.data.copy_(fresh.bias)
    assert (logits(tuned) - before).abs().max() > 0.1


def test_only_adapters_train_and_at_first_only_u(tiny_model, arch, placement):
    """dL/dD passes through U, which is zero: the first step moves U and c alone."""
    tuned = adapter.attach(tiny_model(arch), AdapterConfig(6, placement))
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert len(trained) == 4 * len(bottlenecks(tuned))
    assert {id(p) for one in bottlenecks(tuned) for p in one.parameters()} == set(map(id, trained))
    assert all(p.grad is None for p in tuned.parameters() if not p.requires_grad)
    for one in bottlenecks(tuned):
        assert not one.D.grad.any() and not one.b.grad.any()
        assert one.U.grad.any() and one.c.grad.any()


def test_the_formula_counts_what_trains(tiny_model, arch, placement):
    config = AdapterConfig(6, placement)
    counts = models.parameter_counts(adapter.attach(tiny_model(arch), config))
    adapters = {"houlsby": 4, "pfeiffer": 2}[placement]
    assert counts.trainable == adapters * (2 * 64 * 6 + 64 + 6)
    assert adapter.parameters(64, 2, config) == counts.trainable


def test_counts_of_llama_2_7b():
    counts = models.parameter_counts(
        adapter.attach(models.meta_model(LLAMA_2_7B), AdapterConfig(64))
    )
    assert counts.trainable == 64 * (2 * 4096 * 64 + 4096 + 64) == 33_820_672
    assert adapter.parameters(4096, 32, AdapterConfig(64)) == counts.trainable


def outlets(model, arch, placement):
    """The linear layers whose outputs the sublayers give, named here by hand."""
    blocks = model.transformer.h if arch == "gpt2" else model.model.layers
    names = ["attn.c_proj", "mlp.c_proj"] if arch == "gpt2" else ["self_attn.o_proj", "mlp.down_proj"]  # fmt: skip
    wanted = names if placement == "houlsby" else names[1:]
    return [block.get_submodule(name) for block in blocks for name in wanted]


def by_hand(model, arch, placement, weights):
    """A frozen model with the equation written into hooks; `weights` are leaves (D, b, U, c)."""
    model.requires_grad_(False)
    for layer, (d, b, u, c) in zip(outlets(model, arch, placement), weights, strict=True):

        def hook(module, inputs, h, d=d, b=b, u=u, c=c):
            inner = (torch.einsum("btk,mk->btm", h, d) + b).clamp(min=0)
            return h + torch.einsum("btm,km->btk", inner, u) + c

        layer.register_forward_hook(hook)
    return model


def test_parity_with_hooks_on_a_frozen_model(tiny_model, arch, placement):
    tuned = randomize(adapter.attach(tiny_model(arch), AdapterConfig(6, placement)).eval())
    weights = [[getattr(one, n).detach().clone().requires_grad_() for n in ("D", "b", "U", "c")]
               for one in bottlenecks(tuned)]  # fmt: skip
    hand = by_hand(tiny_model(arch), arch, placement, weights)
    mine, other = (m(input_ids=IDS, labels=IDS) for m in (tuned, hand))
    assert (mine.logits - logits(tiny_model(arch))).abs().max() > 0.05
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, other.loss, atol=1e-6, rtol=1e-6)
    mine.loss.backward()
    other.loss.backward()
    for one, (d, b, u, c) in zip(bottlenecks(tuned), weights, strict=True):
        for parameter, twin in zip((one.D, one.b, one.U, one.c), (d, b, u, c), strict=True):
            assert twin.grad.any()
            torch.testing.assert_close(parameter.grad, twin.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "f"), [("relu", torch.relu), ("gelu", F.gelu), ("silu", F.silu)])
def test_activations(name, f):
    layer = randomize(Bottleneck(8, AdapterConfig(4, activation=name)))
    h = torch.randn(3, 8)
    expected = h + f(h @ layer.D.T + layer.b) @ layer.U.T + layer.c
    torch.testing.assert_close(layer(h), expected)


def test_disabled_adapters_leave_the_base_model(tiny_model, arch):
    before = logits(tiny_model(arch))
    tuned = randomize(adapter.attach(tiny_model(arch), SMALL).eval())
    after = logits(tuned)
    assert not torch.equal(after, before)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    assert torch.equal(logits(tuned), after)
    assert torch.equal(logits(tuned.unload()), before)


def test_adapters_are_switched(tiny_model, arch):
    """Two adapters of different width and place; the first trains until the second is chosen."""
    tuned = randomize(adapter.attach(tiny_model(arch), SMALL).eval())
    first = logits(tuned)
    adapter.attach(tuned, AdapterConfig(3, "pfeiffer"), name="second").eval()
    assert torch.equal(logits(tuned), first)
    assert all(p.requires_grad == (".default." in n) for n, p in tuned.named_parameters()
               if ".bottleneck." in n)  # fmt: skip
    tuned.set_adapter("second")
    assert torch.equal(logits(tuned), logits(tiny_model(arch)))
    assert all(p.requires_grad == (".second." in n) for n, p in tuned.named_parameters())
    second = logits(randomize(tuned, seed=2))
    assert not torch.equal(second, first)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    with pytest.raises(ValueError, match="name: expected a new adapter's name, got 'second'"):
        adapter.attach(tuned, SMALL, name="second")


def test_a_saved_adapter_comes_back_under_any_name(tiny_model, tiny_tokenizer, tmp_path, arch):
    config = AdapterConfig(6, "pfeiffer", "gelu")
    tuned = randomize(adapter.attach(tiny_model(arch), config).eval())
    folder = models.save(tuned, tiny_tokenizer, tmp_path / "adapter")
    assert torch.equal(logits(adapter.restore(tiny_model(arch), folder)), logits(tuned))
    other = adapter.attach(tiny_model(arch), SMALL, name="mine").eval()
    other.load_adapter(folder, adapter_name="theirs")
    other.set_adapter("theirs")
    assert torch.equal(logits(other), logits(tuned))
    with pytest.raises(FileNotFoundError, match="folder: expected a saved adapter"):
        adapter.restore(tiny_model(arch), tmp_path / "nowhere")


def test_a_fresh_process_loads_it(tiny_model, tiny_tokenizer, tiny_folder, tmp_path):
    """With this module imported; without it PEFT does not know the method, and names it."""
    folder = tiny_folder()
    tuned = randomize(adapter.attach(tiny_model(), SMALL).eval())
    models.save(tuned, tiny_tokenizer, tmp_path / "adapter")
    torch.save(logits(tuned), tmp_path / "expected.pt")
    code = f"""
        import torch
        from peft import PeftConfig, PeftModel
        try:
            PeftConfig.from_pretrained({str(tmp_path / "adapter")!r})
        except KeyError as error:
            assert error.args == ("LABKIT_ADAPTER",), error
        else:
            raise AssertionError("PEFT knew the method without this module")
        import labkit.techniques.adapter
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        base = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
        with torch.no_grad():
            found = model(input_ids=torch.arange(5, 29).reshape(2, 12)).logits
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_generation_through_the_cache(tiny_model, tiny_tokenizer):
    tuned = randomize(adapter.attach(tiny_model(), SMALL)).eval()
    prompts = ["Mila lives in the", "Otto"]
    answers = generate(tuned, tiny_tokenizer, prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tiny_tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                following = tuned(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            if following.item() == tiny_tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following], dim=1)
        assert answer == tiny_tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_training_moves_the_adapters_only(tiny_model, tiny_tokenizer):
    tuned = adapter.attach(tiny_model(), SMALL)
    settings = training.TrainConfig(learning_rate=2e-2, max_steps=20, batch_size=6)
    result = training.sft(tuned, tiny_tokenizer, rows(), settings, progress=False)
    assert result.loss < 0.6 * result.history[0]["loss"]
    origin = logits(tiny_model())
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned.eval()), origin)


def test_a_resumed_training_ends_where_the_whole_one_does(tiny_model, tiny_tokenizer, tmp_path):
    settings = dict(learning_rate=2e-2, max_steps=6, batch_size=3)
    found = []
    for extra in (dict(save_steps=4), dict(resume=str(tmp_path))):
        torch.manual_seed(len(found))  # the second starts elsewhere
        tuned = adapter.attach(tiny_model(), SMALL)
        config = training.TrainConfig(**settings, **extra)
        training.sft(tuned, tiny_tokenizer, rows(), config, output_dir=tmp_path, progress=False)
        found.append(logits(tuned.eval()))
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)  # go on from the fourth step
    assert torch.equal(*found)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, arch):
    tuned = randomize(adapter.attach(tiny_model(arch), SMALL)).train()
    for module in tuned.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for enable in (False, True):
        if enable:
            tuned.activation_checkpointing_enable()
        tuned.zero_grad()
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        found.append([one.D.grad.clone() for one in bottlenecks(tuned)])
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.any()
        torch.testing.assert_close(plain, checkpointed)


def trl_arguments(kind, folder):
    return kind(str(folder), use_cpu=True, bf16=False, report_to="none", max_steps=2,
                learning_rate=1e-2, per_device_train_batch_size=2, disable_tqdm=True)  # fmt: skip


def test_trls_supervised_trainer_takes_the_config(tiny_model, tiny_tokenizer, tmp_path):
    from trl import SFTConfig, SFTTrainer

    args = trl_arguments(SFTConfig, tmp_path)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=rows(), processing_class=tiny_tokenizer,
                         peft_config=BottleneckConfig(bottleneck=6, task_type="CAUSAL_LM"))  # fmt: skip
    trainer.train()
    assert len(bottlenecks(trainer.model)) == 4 and bottlenecks(trainer.model)[0].U.any()


def test_trls_preference_trainer_has_its_reference(tiny_model, tiny_tokenizer, tmp_path):
    """At the start policy and reference agree, so the loss is log 2; the reference then stays."""
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_list([{"prompt": "Otto", "chosen": " bakes", "rejected": " sings"}] * 4)
    tuned = randomize(adapter.attach(tiny_model(), SMALL))
    before = [one.U.detach().clone() for one in bottlenecks(tuned)]
    args = trl_arguments(DPOConfig, tmp_path)
    args.logging_steps = 1
    trainer = DPOTrainer(tuned, args=args, train_dataset=pairs, processing_class=tiny_tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    for kept, one, moved in zip(before, bottlenecks(tuned, "ref"), bottlenecks(tuned), strict=True):
        assert torch.equal(kept, one.U) and not torch.equal(kept, moved.U)


@pytest.fixture
def four_bit(tiny_folder):
    """A folder's model in NF4; the packed weights stay as they are (see STACK.md's trap)."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                  bnb_4bit_compute_dtype=torch.float32)  # fmt: skip

    def load(arch="llama"):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_folder(arch), quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        return model.eval()

    return load


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_four_bit_base(four_bit, tiny_tokenizer, tmp_path, family):
    """Against the same model with its weights taken out of four bits, by hand."""
    import bitsandbytes as bnb

    base = four_bit(family)
    before = logits(base)
    tuned = adapter.attach(base, SMALL).eval()
    assert torch.equal(logits(tuned), before)
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    randomize(tuned)
    plain = four_bit(family)
    for name, module in list(plain.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            linear.weight.data, linear.bias = weight.float(), module.bias
            plain.set_submodule(name, linear)
    weights = [[getattr(one, n).detach().clone().requires_grad_() for n in ("D", "b", "U", "c")]
               for one in bottlenecks(tuned)]  # fmt: skip
    hand = by_hand(plain, family, "houlsby", weights)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (tuned, hand)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for one, twin in zip(bottlenecks(tuned), weights, strict=True):
        torch.testing.assert_close(one.D.grad, twin[0].grad, atol=1e-5, rtol=1e-3)
    settings = training.TrainConfig(learning_rate=2e-2, max_steps=12, batch_size=6)
    result = training.sft(tuned, tiny_tokenizer, rows(), settings, progress=False)
    assert result.loss < result.history[0]["loss"]
    folder = models.save(tuned, tiny_tokenizer, tmp_path / "adapter")
    for one in bottlenecks(tuned):
        one.float()  # TRL's trainers put adapters into bfloat16 over a quantized base
    again = adapter.restore(four_bit(family), folder)
    assert all(p.dtype == torch.float32 for one in bottlenecks(again) for p in one.parameters())
    torch.testing.assert_close(logits(again), logits(tuned.eval()))


def test_half_precision_keeps_small_updates(tiny_model):
    model = tiny_model().bfloat16()
    tuned = adapter.attach(model, SMALL)
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    assert logits(tuned).dtype == torch.bfloat16


def test_merging_is_refused(tiny_model):
    tuned = adapter.attach(tiny_model(), SMALL)
    for merge in (tuned.merge_and_unload, tuned.merge_adapter):
        with pytest.raises(NotImplementedError, match="cannot be merged: its activation"):
            merge()


@pytest.mark.parametrize(
    ("name", "value"),
    [("bottleneck", 0), ("bottleneck", -4), ("bottleneck", 2.5), ("bottleneck", True),
     ("placement", "after"), ("activation", "step")],
)  # fmt: skip
def test_settings_that_cannot_work(name, value):
    for config in (AdapterConfig, BottleneckConfig):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            config(**{name: value})


def test_refusals(tiny_model):
    from transformers import AutoModelForCausalLM, OPTConfig

    shape = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2)
    other = AutoModelForCausalLM.from_config(OPTConfig(vocab_size=64, num_attention_heads=2, **shape))  # fmt: skip
    with pytest.raises(ValueError, match="mlp of OPTDecoderLayer: expected a module called mlp.*fc1"):  # fmt: skip
        adapter.attach(other, SMALL)
    lora = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="got one with LORA"):
        adapter.attach(lora, SMALL)
    with pytest.raises(ValueError, match="got one with injected ones"):
        adapter.attach(adapter.attach(tiny_model(), SMALL).get_base_model(), SMALL)


def test_a_new_peft_without_its_tables_is_named(monkeypatch):
    monkeypatch.delattr(mapping, "PEFT_TYPE_TO_TUNER_MAPPING")
    with pytest.raises(ImportError, match="expected the table PEFT_TYPE_TO_TUNER_MAPPING"):
        adapter._register()


TUNER, LAYER = BaseTuner, BaseTunerLayer
INSIDE = [
    (TUNER, "_prepare_adapter_config", ["self", "peft_config", "model_config"]),
    (TUNER, "_prepare_model", ["self", "peft_config", "model"]),
    (TUNER, "_create_and_replace",
     ["self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key",
      "parameter_name"]),
    (TUNER, "_replace_module", ["self", "parent", "child_name", "new_module", "child"]),
    (LAYER, "merge", ["self", "safe_merge", "adapter_names"]),
    (LAYER, "adapter_layer_names", None),
    (LAYER, "active_adapters", None),
    (LAYER, "disable_adapters", None),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "arguments"), INSIDE)
def test_what_peft_keeps_inside(owner, name, arguments):
    """Every part of PEFT without a promise that the room builds on; a red line names the part."""
    where = f"{owner.__name__}.{name} of peft {peft.__version__}"
    fix = "adjust the last section of labkit/techniques/adapter.py, or stay with peft 0.21.2"
    assert hasattr(owner, name), f"{where} is gone: {fix}"
    if arguments:
        found = list(inspect.signature(getattr(owner, name)).parameters)
        assert found == arguments, f"{where} takes {found}, not {arguments}: {fix}"


def test_peft_finds_methods_by_plain_strings():
    fix = "adjust _register in labkit/techniques/adapter.py"
    for kind in ("CONFIG", "TUNER", "PREFIX"):
        table = getattr(mapping, f"PEFT_TYPE_TO_{kind}_MAPPING")
        assert "LORA" in table, f"PEFT_TYPE_TO_{kind}_MAPPING is not keyed by strings: {fix}"
        assert adapter.METHOD in table
    taken = {str(kind.value) for kind in peft.PeftType}
    assert adapter.METHOD not in taken, f"PEFT has its own {adapter.METHOD}: {fix}"
