"""The planner: exact counts by hand, and peaks of real steps against the allocator's record."""

import gc
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from labkit import cli, memory, models, training
from labkit.batching import Example
from labkit.simulation import PARTS, Setting, simulate
from labkit.techniques import adapter, full, lora, ppo, prefix, qlora, reward, rollout

SMALL = dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, vocab_size=200)
ATTACH = {
    "full": (full, full.FullConfig()),
    "lora": (lora, lora.LoraConfig()),
    "qlora": (qlora, qlora.QloraConfig()),
    "prefix": (prefix, prefix.PrefixConfig(length=20)),
    "adapter": (adapter, adapter.AdapterConfig(bottleneck=64)),
}


@cache
def small(blocks=2):
    return models.meta_model(memory.llama("7B") | SMALL | {"num_hidden_layers": blocks}).config


@cache
def parts(technique, blocks=2, depths=(2,), **settings):
    return simulate(small(blocks), Setting(technique, **settings), depths)


def total(*args, **settings):
    return sum(parts(*args, **settings).values())


def test_the_chapters_nine_numbers():
    """Within 5 % of a count by hand: full in float32 (16 bytes a parameter: weight, gradient, AdamW's
    two moments), the others on a base in bfloat16, NF4."""
    by_hand = [108, 209, 1046, 14.5, 27.5, 135, 4.8, 8.55, 38]
    table = memory.chapter_table()
    assert [row["chapter, GB"] for row in table] == [28, 52, 260, 12, 20, 120, 6, 10, 48]
    for row, expected in zip(table, by_hand, strict=True):
        assert row["planned, GB"] - 0.6 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("technique", ["full", "lora", "qlora"])
def test_the_plan_is_what_a_gpu_took(technique):
    """LLaMA-7B's shape on an H200, at the least and the most of each: `benchmarks/memory_gpu.py`."""
    file = Path(__file__).parents[1] / "benchmarks/results/memory_gpu.json"
    runs = [r for r in json.loads(file.read_text("utf-8"))["runs"] if r["technique"] == technique]
    names = ("batch_size", "sequence_length", "gradient_checkpointing", "optimizer")
    for run in (min(runs, key=lambda r: r["peak_bytes"]), max(runs, key=lambda r: r["peak_bytes"])):
        given = {name: run[name] for name in (*names, "response_share")}
        given |= {"precision": "bf16", "device": "cuda", "device_memory": 150e9}
        planned = memory.plan(memory.llama(run["model_size"]), technique, **given)
        assert planned.allocated == pytest.approx(run["peak_bytes"], rel=0.05)


@pytest.mark.parametrize("technique", ["full", "qlora", "reward", "ppo"])
def test_blocks_that_are_alike_need_not_all_be_simulated(technique):
    size = dict(blocks=5, batch_size=2, sequence_length=40)
    assert parts(technique, depths=(3, 2), **size) == parts(technique, depths=(5,), **size)


@pytest.mark.parametrize("technique", ["full", "lora", "qlora", "ppo"])
def test_more_never_needs_less(technique):
    s = dict(device="cuda", batch_size=4, sequence_length=100)
    for more in {"batch_size": 6}, {"sequence_length": 160}, {"gradient_accumulation": 2}:
        assert total(technique, **s | more) >= total(technique, **s)
    assert total(technique, **s, response_share=0.2) < total(technique, **s)
    if technique != "ppo":
        assert total(technique, **s, gradient_checkpointing=True) < total(technique, **s)


def test_optimizers():
    """In 8 bits a state has a byte, and each 256 a float32 scale: 2 · (1 + 4/256) = 2.03125."""
    names = ("adamw_torch_fused", "paged_adamw_8bit", "paged_adamw_32bit", "sgd")
    sizes = [parts("full", optimizer=name)["optimizer states"] for name in names]
    count = models.parameter_counts(models.meta_model(small())).total
    assert np.divide(sizes, count) == pytest.approx([8, 2.03125, 8, 0], rel=0.01)
    paged = memory.plan(small(), "full", optimizer="paged_adamw_8bit", device="cuda")
    outside = paged.parts["optimizer states"] + paged.parts["runtime overhead"]
    assert paged.allocated == paged.total - outside  # the driver holds what is paged


