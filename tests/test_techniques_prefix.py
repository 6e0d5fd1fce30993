"""Prefix tuning from scratch: truths of the method, then parity with PEFT on five architectures."""

import shutil

import pytest
import torch
from datasets import Dataset

from labkit import models, speed, training
from labkit.batching import Collator, Rows
from labkit.generate import generate
from labkit.techniques import prefix
from labkit.techniques.prefix import Prefix, PrefixConfig, Shape

IDS = torch.arange(5, 29).reshape(2, 12)
TEXT = torch.tensor([40, 41, 42, 43, 44])
PLAIN, MADE = PrefixConfig(length=5), PrefixConfig(length=5, hidden=24)
LLAMA_2_7B = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                  num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False)  # fmt: skip


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def read_before(model, ids):
    """The logits of `ids` after TEXT as real tokens: no cache, no prefix."""
    both = torch.cat([TEXT.expand(len(ids), -1), ids], dim=1)
    return logits(model, both, use_cache=False)[:, len(TEXT) :]


def of_text(model):
    """A prefix from scratch whose rows are the keys and values of TEXT."""
    made = Prefix(prefix.kv_shape(model.config), PLAIN)
    made.table.data.copy_(prefix.text_rows(model, TEXT))
    return made


def rows(count=6):
    """Prompt and response of different lengths, as `data.encode` gives them."""
    columns = {"input_ids": [], "completion_mask": []}
    for i in range(count):
        words = list(range(10, 13 + i))
        columns["input_ids"].append([3, *words, 4, *words, 1])
        columns["completion_mask"].append([0] * (len(words) + 2) + [1] * (len(words) + 1))
    return Dataset.from_dict(columns)


def test_worked_layout():
    """Two prefix tokens, two layers, one head of width 1: key, value, key, value in a row."""
    table = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    found = prefix.keys_values(table, Shape(layers=2, heads=1, head_dim=1))
    assert found.shape == (2, 2, 1, 2, 1)
    assert found[0, 0].flatten().tolist() == [1, 5] and found[0, 1].flatten().tolist() == [2, 6]
    assert found[1, 0].flatten().tolist() == [3, 7] and found[1, 1].flatten().tolist() == [4, 8]


def test_the_prefix_of_a_text_is_the_text(tiny_model, arch):
    """Keys and values are all that a model keeps of what it read, so the logits must agree."""
    model = tiny_model(arch)
    with torch.no_grad():
        after = prefix.forward(model, of_text(model), IDS).logits
    assert (after - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(after, read_before(model, IDS), atol=1e-5, rtol=1e-4)


def test_what_stands_under_padding_cannot_matter(tiny_model, arch):
    model = tiny_model(arch)
    padded = torch.cat([IDS, torch.full((2, 3), 7)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 3, dtype=torch.long)], dim=1)
    made = of_text(model)
    with torch.no_grad():
        after = prefix.forward(model, made, padded, attention_mask=mask).logits[:, :12]
        torch.testing.assert_close(after, prefix.forward(model, made, IDS).logits)


def test_a_prefix_has_the_key_heads_of_the_cache(tiny_model, arch):
    model = tiny_model(arch)
    heads = {"llama": 4, "gpt2": 4, "qwen2": 2, "gemma": 1, "mistral": 2}[arch]
    shape = prefix.kv_shape(model.config)
    assert shape == (2, heads, 16)
    if heads < 4:  # the chapter counts query heads
        with pytest.raises(RuntimeError):
            prefix.forward(model, Prefix(shape._replace(heads=4), PLAIN), IDS)


def test_counts_of_llama_2_7b():
    model = models.meta_model(LLAMA_2_7B)
    shape = prefix.kv_shape(model.config)
    assert prefix.parameters(shape, PrefixConfig(20)) == 20 * 2 * 32 * 4096 == 5_242_880
    counts = models.parameter_counts(prefix.attach(model, PrefixConfig(20)))
    assert counts.trainable == 5_242_880 and counts.total == 6_738_415_616 + 5_242_880


@pytest.mark.parametrize("config", [PLAIN, MADE], ids=["plain", "made"])
def test_the_formula_counts_what_trains(tiny_model, arch, config):
    model = tiny_model(arch)
    shape = prefix.kv_shape(model.config)
    own = sum(p.numel() for p in Prefix(shape, config).parameters())
    tuned = prefix.attach(model, config)
    found = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert found == {n for n, _ in tuned.named_parameters() if n.startswith("prompt_encoder.")}
    assert prefix.parameters(shape, config) == own == models.parameter_counts(tuned).trainable


