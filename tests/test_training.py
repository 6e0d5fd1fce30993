"""One trainer: the loss against independent ones, packing, and what a run must guarantee."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_same, example

from labkit import training
from labkit.batching import Example, Shuffled, pack
from labkit.logprobs import keeps_apart
from labkit.training import TrainConfig, fit, mean_loss, sft_loss

QUICK = dict(precision="fp32", batch_size=8, learning_rate=3e-3)


def copies(count, seed=0, longest=8):
    """<user> words <assistant> words <EOS>: the response copies the prompt."""
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        words = random.integers(10, 40, size=random.integers(2, longest)).tolist()
        found.append(example([3, *words, 4, *words, 1], len(words) + 2))
    return found


def sft(model, examples, *, progress=False, loss=sft_loss, **settings):
    given = {k: v for k, v in settings.items() if k not in TrainConfig.__dataclass_fields__}
    config = TrainConfig(**(QUICK | {k: v for k, v in settings.items() if k not in given}))
    return fit(model, examples, loss, config, progress=progress, **given)


def reference(model, examples):
    """Mean of the model's own loss (labels=), one unpadded example at a time."""
    total, count = 0.0, 0
    for ids, mask in examples:
        ids, mask = torch.tensor(ids[None]), torch.tensor(mask[None])
        n = int(mask[:, 1:].sum())
        total = total + model(ids, labels=ids.masked_fill(mask == 0, -100)).loss * n
        count += n
    return total / count


def with_lora(model, **options):
    from peft import LoraConfig, get_peft_model

    options = dict(r=4, target_modules="all-linear", init_lora_weights=False) | options
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(**options)).eval()


def tiny_moe(coefficient=0.5, kind="Mixtral", **options):
    import transformers as tf

    torch.manual_seed(0)
    shape = dict(vocab_size=448, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2)
    shape |= dict(num_local_experts=4, pad_token_id=0, max_position_embeddings=256)
    shape["sliding_window"] = None
    shape |= dict(router_aux_loss_coef=coefficient, aux_loss_coef=coefficient) | options
    config = getattr(tf, f"{kind}Config")(**shape)
    return tf.AutoModelForCausalLM.from_config(config).eval()


