"""The planner: exact counts by hand, and peaks of real steps against the allocator's record."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from labkit import memory, models, training
from labkit.batching import Example
from labkit.simulation import OVERHEAD, PARTS, Setting, simulate
from labkit.techniques import adapter, full, lora, ppo, prefix, qlora, reward, rollout

PARAMETERS = 6_738_415_616  # of LLaMA 7B
ATTACH = {
    "full": (full, full.FullConfig()),
    "lora": (lora, lora.LoraConfig()),
    "qlora": (qlora, qlora.QloraConfig()),
    "prefix": (prefix, prefix.PrefixConfig(length=20)),
    "adapter": (adapter, adapter.AdapterConfig(bottleneck=64)),
}


@pytest.fixture(scope="module")
def small():
    """Four narrow blocks of LLaMA: enough to be extrapolated."""
    shape = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4)
    return memory.plan(memory.llama("7B") | shape | {"vocab_size": 200}, "full").config


def total(config, **settings):
    return sum(simulate(config, Setting(**settings)).values())


def test_full_fine_tuning_takes_16_bytes_a_parameter():
    """float32: 4 for a weight, 4 for its gradient, 8 for AdamW's two moments."""
    planned = memory.plan(memory.llama("7B"), "full", device="cuda")
    kept = sum(planned.parts[part] for part in ("weights", "gradients", "optimizer states"))
    assert kept == pytest.approx(16 * PARAMETERS, rel=0.02)
    assert planned.total > 16 * PARAMETERS
    assert models.parameter_counts(models.meta_model(planned.config)).total == PARAMETERS


def test_the_chapters_nine_numbers():
    """Within 5 % of a count by hand: full in float32, the others on a base in bfloat16, NF4."""
    by_hand = [108, 209, 1046, 14.5, 27.5, 135, 4.8, 8.55, 38]
    table = memory.chapter_table()
    assert [row["chapter, GB"] for row in table] == [28, 52, 260, 12, 20, 120, 6, 10, 48]
    for row, expected in zip(table, by_hand, strict=True):
        assert row["planned, GB"] - 0.6 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("technique", ["full", "qlora", "reward", "ppo"])
def test_blocks_that_are_alike_need_not_all_be_simulated(small, technique, monkeypatch):
    extrapolated = total(small, technique=technique, batch_size=2, sequence_length=40)
    monkeypatch.setattr("labkit.simulation._alike", lambda config: False)
    assert extrapolated == total(small, technique=technique, batch_size=2, sequence_length=40)


@pytest.mark.parametrize("technique", ["full", "lora", "ppo"])
@pytest.mark.parametrize(
    "more", [{"batch_size": 3}, {"sequence_length": 80}, {"gradient_accumulation": 2}]
)
def test_more_never_needs_less(small, technique, more):
    s = dict(technique=technique, device="cuda", batch_size=2, sequence_length=40)
    assert total(small, **s | more) >= total(small, **s)


@pytest.mark.parametrize("technique", ["full", "lora", "qlora"])
def test_checkpointing_and_shorter_responses_need_less(small, technique):
    s = dict(technique=technique, device="cuda", batch_size=4, sequence_length=100)
    assert total(small, **s, gradient_checkpointing=True) < total(small, **s)
    assert total(small, **s, response_share=0.2) < total(small, **s)


def test_optimizers(small):
    """In 8 bits a state has a byte, and each 256 a float32 scale: 2 · (1 + 4/256) = 2.03125."""
    states = {
        name: simulate(small, Setting("full", optimizer=name))["optimizer states"]
        for name in ("adamw_torch_fused", "paged_adamw_8bit", "paged_adamw_32bit", "sgd")
    }
    count = models.parameter_counts(models.meta_model(small)).total
    expected = [8, 2.03125, 8, 0]
    assert [n / count for n in states.values()] == pytest.approx(expected, rel=0.01)
    paged = memory.plan(small, "full", optimizer="paged_adamw_8bit", device="cuda")
    outside = paged.parts["optimizer states"] + paged.parts["runtime overhead"]
    assert paged.allocated == paged.total - outside  # the driver holds what is paged


def examples(count, length, share=1.0):
    ids = np.random.default_rng(0).integers(10, 400, size=(count, length))
    mask = np.arange(length) >= length - round((length - 1) * share)
    return [Example(row, mask.astype(np.int64)) for row in ids]


def peak(model, batch_size, length, share=1.0, **options):
    """The allocator's peak over two steps of labkit's trainer."""
    config = training.TrainConfig(batch_size=batch_size, max_steps=2, **options)
    with memory.measured(model) as found:
        training.fit(
            model,
            examples(4 * batch_size, length, share),
            training.sft_loss,
            config,
            progress=False,
        )
    return found.peak_bytes


@pytest.mark.parametrize(
    ("technique", "batch_size", "length", "checkpointing", "share"),
    [
        ("full", 1, 64, False, 1.0),
        ("full", 8, 64, False, 0.3),
        ("full", 4, 128, True, 0.3),
        ("lora", 8, 64, False, 1.0),
        ("lora", 2, 256, True, 0.3),
        ("qlora", 4, 64, True, 1.0),
        ("qlora", 8, 64, False, 1.0),
        ("prefix", 4, 128, False, 1.0),
        ("adapter", 4, 128, False, 1.0),
    ],
)
def test_the_embedded_model_takes_what_was_planned(
    technique, batch_size, length, checkpointing, share
):
    model, _ = models.load("tinytown")
    planned = memory.plan(
        model,
        technique,
        batch_size=batch_size,
        sequence_length=length,
        gradient_checkpointing=checkpointing,
        response_share=share,
        device="cpu",
    )
    module, config = ATTACH[technique]
    options = dict(share=share, gradient_checkpointing=checkpointing)
    took = peak(module.attach(model, config), batch_size, length, **options)
    assert planned.allocated == pytest.approx(took, rel=0.05)