def test_cache_bytes_are_those_of_the_cache(tiny_model, arch):
    model = tiny_model(arch)
    past = model(input_ids=IDS, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in past.layers for t in (layer.keys, layer.values))  # fmt: skip
    shape = prefix.kv_shape(model.config)
    assert prefix.cache_bytes(shape, tokens=12, batch=2) == held
    assert prefix.cache_bytes(shape, tokens=12, bytes_each=2) * 4 == held


def test_folding_keeps_the_rows():
    made = Prefix(Shape(2, 2, 4), MADE)
    plain = prefix.fold(made)
    assert torch.equal(plain(), made()) and plain.table.requires_grad
    assert [n for n, _ in plain.named_parameters()] == ["table"]


def test_half_precision(tiny_model):
    model = tiny_model().bfloat16()
    tuned = prefix.attach(model, PLAIN)
    assert logits(tuned).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)


def pair(make, arch, config):
    """The same prefix twice: ours beside a frozen model, and PEFT's with our weights copied in."""
    torch.manual_seed(1)
    model = make(arch).requires_grad_(False)
    ours = Prefix(prefix.kv_shape(model.config), config)
    theirs = prefix.attach(make(arch), config).eval()
    encoder = theirs.prompt_encoder["default"]
    twins = [encoder.embedding.weight]
    if config.hidden:
        twins += [p for i in (0, 2) for p in (encoder.transform[i].weight, encoder.transform[i].bias)]  # fmt: skip
    for mine, twin in zip(ours.parameters(), twins, strict=True):
        twin.data.copy_(mine)
    return model, ours, theirs, twins


@pytest.mark.parametrize("config", [PLAIN, MADE], ids=["plain", "made"])
def test_parity_with_peft(tiny_model, arch, config):
    model, ours, theirs, twins = pair(tiny_model, arch, config)
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    inputs = dict(input_ids=IDS, attention_mask=mask, labels=labels)
    mine, other = prefix.forward(model, ours, **inputs), theirs(**inputs)
    assert (mine.logits - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, other.loss, atol=1e-6, rtol=1e-6)
    mine.loss.backward()
    other.loss.backward()
    assert all(p.grad is None for p in model.parameters())
    for parameter, twin in zip(ours.parameters(), twins, strict=True):
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, twin.grad, atol=1e-6, rtol=1e-4)


def test_starting_from_a_text(tiny_model, arch):
    tuned = prefix.attach(tiny_model(arch), PLAIN, text=TEXT).eval()
    torch.testing.assert_close(logits(tuned), read_before(tiny_model(arch), IDS), atol=1e-5, rtol=1e-4)  # fmt: skip


def test_generation_goes_on_from_the_prefix(tiny_model, tiny_tokenizer, arch):
    """In a batch padded on the left, token by token through the cache, against no cache at all."""
    tuned = prefix.attach(tiny_model(arch), PLAIN, text=TEXT)
    prompts = ["Mila lives in the", "Otto"]
    answers = generate(tuned, tiny_tokenizer, prompts, max_new_tokens=6)
    plain = tiny_model(arch)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tiny_tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            following = read_before(plain, ids)[:, -1:].argmax(-1)
            if following.item() == tiny_tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following], dim=1)
        assert answer == tiny_tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("config", [PLAIN, MADE], ids=["plain", "made"])
def test_the_trainers_loss_is_the_methods(tiny_model, arch, config):
    """Against one unpadded row at a time, from scratch; the trainer passes no attention mask."""
    model, ours, theirs, twins = pair(tiny_model, arch, config)
    data, expected = rows(), 0.0
    for row in data:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["completion_mask"]])
        labels = ids.masked_fill(mask == 0, -100)
        loss = prefix.forward(model, ours, ids, labels=labels).loss
        expected = expected + loss * int(mask[:, 1:].sum())
    flat = Rows(data)
    batch = Collator(pad_id=0, cut=True)([flat[i] for i in range(len(flat))])
    found = speed.response_loss(theirs, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    found.backward()
    expected.backward()
    for parameter, twin in zip(ours.parameters(), twins, strict=True):
        torch.testing.assert_close(twin.grad, parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [PLAIN, MADE], ids=["plain", "made"])
def test_training_moves_the_prefix_only(tiny_model, tiny_tokenizer, config):
    tuned = prefix.attach(tiny_model(), config)
    settings = training.TrainConfig(learning_rate=0.1, max_steps=30, batch_size=6)
    result = training.sft(tuned, tiny_tokenizer, rows(), settings, progress=False)
    assert result.loss < 0.8 * result.history[0]["loss"]
    origin = dict(tiny_model().named_parameters())
    assert all(torch.equal(p, origin[n]) for n, p in tuned.get_base_model().named_parameters())


def test_a_resumed_training_ends_where_the_whole_one_does(tiny_model, tiny_tokenizer, tmp_path):
    settings = dict(learning_rate=2e-2, max_steps=6, batch_size=3)
    found = []
    for extra in (dict(save_steps=4), dict(resume=str(tmp_path))):
        torch.manual_seed(len(found))  # the second starts elsewhere
        tuned = prefix.attach(tiny_model(), PLAIN)
        config = training.TrainConfig(**settings, **extra)
        training.sft(tuned, tiny_tokenizer, rows(), config, output_dir=tmp_path, progress=False)
        found.append(logits(tuned.eval()))
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)  # go on from the fourth step
    assert torch.equal(*found)