def peak(model, batch_size, length, share=1.0, **options):
    """The allocator's peak over two steps of labkit's trainer."""
    ids = np.random.default_rng(0).integers(10, 400, size=(2 * batch_size, length))
    mask = np.arange(length) >= length - round((length - 1) * share)
    examples = [Example(row, mask.astype(np.int64)) for row in ids]
    config = training.TrainConfig(batch_size=batch_size, max_steps=2, **options)
    with memory.measured(model) as found:
        training.fit(model, examples, training.sft_loss, config, progress=False)
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
    size = dict(batch_size=batch_size, sequence_length=length, response_share=share, device="cpu")
    planned = memory.plan(model, technique, gradient_checkpointing=checkpointing, **size)
    module, config = ATTACH[technique]
    model = module.attach(model, config)
    took = peak(model, batch_size, length, share, gradient_checkpointing=checkpointing)
    assert planned.allocated == pytest.approx(took, rel=0.05)


def test_other_architectures_take_what_was_planned(tiny_model, arch):
    model = tiny_model(arch)
    planned = memory.plan(model, "full", batch_size=16, sequence_length=64, device="cpu")
    assert planned.setting.precision == "fp32"
    assert planned.allocated == pytest.approx(peak(model, 16, 64), rel=0.05)


def test_a_reward_model_takes_what_was_planned():
    model, tokenizer = models.load("tinytown")
    words = [" ".join(["Mila"] * n) for n in (38, 39, 40)]
    rows = [{"prompt": "Who?", "responses": words, "ranks": [2, 1, 0]}] * 8
    length = len(tokenizer(f"Question: Who?\nAnswer: {words[-1]}")["input_ids"])
    size = dict(batch_size=4, ranked=3, sequence_length=length, device="cpu")
    planned = memory.plan("tinytown", "reward", **size)
    config = reward.RewardConfig(batch_size=4, max_steps=2)
    with memory.measured(model) as found:
        reward.train(model, tokenizer, rows, config, progress=False)
    assert planned.allocated == pytest.approx(found.peak_bytes, rel=0.05)


@pytest.mark.parametrize("rank", [0, 8])
def test_ppo_takes_what_was_planned(rank, monkeypatch):
    model, tokenizer = models.load("tinytown")
    model = lora.attach(model, lora.LoraConfig(rank=rank)) if rank else model
    lengths = []

    def of_one_length(model, ids, *args, **options):  # no response ends early
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


def test_measured_does_not_count_what_an_earlier_one_left_as_freed():
    model = nn.Linear(10, 10, bias=False)
    with memory.measured(model):
        left = [torch.zeros(1000, 1000)]
        left.append(left)  # a cycle, as trainers leave them
    del left
    with memory.measured(model) as found:
        gc.collect()
        torch.zeros(1000, 1000)
    assert found.peak_bytes == memory.held(model) + 4_000_000


def test_advice(monkeypatch):
    planned = memory.plan(small(), "full", batch_size=64, sequence_length=128, device="cuda")
    assert planned.fits is None or torch.cuda.is_available()
    tight = replace(planned, device_memory=planned.total - 1)
    assert tight.fits is False and tight.nearest.fits
    assert tight.nearest.setting == replace(tight.setting, batch_size=32, gradient_accumulation=2)
    assert "batch_size=32" in tight.advice and "accumulation=2" in tight.advice
    monkeypatch.setattr(memory, "simulate", lambda *_: planned.parts)  # nothing helps
    assert replace(tight, setting=replace(tight.setting, sequence_length=3)).nearest is None
    assert "smaller model" in replace(tight, device_memory=1.0).advice