def test_other_architectures_take_what_was_planned(tiny_model, arch):
    model = tiny_model(arch)
    planned = memory.plan(model, "full", batch_size=16, sequence_length=64, device="cpu")
    assert planned.setting.precision == "fp32"
    assert planned.allocated == pytest.approx(peak(model, 16, 64), rel=0.05)


def test_a_reward_model_takes_what_was_planned():
    model, tokenizer = models.load("tinytown")
    words = [" ".join(["Mila"] * n) for n in (38, 39, 40)]
    rows = [{"prompt": "Who?", "responses": words, "ranks": [2, 1, 0]}] * 16
    lengths = [len(tokenizer(f"Question: Who?\nAnswer: {text}")["input_ids"]) for text in words]
    planned = memory.plan(
        "tinytown", "reward", batch_size=4, ranked=3, sequence_length=max(lengths), device="cpu"
    )
    config = reward.RewardConfig(batch_size=4, max_steps=2)
    with memory.measured(model) as found:
        reward.train(model, tokenizer, rows, config, progress=False)
    assert planned.allocated == pytest.approx(found.peak_bytes, rel=0.05)


@pytest.mark.parametrize("rank", [0, 8])
def test_ppo_takes_what_was_planned(rank, monkeypatch):
    model, tokenizer = models.load("tinytown")
    model = lora.attach(model, lora.LoraConfig(rank=rank)) if rank else model
    sample, lengths = rollout.sample, []

    def of_one_length(model, ids, *args, **options):  # no response ends early
        sample(model, ids, *args, **options)
        lengths.append(len(ids[0]) + 32)
        return [[9] * 32 for _ in ids]

    monkeypatch.setattr(rollout, "sample", of_one_length)
    prompts = ["The river runs by the old mill and " * 6] * 16
    config = ppo.PPOConfig(steps=2, epochs=1, batch_size=16, minibatch_size=16, max_new_tokens=32)
    with memory.measured(model) as found:
        ppo.train(model, tokenizer, prompts, lambda p, r: [0.0] * 16, config, progress=False)
    setting = dict(batch_size=16, sequence_length=lengths[0], rank=rank, device="cpu")
    planned = memory.plan("tinytown", "ppo", response_share=32 / (lengths[0] - 1), **setting)
    assert planned.allocated == pytest.approx(found.peak_bytes, rel=0.05)


def test_measured_is_the_allocators_peak():
    model = nn.Linear(100, 100)  # 40,400 bytes
    assert memory.held(model) == 40_400
    with memory.measured(model) as found:
        kept = torch.empty(1_000_000)
        torch.empty(500_000)
        del kept
        torch.empty(750_000)
    assert found.peak_bytes == 40_400 + 6_000_000


def test_advice(small):
    s = dict(batch_size=64, sequence_length=128, device="cuda")
    planned = memory.plan(small, "full", **s)
    assert planned.fits is None or torch.cuda.is_available()
    tight = replace(planned, device_memory=planned.total - 1)
    assert tight.fits is False and tight.nearest.fits
    assert tight.nearest.setting == replace(tight.setting, batch_size=32, gradient_accumulation=2)
    assert "batch_size=32" in tight.advice
    assert replace(planned, device_memory=planned.parts[OVERHEAD]).nearest is None


def test_what_cannot_be_planned(small):
    for name, value in {"technique": "lorra", "optimizer": "adam", "batch_size": 0}.items():
        with pytest.raises(ValueError, match=name):
            memory.plan(small, **{name: value})
    with pytest.raises(ValueError, match="targets"):
        memory.plan(small, targets="wrong")
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        memory.plan(small, "prefix", gradient_checkpointing=True)
    with pytest.raises(OSError):
        memory.plan("nobody/nothing-here")


RLHF = dict(sft_rows=10, max_length=64, max_new_tokens=16, batch_size=64, minibatch_size=32)


def test_all_stages_of_rlhf(tiny_folder):
    values = RLHF | dict(model=str(tiny_folder("qwen2")), lora_rank=0, dtype="auto", device="cpu")
    plans = memory.plan_notebook("08_rlhf", values)
    assert [p.setting.technique for p in plans] == ["full", "reward", "ppo"]
    assert [p.setting.batch_size for p in plans] == [16, 16, 32]
    weights = plans[0].parts["weights"]  # policy and reference, the tuned model, the reward model
    assert plans[2].parts["weights"] == pytest.approx(4 * weights, rel=0.2)


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(tiny_folder, monkeypatch):
    values = RLHF | dict(model=str(tiny_folder("llama")), lora_rank=0, device="cpu")
    memory.check_fits("08_rlhf", values)
    monkeypatch.setattr(memory, "free", lambda device: 550.5e6)
    with pytest.raises(ValueError, match=r"(?s)08_rlhf.*full.*550.5 MB.*--force"):
        memory.check_fits("08_rlhf", values)
    memory.check_fits("00_start_here", values)
    memory.check_fits("02_lora", {"model": "tinytown"})
    with pytest.raises(ValueError, match="--force"):
        memory.check_fits("02_lora", values | {"model": "nobody/nothing-here"})


def test_a_plan_shows_itself(small):
    planned = memory.plan(small, "qlora", device="cuda", device_memory=4e9)
    for text in (repr(planned), planned._repr_html_()):
        assert all(part in text for part in (*PARTS, "total", "Needs"))
    axes = planned.figure().axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert max(tops) == pytest.approx(planned.total / 1e9)
    assert [line.get_ydata()[0] for line in axes.lines] == [4.0]