# The loss


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_are_the_models_own(arch, lora, packing, tiny_model):
    model, examples = tiny_model(arch), copies(6)
    model = with_lora(model) if lora else model
    loss, _ = sft_loss(model, pack(examples, packing))
    assert_same(model, loss, reference(model, examples))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_are_trls(arch, lora, tiny_model, tiny_tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = with_lora(tiny_model(arch)) if lora else tiny_model(arch)
    examples = copies(6)
    loss, _ = sft_loss(model, pack(examples))
    options = dict(use_cpu=True, bf16=False, report_to="none", completion_only_loss=True)
    args = SFTConfig(str(tmp_path), **options)
    ids, masks = zip(*examples, strict=True)
    dataset = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tiny_tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    assert_same(model, loss, trainer.compute_loss(model, batch))


def test_loss_of_a_sliding_window_and_of_capped_logits():
    """What the model does after its head (Gemma 2) or to its attention (Mistral) is kept."""
    from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

    shape = dict(vocab_size=448, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    shape |= dict(head_dim=16, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    shape |= dict(initializer_range=0.3, pad_token_id=0, max_position_embeddings=64)
    for config in (Gemma2Config(final_logit_softcapping=2.0, **shape), MistralConfig(**shape)):
        model, examples = AutoModelForCausalLM.from_config(config).eval(), copies(6)
        for packing in (False, True):
            loss = sft_loss(model, pack(examples, packing))[0].item()
            assert loss == pytest.approx(reference(model, examples).item(), rel=1e-5)


def test_loss_with_a_soft_prompt(tiny_model):
    """Virtual tokens in front shift the hidden states; the loss must still find its own."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for kind in (PromptTuningConfig, PrefixTuningConfig):
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=5)
        model = get_peft_model(tiny_model(), config).eval()
        loss, _ = sft_loss(model, pack(copies(6), packing=False))
        assert loss.item() == pytest.approx(reference(model, copies(6)).item(), rel=1e-5)
        assert not keeps_apart(model)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GraniteMoe", "JetMoe"])
def test_a_mixture_of_experts_adds_its_routers_loss_as_transformers_does(kind):
    """Ragged examples: padding is no token that a router balances."""
    model, examples = tiny_moe(kind=kind), copies(5)
    width = max(len(ids) for ids, _ in examples)
    ids, mask, attention = (torch.zeros(5, width, dtype=torch.long) for _ in range(3))
    for i, one in enumerate(examples):
        n = len(one.ids)
        ids[i, :n], mask[i, :n], attention[i, :n] = *map(torch.tensor, one), 1
    inputs = dict(attention_mask=attention, labels=ids.masked_fill(mask == 0, -100))
    for packing in (False, True):
        loss, metrics = sft_loss(model, pack(examples, packing))
        assert_same(model, loss, model(ids, output_router_logits=True, **inputs).loss)
        assert metrics["router_loss"] > 0


# Batches


def test_packed_sequences_hold_each_example_once_and_pad_little():
    random = np.random.default_rng(0)
    for _ in range(20):
        examples = [example(random.integers(5, 400, n), 2) for n in random.integers(5, 129, 40)]
        batch = pack(examples)
        flat, places = batch.input_ids.ravel(), zip(batch.starts, batch.ends, strict=True)
        assert [flat[s : e + 1].tolist() for s, e in places] == [e.ids.tolist() for e in examples]
        filled = batch.mask.sum(1).tolist()
        assert sum(filled) == batch.tokens == sum(len(e.ids) for e in examples)
        # No two sequences could be one: otherwise the later one's examples had fitted earlier.
        width = batch.input_ids.shape[1]
        assert all(a + b > width for a, b in itertools.combinations(filled, 2))
        targets = batch.in_order(batch.targets).tolist()
        assert targets == [token for e in examples for token in e.ids[2:]]


def test_positions_stay_within_the_context_and_are_given_only_where_needed():
    """256 is GPT-2's context here: the padding behind a short example must not run past it. Where
    nothing shares a sequence, they would bring a mask, and with it a slower attention."""
    batch = pack([example([5] * n, 1) for n in (256, 4, 4)])
    assert batch.input_ids.shape[1] >= 256 and int(batch.position_ids.max()) == 255
    batch = pack([example([5] * 200, 1), example([5] * 190, 1)])
    assert batch.position_ids is None and batch.input_ids.shape == (2, 200)


def test_the_order_holds_each_example_once_and_follows_seed_and_epoch():
    sampler = Shuffled(1003, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and list(Shuffled(1003, seed=0)) == first
    assert list(Shuffled(1003, seed=1)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(1003))


def test_models_that_mix_packed_examples_are_found_out(tiny_model, arch):
    """Also where every example is long, in bfloat16, and among experts, who share products."""
    from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, OPTConfig

    assert keeps_apart(tiny_model(arch)) and keeps_apart(tiny_model(arch).bfloat16())
    if arch != "llama":
        return
    flash = tiny_model(arch)
    flash.config._attn_implementation = "flash_attention_2"
    assert not keeps_apart(flash)
    wide = tiny_moe(hidden_size=256)
    assert keeps_apart(wide) and keeps_apart(wide.bfloat16())
    small = dict(vocab_size=448, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    opt = OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=512)
    for config in (opt, BloomConfig(**small), FalconConfig(**small, alibi=True)):
        model = AutoModelForCausalLM.from_config(config).eval()
        assert not keeps_apart(model) and not keeps_apart(model.bfloat16())
    with pytest.raises(ValueError, match="packing"):
        sft(model.float(), copies(4), packing=True)
    long = [example(np.random.default_rng(i).integers(5, 400, 150), 20) for i in range(4)]
    result = sft(model.float(), long, max_steps=1, batch_size=4, warmup_ratio=0.5)
    # The first step has a learning rate of 0.
    assert result.loss == pytest.approx(mean_loss(model, long, sft_loss), rel=1e-3)


# A run


def test_training_learns_to_copy_and_leaves_the_model_as_it_was(tiny_model):
    model, examples = tiny_model(), copies(160, longest=4)
    names = set(model.__dict__)
    result = sft(model, examples, epochs=10, eval_examples=examples)
    assert result.loss < 0.5 * math.log(448) and result.eval_loss < 0.5 * math.log(448)
    assert reference(model, examples).item() == pytest.approx(result.eval_loss, rel=1e-4)
    assert set(model.__dict__) == names and model.config._attn_implementation == "sdpa"
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_padding_is_not_counted_and_every_example_is_seen(tiny_model):
    examples = copies(37)
    result = sft(tiny_model(), examples, epochs=2)
    assert result.tokens == 2 * sum(len(e.ids) for e in examples)
    assert result.steps == 2 * math.ceil(37 / 8)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_memory_bytes > 2**20


def test_accumulated_steps_equal_large_batches(tiny_model):
    """One step over batches of 4 has the gradient of one batch of 16, however long each is, and
    also where the last one is short (14 examples: 4, 4, 4, 2)."""
    for count in (16, 14):
        found = []
        for batch_size, accumulation in ((count, 1), (4, 4)):
            model, options = tiny_model(), dict(warmup_ratio=0.0, epochs=2, batch_size=batch_size)
            options["gradient_accumulation"] = accumulation
            result = sft(model, copies(count), **options)
            found.append((result.loss, model.lm_head.weight.detach()))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
        torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-3)


def test_same_seed_same_losses_and_another_seed_others(tiny_model):
    def losses(seed):
        return [e["loss"] for e in sft(tiny_model(), copies(64), seed=seed, max_steps=6).history]

    assert losses(0) == losses(0) != losses(1)


class Killed(Exception):
    pass


def interrupted(model, examples, folder, at, **settings):
    def kill(metrics, step):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        sft(model, examples, output_dir=folder, log=kill, **settings)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_reaches_what_the_uninterrupted_run_reaches(tiny_model, tmp_path, lora):
    def fresh(seed=0):
        return with_lora(tiny_model(seed=seed)) if lora else tiny_model(seed=seed)

    examples, settings, whole = copies(40), dict(epochs=3, save_steps=4), fresh()
    full = sft(whole, examples, output_dir=tmp_path / "a", **settings)
    interrupted(fresh(), examples, tmp_path / "b", 11, **settings)
    (tmp_path / "b" / "checkpoint-11").mkdir()  # one whose writing was cut short
    model = fresh() if lora else fresh(seed=5)
    rest = sft(model, examples, resume=str(tmp_path / "b"), output_dir=tmp_path / "c", **settings)
    assert [e["step"] for e in rest.history] == [e["step"] for e in full.history]
    assert [e["loss"] for e in rest.history] == [e["loss"] for e in full.history]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rest.tokens < full.tokens == 3 * sum(len(e.ids) for e in examples)
    assert not list(tmp_path.glob("**/pytorch_model*"))


def test_a_checkpoint_of_another_run_is_refused_by_name(tiny_model, tmp_path):
    settings = dict(output_dir=tmp_path, epochs=1, save_steps=2)
    sft(with_lora(tiny_model()), copies(40), **settings)
    for named, change in {
        "learning_rate": {"learning_rate": 1e-4},
        "batch_size": {"batch_size": 4},
        "seed": {"seed": 3},
        "examples": {"examples": copies(40, seed=9)},
        "loss": {"loss": lambda model, batch: sft_loss(model, batch)},
        "frozen weights": {"model": 7},
        "lora_alpha": {"lora": {"lora_alpha": 16}},
        "lora_dropout": {"lora": {"lora_dropout": 0.5}},
        "trained weights": {"lora": {"target_modules": ["q_proj"]}},
    }.items():
        examples = change.pop("examples", copies(40))
        model = with_lora(tiny_model(seed=change.pop("model", 0)), **change.pop("lora", {}))
        with pytest.raises(ValueError, match=f"made with {named}"):
            sft(model, examples, resume=str(tmp_path), **settings | change)
    with pytest.raises(ValueError, match="output_dir"):
        sft(model, copies(40), **settings)
    with pytest.raises(FileNotFoundError, match="resume"):
        sft(model, copies(40), resume=str(tmp_path / "none"), **settings)


def test_a_run_that_was_refused_does_not_count_as_trained(tiny_model, tmp_path, monkeypatch):
    model, cells = tiny_model(), iter(range(3))
    monkeypatch.setattr(training, "cell", lambda: next(cells))
    with pytest.raises(FileNotFoundError):
        sft(model, copies(8), max_steps=1, resume=str(tmp_path))
    assert sft(model, copies(8), max_steps=1).steps == 1
    with pytest.raises(ValueError, match="trained already"):
        sft(model, copies(8), max_steps=1)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tiny_model, tmp_path):
    model, seen = tiny_model(), []

    def poison(metrics, step):
        seen.append(step)
        if step == 5:
            with torch.no_grad():
                model.lm_head.weight[0] = float("nan")

    with pytest.raises(FloatingPointError, match="step 6"):
        sft(model, copies(64), max_steps=10, save_steps=2, output_dir=tmp_path, log=poison)
    assert seen[-1] == 5
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_bfloat16_is_used_each_time_and_gone_afterwards(tiny_model):
    model, kinds = tiny_model(), []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: kinds.append(out.dtype))
    for _ in range(2):
        sft(model, copies(16), max_steps=2, packing=False, precision="bf16")
    assert kinds == [torch.bfloat16] * 4
    model(torch.tensor([[3, 5]]))
    assert kinds[-1] == torch.float32 and model.lm_head.weight.dtype == torch.float32
    handle.remove()


def test_trained_weights_of_half_precision_are_warned_of(tiny_model, caplog):
    sft(tiny_model().bfloat16(), copies(8), max_steps=1)
    assert "half precision" in caplog.text
    caplog.clear()
    sft(tiny_model(), copies(8), max_steps=1)
    assert "half precision" not in caplog.text


def test_compiled_training_equals_plain_training(tiny_model, monkeypatch):
    """With a backend that only captures the graphs, so that no compiler has to run."""
    plain, captured, losses = torch.nn.Module.compile, [], []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    def compile(module, **options):
        plain(module, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    for compiled in (False, True):
        model = tiny_model()
        losses.append(sft(model, copies(64), max_steps=4, compile=compiled).loss)
        assert model.model._compiled_call_impl is None
    assert captured and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_log_gets_each_entry(tiny_model, capsys):
    logged, options = [], dict(max_steps=3, eval_examples=copies(8, seed=1), progress=True)
    options["log"] = lambda metrics, step: logged.append((step, metrics))
    result = sft(tiny_model(), copies(16), **options)
    assert [step for step, _ in logged] == [1, 2, 3, 3]
    assert logged[0][1].keys() == {"loss", "tokens_per_second", "learning_rate"}
    assert logged[-1][1] == {"eval_loss": result.eval_loss}
    assert "step 3/3" in capsys.readouterr().err


def test_mean_loss_does_not_depend_on_batches(tiny_model):
    model, examples = tiny_model().train(), copies(9)
    found = [mean_loss(model, examples, sft_loss, batch_size=n) for n in (1, 4, 9)]
    assert found == pytest.approx([reference(model.eval(), examples).item()] * 3, rel=1e-5)


SETTINGS = dict(learning_rate=0.0, epochs=0.0, batch_size=0, max_steps=0, seed=True)
SETTINGS |= dict(warmup_ratio=1.5, schedule="cosin", compile="yes", optimizer="sdg")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_work_is_named(name):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: SETTINGS[name]})


@pytest.mark.parametrize(
    ("examples", "named"),
    [
        ([], "examples"),
        ([example([5, 6, 7], 1), example([5, 6, 7], 3)], "example 2"),
        ([Example(np.array([5, 6, 7]), np.array([1, 1]))], "example 1"),
        ([example([5, 448], 1)], "example 1"),
        ([example([5] * 257, 1)], "example 1"),
    ],
    ids=["none", "no response", "lengths", "vocabulary", "context"],
)
def test_examples_that_cannot_work_are_named(tiny_model, examples, named):
    with pytest.raises(ValueError, match=named):
        sft(tiny_model(), examples)
    with pytest.raises(ValueError, match="save_steps"):
        sft(tiny_model(), copies(2), save_steps=5)
