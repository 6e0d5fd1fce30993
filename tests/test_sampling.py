"""Sampling by inverting the distribution: what it draws, and what must not matter to it."""

from functools import wraps

import numpy as np
import pytest
import torch

from labkit import sampling
from labkit.sampling import invert, sample

LONG, SHORT = [5, 9, 33, 47, 120, 7, 8, 15], [40, 41]


def draw(model, prompts, uniforms, **options):
    return sample(model, prompts, uniforms, ends={1}, pad_id=0, **options)


def test_the_inverse_by_hand():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.999, 1 - 1e-16], dtype=torch.float64)
    assert invert(logits, uniforms).tolist() == [0, 0, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_even_grid_gives_the_distribution(tiny_model, temperature):
    """n evenly spaced uniforms hit a token of probability p in n p of the cases, give or take 1."""
    model, n = tiny_model(), 2000
    model.generation_config.top_k = 1  # the model's own settings are not for sampling
    grid = ((np.arange(n) + 0.5) / n)[:, None]
    tokens = torch.tensor(draw(model, [LONG] * n, grid, temperature=temperature))[:, 0]
    p = (model(torch.tensor([LONG])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=len(p))
    assert (counts - n * p).abs().max() < 1.01


def test_a_row_does_not_depend_on_its_batch(tiny_model, arch):
    """Left padding, the cut into batches, and rows that left because they ended."""
    model, uniforms = tiny_model(arch), np.random.default_rng(0).random((6, 12))
    prompts = [LONG, SHORT, LONG[:5], SHORT + LONG, [3], LONG[2:]]
    alone = [draw(model, [p], u[None])[0] for p, u in zip(prompts, uniforms, strict=True)]
    assert draw(model, prompts, uniforms) == alone
    assert draw(model, prompts, uniforms, batch_size=4) == alone


def test_rows_that_end_leave(tiny_model):
    """Rows end at different times where a third of all tokens end a row."""
    model, uniforms = tiny_model(), np.random.default_rng(0).random((40, 12))
    ends = set(range(0, 448, 3))
    found = sample(model, [SHORT] * 40, uniforms, ends=ends, pad_id=0)
    alone = [sample(model, [SHORT], u[None], ends=ends, pad_id=0)[0] for u in uniforms]
    assert found == alone and len({len(row) for row in found}) > 3
    for row in found:
        assert not ends & set(row[:-1]) and (row[-1] in ends or len(row) == 12)


@pytest.mark.parametrize("pause", [1, 5, 16])
def test_what_a_gpu_would_do_gives_the_same(tiny_model, monkeypatch, arch, pause):
    """A mask that is ready, rows that go on for a while after their end: the same samples."""
    model, uniforms = tiny_model(arch), np.random.default_rng(0).random((6, 12))
    prompts, ends = [LONG, SHORT, LONG[:5], SHORT + LONG, [3], LONG[2:]], set(range(0, 448, 3))
    options = dict(ends=ends, pad_id=0)
    expected = sample(model, prompts, uniforms, **options)
    masks, forward = [], model.forward
    monkeypatch.setattr(sampling, "READY_MASK", {})
    monkeypatch.setattr(sampling, "STEPS_BETWEEN_QUESTIONS", {"cpu": pause})

    @wraps(forward)
    def spy(*args, **kwargs):
        masks.append(kwargs["attention_mask"].ndim)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    assert sample(model, prompts, uniforms, **options) == expected
    assert set(masks) == ({4} if arch in ("llama", "qwen2", "gemma", "mistral", "gpt2") else {2})


def test_a_ready_mask_by_hand():
    seen = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = sampling.ready_mask(seen, 3)[:, 0].int().tolist()
    assert found[0] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # padding sees itself, nobody sees it
    assert found[1] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert sampling.ready_mask(seen, 1)[:, 0].int().tolist() == [[[0, 1, 1]], [[1, 1, 1]]]


def test_the_cache_gives_what_whole_passes_give(tiny_model, arch):
    model, uniforms = tiny_model(arch), np.random.default_rng(1).random((2, 8))
    for prompt, u, found in zip([LONG, SHORT], uniforms,
                                draw(model, [LONG, SHORT], uniforms), strict=True):  # fmt: skip
        ids = list(prompt)
        for chance in u[: len(found)]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[:, -1]
            ids.append(int(invert(logits, torch.tensor([chance]))))
        assert ids[len(prompt) :] == found


def test_end_tokens_of_tokenizer_and_model(tiny_model, tiny_tokenizer):
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 4]
    assert sampling.end_ids(model, tiny_tokenizer) == {1, 4}
    model.generation_config.eos_token_id = None
    assert sampling.end_ids(model, tiny_tokenizer) == {1}


def test_prompts_in_their_template(tiny_model, tiny_tokenizer):
    turns = [{"role": "user", "content": "Hello"}]
    rows = ["Hello", {"prompt": "Hello", "note": 3}, {"prompt": turns}, {"messages": turns + [
        {"role": "assistant", "content": "Good day."}]}]  # fmt: skip
    found = sampling.encode(rows, tiny_model(), tiny_tokenizer, "auto", 8)
    text = "<|user|>Hello<|end|><|assistant|>"
    assert {tiny_tokenizer.decode(prompt.ids) for prompt in found} == {text}
    assert [prompt.shown for prompt in found] == ["Hello", "Hello", turns, turns]
    assert found[0].row == {"prompt": "Hello"} and found[1].row is rows[1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "expected a list"), ("Hello", "expected a list"), (["a", 3], "prompt 1: expected a text"),
     ([{"text": "a"}], "prompt 0: expected a text or a row"),
     (["a", "long " * 300], "prompt 1: expected 1 to 248 tokens"), ([""], "prompt 0: expected 1 to")],
)  # fmt: skip
def test_prompts_that_cannot_work(tiny_model, tiny_tokenizer, prompts, message):
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match=message):
        sampling.encode(prompts, tiny_model(), tiny_tokenizer, "plain", 8)


def test_responses_are_texts_in_order_with_random_numbers_of_their_own(tiny_model, tiny_tokenizer):
    model, prompts = tiny_model(), ["Mila lives", "小城里"]
    options = dict(max_new_tokens=6, template="plain")
    found = sampling.responses(model, tiny_tokenizer, prompts, each=3, seed=1, **options)
    assert [len(texts) for texts in found] == [3, 3] and len({*found[0], *found[1]}) > 3
    again = sampling.responses(model, tiny_tokenizer, prompts, each=3, seed=1, **options)
    other = sampling.responses(model, tiny_tokenizer, prompts, each=3, seed=2, **options)
    assert again == found != other
