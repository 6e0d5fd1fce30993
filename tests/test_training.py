"""Supervised training: the loss against independent ones, and what a run must guarantee."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from labkit import speed
from labkit.batching import Collator, Rows, Shuffled, cuts, lines, parts
from labkit.progress import Meter
from labkit.speed import response_loss
from labkit.training import FastSFTTrainer, TrainConfig, keeps_apart, sft

QUICK = dict(precision="fp32", batch_size=8, learning_rate=3e-3)


def copy_rows(count, seed=0, longest=8):
    """Rows <user> words <assistant> words <end>: the response copies the prompt."""
    random = np.random.default_rng(seed)
    columns = {"input_ids": [], "completion_mask": []}
    for _ in range(count):
        words = random.integers(10, 40, size=random.integers(2, longest)).tolist()
        columns["input_ids"].append([3, *words, 4, *words, 1])
        columns["completion_mask"].append([0] * (len(words) + 2) + [1] * (len(words) + 1))
    return Dataset.from_dict(columns)


def collate(dataset, packing=False, cut=False):
    rows = Rows(dataset)
    return Collator(pad_id=0, packing=packing, cut=cut)([rows[i] for i in range(len(rows))])


def reference(model, dataset):
    """Sum of the model's own loss (labels=), one unpadded row at a time, and the token count."""
    total, count = 0.0, 0
    for row in dataset:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["completion_mask"]])
        n = int(mask[:, 1:].sum())
        total = total + model(ids, labels=ids.masked_fill(mask == 0, -100)).loss * n
        count += n
    return total, count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, config).eval()


def trl_loss(model, tokenizer, dataset, tmp_path):
    """The loss that TRL's own trainer computes for all rows as one batch."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", completion_only_loss=True
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(dataset))])
    return trainer.compute_loss(model, batch)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_equal_the_models_own(arch, lora, tiny_model):
    model = with_lora(tiny_model(arch)) if lora else tiny_model(arch)
    dataset = copy_rows(6)
    expected, count = reference(model, dataset)
    loss = response_loss(model, batch := collate(dataset))
    assert len(batch["shift_labels"]) == count
    assert loss.item() / count == pytest.approx(expected.item() / count, abs=1e-5)
    assert_same_gradients(gradients(model, loss / count), gradients(model, expected / count))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_equals_trls(arch, lora, tiny_model, tiny_tokenizer, tmp_path):
    model = with_lora(tiny_model(arch)) if lora else tiny_model(arch)
    dataset = copy_rows(6)
    batch = collate(dataset)
    ours = response_loss(model, batch) / len(batch["shift_labels"])
    mine = gradients(model, ours)
    theirs = trl_loss(model, tiny_tokenizer, dataset, tmp_path)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert_same_gradients(mine, gradients(model, theirs))


def test_fused_head_and_packing_give_the_same_loss(arch, tiny_model, tiny_tokenizer, tmp_path):
    model, dataset = tiny_model(arch), copy_rows(6)
    expected = response_loss(model, collate(dataset)).item()
    packed = collate(dataset, packing=True)
    assert packed["input_ids"].shape == (1, 128)
    assert response_loss(model, packed).item() == pytest.approx(expected, rel=1e-5)
    make_trainer(model, tiny_tokenizer, dataset, tmp_path)  # puts TRL's head on the model
    fused = response_loss(model, collate(dataset), fused=True)
    assert fused.item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_sliding_window_and_of_capped_logits(tiny_tokenizer):
    """What the model does after its head (Gemma 2) or to its attention (Mistral) is kept."""
    from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

    shape = dict(
        vocab_size=448, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
        sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    for config in (Gemma2Config(final_logit_softcapping=2.0, **shape), MistralConfig(**shape)):
        model = AutoModelForCausalLM.from_config(config).eval()
        expected, _ = reference(model, copy_rows(6))
        for packing in (False, True):
            loss = response_loss(model, collate(copy_rows(6), packing))
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_with_a_soft_prompt(tiny_model):
    """Virtual tokens in front shift the hidden states; the loss must still find its own."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for kind in (PromptTuningConfig, PrefixTuningConfig):
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=5)
        model = get_peft_model(tiny_model("llama"), config).eval()
        expected, _ = reference(model, copy_rows(6))
        loss = response_loss(model, collate(copy_rows(6)))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def make_trainer(model, tokenizer, dataset, tmp_path, **settings):
    config = TrainConfig(**(QUICK | settings))
    return FastSFTTrainer(model, tokenizer, dataset, Rows(dataset), config, str(tmp_path), Meter())