def test_gradient_checkpointing_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    reason = "gradient_checkpointing: expected False.*gets no KV cache"
    model = tiny_model()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=reason):
        prefix.attach(model, PLAIN)
    tuned = prefix.attach(tiny_model(), PLAIN)
    settings = training.TrainConfig(max_steps=1, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=reason):
        training.sft(tuned, tiny_tokenizer, rows(), settings, progress=False)
    models.save(tuned, tiny_tokenizer, tmp_path / "prefix")
    again = prefix.restore(tiny_model(), tmp_path / "prefix")
    with pytest.raises(ValueError, match=reason):
        again.gradient_checkpointing_enable()


def test_checkpointing_would_miss_the_prefix(tiny_model):
    """Why it is refused: without the guard the library fails, or says nothing and has no prefix."""
    tuned = prefix.attach(tiny_model(), PLAIN).train()
    before = logits(tuned)
    base = tuned.get_base_model()
    del base.gradient_checkpointing_enable, base.activation_checkpointing_enable
    base.activation_checkpointing_enable()
    try:
        same = torch.allclose(tuned(input_ids=IDS).logits, before, atol=1e-4)
    except RuntimeError:
        same = False
    assert not same, "gradient checkpointing now keeps the KV cache: the guard may go"


@pytest.mark.parametrize("config", [PLAIN, MADE], ids=["plain", "made"])
def test_a_saved_prefix_comes_back_without_its_mlp(tiny_model, tiny_tokenizer, tmp_path, config):
    tuned = prefix.attach(tiny_model(), config).eval()
    models.save(tuned, tiny_tokenizer, tmp_path / "prefix")
    again = prefix.restore(tiny_model(), tmp_path / "prefix")
    torch.testing.assert_close(logits(again), logits(tuned), atol=1e-6, rtol=1e-5)
    kept = [p.shape for n, p in again.named_parameters() if n.startswith("prompt_encoder.")]
    assert kept == [(5, 2 * 2 * 64)]
    with pytest.raises(FileNotFoundError, match="folder: expected a saved prefix"):
        prefix.restore(tiny_model(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "value"),
    [("length", 0), ("length", -3), ("length", 2.5), ("length", True), ("hidden", -1),
     ("hidden", 8.0), ("hidden", False)],
)  # fmt: skip
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        PrefixConfig(**{name: value})


def test_refusals(tiny_model):
    with pytest.raises(ValueError, match="length: expected less than 256, the model's context"):
        prefix.attach(tiny_model(), PrefixConfig(256))
    with pytest.raises(ValueError, match=r"text: expected token ids of shape \(5,\), got \(2, 12\)"):  # fmt: skip
        prefix.attach(tiny_model(), PLAIN, text=IDS)
    with pytest.raises(ValueError, match="hidden: expected 0 with a text"):
        prefix.attach(tiny_model(), MADE, text=TEXT)
    tuned = prefix.attach(tiny_model(), PLAIN)
    with pytest.raises(ValueError, match="has them already"):
        prefix.attach(tuned, PLAIN)


def test_the_prefix_takes_room_in_the_context(tiny_model, tiny_tokenizer):
    model = prefix.attach(tiny_model("gpt2"), prefix.PrefixConfig(length=16))
    assert models.context_length(model) == 256 - 16
    generate(
        model, tiny_tokenizer, ["word " * 300], max_new_tokens=4
    )  # an IndexError if it did not
    columns = {"input_ids": [[5] * 250], "completion_mask": [[1] * 250]}
    with pytest.raises(ValueError, match="at most 240 tokens"):
        training.sft(model, tiny_tokenizer, Dataset.from_dict(columns))
