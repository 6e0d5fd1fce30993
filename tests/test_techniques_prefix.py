"""Prefix tuning from scratch: truths of the method, then parity with PEFT on five architectures."""

import numpy as np
import pytest
import torch
from helpers import IDS, LLAMA_2_7B, logits

from labkit import models, training
from labkit.batching import Example
from labkit.techniques import prefix
from labkit.techniques.prefix import Prefix, PrefixConfig, Shape

TEXT = torch.tensor([40, 41, 42, 43, 44])
PLAIN, MADE = PrefixConfig(length=5), PrefixConfig(length=5, hidden=24)
both = pytest.mark.parametrize("config", [PLAIN, MADE], ids=["plain", "made"])


def read_before(model, ids):
    """The logits of `ids` after TEXT as real tokens: no cache, no prefix."""
    both = torch.cat([TEXT.expand(len(ids), -1), ids], dim=1)
    return logits(model, both, use_cache=False)[:, len(TEXT) :]


def of_text(model):
    """A prefix from scratch whose rows are the keys and values of TEXT."""
    made = Prefix(prefix.kv_shape(model.config), PLAIN)
    made.table.data.copy_(prefix.text_rows(model, TEXT))
    return made


def fit(model, **settings):
    config = training.TrainConfig(**settings)
    examples = [Example(np.arange(3, 12 + i), (np.arange(9 + i) > 4).astype(int)) for i in range(6)]
    return training.fit(model, examples, training.sft_loss, config, progress=False)


def test_worked_layout():
    """Two prefix tokens, two layers, one head of width 1: key, value, key, value in a row."""
    table = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    found = prefix.keys_values(table, Shape(layers=2, heads=1, head_dim=1))
    assert found.shape == (2, 2, 1, 2, 1)
    assert found.flatten(2).tolist() == [[[1, 5], [2, 6]], [[3, 7], [4, 8]]]


def test_the_prefix_of_a_text_is_the_text(tiny_model, arch):
    """Keys and values are all that a model keeps of what it read, so the logits must agree.

    What stands under padding cannot matter.
    """
    model = tiny_model(arch)
    padded = torch.cat([IDS, torch.full((2, 3), 7)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        after = prefix.forward(model, of_text(model), IDS).logits
        masked = prefix.forward(model, of_text(model), padded, attention_mask=mask).logits[:, :12]
    assert (after - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(after, read_before(model, IDS), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked, after)
    tuned = prefix.attach(tiny_model(arch), PLAIN, text=TEXT).eval()
    torch.testing.assert_close(logits(tuned), after, atol=1e-5, rtol=1e-4)


def test_counts_of_llama_2_7b():
    model = models.meta_model(LLAMA_2_7B)
    shape = prefix.kv_shape(model.config)
    assert prefix.parameters(shape, PrefixConfig(20)) == 20 * 2 * 32 * 4096 == 5_242_880
    counts = models.parameter_counts(prefix.attach(model, PrefixConfig(20)))
    assert counts.trainable == 5_242_880 and counts.total == 6_738_415_616 + 5_242_880


@both
def test_parity_with_peft(tiny_model, arch, config):
    torch.manual_seed(1)
    model = tiny_model(arch).requires_grad_(False)
    ours = Prefix(prefix.kv_shape(model.config), config)
    theirs = prefix.attach(tiny_model(arch), config).eval()
    twins = [p for p in theirs.parameters() if p.requires_grad]
    for mine, twin in zip(ours.parameters(), twins, strict=True):
        twin.data.copy_(mine)
    assert prefix.parameters(ours.shape, config) == models.parameter_counts(theirs).trainable
    past = model(input_ids=IDS, use_cache=True).past_key_values
    held = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values))
    assert prefix.cache_bytes(ours.shape, tokens=12, batch=2) == held
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    inputs = dict(input_ids=IDS, attention_mask=mask, labels=labels)
    mine, other = prefix.forward(model, ours, **inputs), theirs(**inputs)
    assert (mine.logits - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, other.loss, atol=1e-6, rtol=1e-6)
    (mine.loss + other.loss).backward()
    assert all(p.grad is None for p in model.parameters())
    for parameter, twin in zip(ours.parameters(), twins, strict=True):
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, twin.grad, atol=1e-5, rtol=1e-4)


def test_generation_continues_from_the_prefix(tiny_model, tiny_tokenizer, arch):
    """In a batch padded on the left, token by token through the cache, against no cache at all."""
    tuned = prefix.attach(tiny_model(arch), PLAIN, text=TEXT).eval()
    batch = tiny_tokenizer(["Mila lives in the", "Otto"], padding=True, padding_side="left")
    inputs = {n: torch.tensor(batch[n]) for n in ("input_ids", "attention_mask")}
    found = tuned.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        expected = ids[mask.bool()][None]
        for _ in range(6):
            following = read_before(tiny_model(arch), expected)[:, -1:].argmax(-1)
            expected = torch.cat([expected, following], dim=1)
        assert found[row, -6:].tolist() == expected[0, -6:].tolist()


def test_training_moves_the_prefix_only_and_it_is_saved_without_its_mlp(
    tiny_model, tiny_tokenizer, tmp_path
):
    tuned = prefix.attach(tiny_model(), MADE)
    result = fit(tuned, learning_rate=0.1, max_steps=30, batch_size=6)
    assert result.loss < 0.8 * result.history[0]["loss"]
    origin = dict(tiny_model().named_parameters())
    assert all(torch.equal(p, origin[n]) for n, p in tuned.get_base_model().named_parameters())
    folder = models.save(tuned.eval(), tiny_tokenizer, tmp_path / "prefix")
    again = prefix.load_adapter(tiny_model(), folder)
    torch.testing.assert_close(logits(again), logits(tuned), atol=1e-6, rtol=1e-5)
    kept = [p.shape for n, p in again.named_parameters() if n.startswith("prompt_encoder.")]
    assert kept == [(5, 2 * 2 * 64)]


def test_gradient_checkpointing_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        prefix.attach(model, PLAIN)
    tuned = prefix.attach(tiny_model().bfloat16(), PLAIN)
    assert logits(tuned).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        fit(tuned, max_steps=1, gradient_checkpointing=True)
    folder = models.save(tuned, tiny_tokenizer, tmp_path / "prefix")
    for guarded in (tuned, prefix.load_adapter(tiny_model(), folder)):
        with pytest.raises(ValueError, match="gradient_checkpointing"):
            guarded.gradient_checkpointing_enable()


def test_refusals(tiny_model):
    for config, text in ((PLAIN, TEXT[1:]), (MADE, TEXT)):
        with pytest.raises(ValueError):
            prefix.attach(tiny_model(), config, text=text)
    with pytest.raises(ValueError, match="adapters"):
        prefix.attach(prefix.attach(tiny_model(), PLAIN), PLAIN)
    for wrong in ({"length": 0}, {"hidden": 8.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PrefixConfig(**wrong)