def test_training_learns_to_copy_and_leaves_the_model_as_it_was(tiny_model, tiny_tokenizer):
    model, data = tiny_model(), copy_rows(160, longest=4)
    names = set(model.__dict__)
    before = math.log(448)
    result = sft(model, tiny_tokenizer, data, TrainConfig(epochs=10, **QUICK), eval_dataset=data)
    assert result.loss < 0.5 * before and result.eval_loss < 0.5 * before
    total, count = reference(model, data)
    assert total.item() / count == pytest.approx(result.eval_loss, rel=1e-4)
    assert set(model.__dict__) == names and model.config._attn_implementation == "sdpa"
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_padding_is_not_counted_and_every_row_is_seen(tiny_model, tiny_tokenizer):
    data = copy_rows(37)
    result = sft(tiny_model(), tiny_tokenizer, data, TrainConfig(epochs=2, **QUICK))
    assert result.tokens == 2 * sum(len(ids) for ids in data["input_ids"])
    assert result.steps == 2 * math.ceil(37 / 8)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_memory_bytes > 2**20


def test_accumulated_steps_equal_large_batches(tiny_model, tiny_tokenizer, tmp_path):
    """One step over 4 batches of 4 has the gradient of one batch of 16, however long each is."""
    data, weights = copy_rows(16), []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        model = tiny_model()
        settings = QUICK | dict(batch_size=batch_size, gradient_accumulation=accumulation)
        result = sft(model, tiny_tokenizer, data, TrainConfig(warmup_ratio=0, epochs=2, **settings))
        weights.append((result.loss, model.lm_head.weight.detach()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-4)
    torch.testing.assert_close(weights[0][1], weights[1][1], atol=1e-4, rtol=1e-3)


def test_same_seed_same_losses_and_another_seed_others(tiny_model, tiny_tokenizer):
    def losses(seed):
        config = TrainConfig(seed=seed, max_steps=6, **QUICK)
        result = sft(tiny_model(), tiny_tokenizer, copy_rows(64), config)
        return [entry["loss"] for entry in result.history]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


class Killed(Exception):
    pass


def test_resume_reaches_what_the_uninterrupted_run_reaches(tiny_model, tiny_tokenizer, tmp_path):
    data = copy_rows(40)
    settings = dict(epochs=3, save_steps=4, **QUICK)
    whole = tiny_model()
    full = sft(whole, tiny_tokenizer, data, TrainConfig(**settings), output_dir=tmp_path / "a")

    def kill(metrics, step):
        if step == 11:
            raise Killed

    with pytest.raises(Killed):
        config = TrainConfig(**settings)
        sft(tiny_model(), tiny_tokenizer, data, config, output_dir=tmp_path / "b", log=kill)
    (tmp_path / "b" / "checkpoint-11").mkdir()  # one whose writing was cut short
    model = tiny_model(seed=5)
    config = TrainConfig(resume=str(tmp_path / "b"), **settings)
    rest = sft(model, tiny_tokenizer, data, config, output_dir=tmp_path / "c")
    assert [e["step"] for e in rest.history] == [e["step"] for e in full.history]
    assert [e["loss"] for e in rest.history] == [e["loss"] for e in full.history]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rest.tokens < full.tokens == 3 * sum(len(ids) for ids in data["input_ids"])


def test_resuming_without_a_complete_checkpoint_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(FileNotFoundError, match="resume: .*complete checkpoint"):
        sft(tiny_model(), tiny_tokenizer, copy_rows(8), TrainConfig(resume=str(tmp_path)))


def test_checkpoints_hold_weights_as_safetensors(tiny_model, tiny_tokenizer, tmp_path):
    config = TrainConfig(max_steps=2, save_steps=2, **QUICK)
    sft(tiny_model(), tiny_tokenizer, copy_rows(16), config, output_dir=tmp_path)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert not list(tmp_path.glob("**/pytorch_model*"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tiny_model, tiny_tokenizer, tmp_path
):
    model, seen = tiny_model(), []

    def poison(metrics, step):
        seen.append(step)
        if step == 5:
            with torch.no_grad():
                model.lm_head.weight[0] = float("nan")

    config = TrainConfig(max_steps=10, save_steps=2, **QUICK)
    with pytest.raises(FloatingPointError, match=r"step 6: .*nan at learning_rate \d"):
        sft(model, tiny_tokenizer, copy_rows(64), config, output_dir=tmp_path, log=poison)
    assert seen[-1] == 5
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_the_extra_loss_pulls_and_is_not_reported(tiny_model, tiny_tokenizer):
    """A pull towards the first weights, strong enough, keeps them; the reported loss is its own."""
    moved = {}
    for strength in (0.0, 100.0):
        model = tiny_model()
        first = [p.detach().clone() for p in model.parameters()]

        def pull(m, first=first, strength=strength):
            pairs = zip(m.parameters(), first, strict=True)
            return strength * sum(((p - q) ** 2).sum() for p, q in pairs)

        config = TrainConfig(max_steps=20, **QUICK)
        result = sft(model, tiny_tokenizer, copy_rows(64), config, extra_loss=pull)
        moved[strength] = max(
            (p - q).abs().max() for p, q in zip(model.parameters(), first, strict=True)
        )
        assert result.history[0]["loss"] < 10
    assert moved[100.0] < 0.5 * moved[0.0]


def test_only_the_adapter_trains(tiny_model, tiny_tokenizer):
    model = with_lora(tiny_model())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sft(model, tiny_tokenizer, copy_rows(16), TrainConfig(max_steps=3, **QUICK))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name for name in changed)


def test_bfloat16_is_used_each_time_and_gone_afterwards(tiny_model, tiny_tokenizer):
    model, kinds = tiny_model(), []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: kinds.append(out.dtype))
    config = TrainConfig(max_steps=2, packing=False, **(QUICK | {"precision": "bf16"}))
    for _ in range(2):
        sft(model, tiny_tokenizer, copy_rows(16), config)
    assert kinds == [torch.bfloat16] * 4
    model(torch.tensor([[3, 5]]))
    assert kinds[-1] == torch.float32 and model.lm_head.weight.dtype == torch.float32
    handle.remove()