def test_what_cannot_be_planned():
    wrong = {"technique": "lorra", "optimizer": "adam", "batch_size": 0, "targets": "wrong"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            memory.plan(small(), **{name: value})
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        memory.plan(small(), "prefix", gradient_checkpointing=True)
    with pytest.raises(OSError):
        memory.plan("nobody/nothing-here")


def test_all_stages_of_a_notebook(tiny_folder, monkeypatch):
    values = dict(model=str(tiny_folder("qwen2")), max_length=64, device="cpu", dtype="auto")
    rlhf = dict(max_new_tokens=16, batch_size=64, minibatch_size=32, lora_rank=0)
    plans = memory.plan_notebook("08_rlhf", values | rlhf)
    assert [p.setting.technique for p in plans] == ["full", "reward", "ppo"]
    assert [p.setting.batch_size for p in plans] == [16, 16, 32]
    weights = plans[0].parts["weights"]  # policy and reference, the tuned model, the reward model
    assert plans[2].parts["weights"] == pytest.approx(4 * weights, rel=0.2)
    both = memory.plan_notebook("08_reward_model", values | {"batch_size": 16})
    assert [p.setting.technique for p in both] == ["full", "reward"]
    assert both[1].total == plans[1].total
    tight = replace(plans[2], device_memory=plans[2].total - 1e6)
    assert "minibatch_size=16" in tight.advice  # the notebook's own name, and only what it has
    assert replace(plans[0], device_memory=1.0).advice.endswith("take a smaller model.")
    monkeypatch.setattr(memory, "simulate", lambda *_: dict.fromkeys(PARTS, 1.0))
    for name in ("09_dpo", "10_orpo"):
        pairs = [memory.plan_notebook(name, values | rlhf | {"lora_rank": r})[0] for r in (0, 4)]
        found = [(p.setting.technique, p.setting.rank) for p in pairs]
        assert found == [("full", None), ("lora", 4)]
        assert pairs[0].setting.sequence_length == 128  # two responses
    for also, expected in ({}, ["lora"]), ({"full_learning_rate": 1e-3}, ["lora", "full"]):
        found = memory.plan_notebook("02_lora", values | also)
        assert [p.setting.technique for p in found] == expected
    assert memory.plan_notebook("00_start_here", values) == []


@pytest.mark.parametrize("technique", ["full", "reward", "ppo"])
def test_a_run_of_which_a_stage_cannot_fit_is_refused(technique, tiny_folder, monkeypatch, capsys):
    """By `labkit run`, with the numbers; --force runs it all the same."""
    ran, folder = [], str(tiny_folder("llama"))
    sizes = lambda _, s, __: dict.fromkeys(PARTS, 8e8 if s.technique == technique else 1e8)  # noqa: E731
    monkeypatch.setattr(memory, "simulate", sizes)
    monkeypatch.setattr(memory, "free", lambda device: 3e9)
    monkeypatch.setattr(cli, "_run_one", lambda path, *_: ran.append(path.stem) or True)

    def run(*more):
        monkeypatch.setattr("sys.argv", ["labkit", "run", "rlhf", "-p", "model", folder, *more])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capsys.readouterr().err

    status, said = run()
    assert status == 2 and not ran
    assert all(text in said for text in ("08_rlhf", technique, "4.00 GB of 3.00 GB", "--force"))
    assert run("--force")[0] == 0 and ran == ["08_rlhf"]
    status, said = run("-p", "model", "nobody/nothing-here")
    assert status == 2 and "--force" in said
    memory.check_fits("08_rlhf", {"model": "tinytown"})


def test_a_plan_shows_itself():
    planned = memory.plan(small(), "qlora", device="cuda", device_memory=4e9)
    planned = replace(planned, name="/a/long/path/" * 7 + "model, 7.62 B parameters")
    for text in (repr(planned), planned._repr_html_()):
        assert all(part in text for part in (*PARTS, "total", "Needs"))
    figure = planned.figure()
    axes = figure.axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert max(tops) == pytest.approx(planned.total / 1e9)
    assert [line.get_ydata()[0] for line in axes.lines] == [4.0]
    figure.savefig("/dev/null", format="png")
    box = axes.title.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width