def test_attention_in_float32_is_the_librarys(arch, tiny_model):
    model, batch = tiny_model(arch), collate(copy_rows(6))
    expected = response_loss(model, batch)
    grads = gradients(model, expected)
    model.set_attn_implementation("labkit_float32")
    loss = response_loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(gradients(model, loss), grads)


def test_compiled_training_equals_plain_training(tiny_model, tiny_tokenizer, monkeypatch):
    """With a backend that only captures the graphs, so that no compiler has to run."""
    plain, captured = torch.nn.Module.compile, []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: plain(self, backend=backend, **kw)
    )
    losses = []
    for compiled in (False, True):
        model = tiny_model()
        config = TrainConfig(max_steps=4, compile=compiled, **QUICK)
        losses.append(sft(model, tiny_tokenizer, copy_rows(64), config).loss)
        assert model.model._compiled_call_impl is None
    assert captured and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_auto_compiles_only_what_is_long(tiny_model, tiny_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: seen.append(type(self)))
    config = TrainConfig(max_steps=20, compile="auto", **QUICK)
    sft(tiny_model(), tiny_tokenizer, copy_rows(64), config)
    assert not seen
    monkeypatch.setattr(speed, "COMPILE_SECONDS", 0)
    sft(model := tiny_model(), tiny_tokenizer, copy_rows(64), config)
    assert seen == [type(model.model)]


def test_log_gets_each_entry(tiny_model, tiny_tokenizer):
    logged = []
    config = TrainConfig(max_steps=3, **QUICK)
    result = sft(
        tiny_model(), tiny_tokenizer, copy_rows(16), config, eval_dataset=copy_rows(8, seed=1),
        log=lambda metrics, step: logged.append((step, metrics)),
    )  # fmt: skip
    assert [step for step, _ in logged] == [1, 2, 3, 3]
    assert logged[0][1].keys() == {"loss", "tokens_per_second", "learning_rate"}
    assert logged[-1][1] == {"eval_loss": result.eval_loss}


def test_progress_is_one_line_on_stderr_and_can_be_off(tiny_model, tiny_tokenizer, capsys):
    config = TrainConfig(max_steps=3, **QUICK)
    sft(tiny_model(), tiny_tokenizer, copy_rows(16), config)
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert last.startswith("step 3/3 · loss ") and last.endswith("s left")
    assert shown.out == ""
    sft(tiny_model(), tiny_tokenizer, copy_rows(16), config, progress=False)
    assert "step 3/3" not in capsys.readouterr().err


def test_the_order_holds_each_row_once_and_follows_seed_and_epoch():
    sampler = Shuffled(1003, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and list(Shuffled(1003, seed=0)) == first
    assert list(Shuffled(1003, seed=1)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(1003))


def test_cuts_cost_no_more_than_any_other():
    def price(lengths, ends):
        starts = [0, *ends[:-1]]
        parts = zip(starts, ends, strict=True)
        return sum((e - s) * lengths[e - 1] + 60 for s, e in parts)

    random = np.random.default_rng(0)
    for _ in range(5):
        lengths = np.sort(random.integers(5, 200, size=9))
        every = [[*c, 9] for k in range(9) for c in itertools.combinations(range(1, 9), k)]
        assert price(lengths, cuts(lengths)) == min(price(lengths, ends) for ends in every)


def test_lines_hold_each_row_once_and_little_air():
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = random.integers(5, 129, size=40).tolist()
        found = lines(lengths, 128)
        assert sorted(row for line in found for row in line) == list(range(40))
        filled = [sum(lengths[row] for row in line) for line in found]
        assert max(filled) <= 128
        # No two lines could be one: otherwise the later line's rows had fitted into the earlier.
        assert all(a + b > 128 for a, b in itertools.combinations(filled, 2))


def test_a_packed_batch_has_the_gradient_of_the_padded(arch, tiny_model):
    model = tiny_model(arch)
    random = np.random.default_rng(0)
    ids = [random.integers(5, 400, size=n).tolist() for n in (90, 7, 40, 8, 200, 42)]
    masks = [[0] * 3 + [1] * (len(row) - 3) for row in ids]
    data = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    batch = collate(data, packing=True)
    assert batch["input_ids"].shape == (2, 224) and batch["tokens"] == sum(map(len, ids))
    count = len(batch["shift_labels"])
    assert count == sum(map(sum, masks))
    grads = gradients(model, response_loss(model, collate(data)) / count)
    assert_same_gradients(gradients(model, response_loss(model, batch) / count), grads)
    cut = collate(data, cut=True)
    assert len(cut["parts"]) > 1
    assert sum(p["input_ids"].numel() for p in parts(cut)) < 1.1 * batch["tokens"]
    assert_same_gradients(gradients(model, response_loss(model, cut) / count), grads)


def test_a_model_that_mixes_rows_of_a_line_is_found_out(tiny_model, tiny_tokenizer, arch):
    model, data = tiny_model(arch), copy_rows(8)
    assert keeps_apart(model, Rows(data))
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    assert not keeps_apart(model, Rows(data))
    with pytest.raises(ValueError, match="packing: "):
        sft(model, tiny_tokenizer, data, TrainConfig(packing=True, **QUICK))
    sft(model, tiny_tokenizer, data, TrainConfig(max_steps=1, **QUICK))  # pads instead


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": -1e-3}, {"learning_rate": 0}, {"epochs": 0}, {"batch_size": 0},
        {"max_steps": 0}, {"warmup_ratio": 1.5}, {"schedule": "cosin"}, {"precision": "int8"},
        {"compile": "yes"}, {"save_steps": -1}, {"gradient_accumulation": 0}, {"optimizer": "sdg"},
    ],
    ids=lambda setting: "-".join(map(str, *setting.items())),
)  # fmt: skip
def test_a_setting_that_cannot_work_is_named(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name}: expected .* got {value!r}"):
        TrainConfig(**setting)


def test_rows_that_cannot_work_are_named(tiny_model, tiny_tokenizer, make_tokenizer):
    model, good = tiny_model(), copy_rows(2)

    def refused(match, columns=None, tokenizer=tiny_tokenizer, **settings):
        data = Dataset.from_dict(columns) if columns is not None else good
        with pytest.raises(ValueError, match=match):
            sft(model, tokenizer, data, TrainConfig(**settings))

    refused("columns input_ids and completion_mask", {"text": ["a"]})
    refused("at least one row", {"input_ids": [], "completion_mask": []})
    ids = [[5, 6, 7], [5, 6, 7]]
    refused(
        "row 1: .*response token", {"input_ids": ids, "completion_mask": [[0, 1, 1], [1, 0, 0]]}
    )
    refused("row 1: .*as many", {"input_ids": ids, "completion_mask": [[0, 1, 1], [1, 1]]})
    refused("ids below 448", {"input_ids": [[5, 448]], "completion_mask": [[0, 1]]})
    refused("row 0: .*at most 256", {"input_ids": [[5] * 257], "completion_mask": [[1] * 257]})
    refused("save_steps: .*output_dir", save_steps=5)
    same = make_tokenizer()
    same.pad_token = same.eos_token
    refused("pad token other than the end token", tokenizer=same)
