"""Instruction tuning: truths of template, mask and loss, then parity with the libraries."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_same
from torch.nn.utils.rnn import pad_sequence

from labkit import data, templates, tinytown, training
from labkit.batching import pack
from labkit.techniques import instruction
from labkit.techniques.instruction import InstructionConfig

ROWS = [
    {"prompt": "What is three plus four?", "completion": "Seven."},
    {"prompt": "米拉住在哪里？", "completion": "河边的磨坊。"},
    {"prompt": "Write a response to Otto.", "completion": "Otto likes pancakes with honey."},
]


def batch(encoded):
    """Right-padded (B, T) ids and response mask."""
    columns = zip(*encoded, strict=True)
    return [pad_sequence([torch.from_numpy(part) for part in c], batch_first=True) for c in columns]


def test_worked_example():
    """Prompt `0 1`, response `2`, end `3`; the model gives 1 (prompt) 1/32, 2 1/2, 3 1/4.

    In units of ln 2: 5, 1, 2. Response and end: 1.5. Prompt and response, no end: 3.
    """
    p = torch.full((1, 4, 4), 0.25)
    p[0, 0] = torch.tensor([31, 3, 31, 31]) / 96
    p[0, 1] = torch.tensor([1, 1, 3, 1]) / 6
    ids, mask = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1]])
    value, metrics = instruction.loss(p.log(), ids, mask)
    assert value.item() == pytest.approx(1.5 * math.log(2))
    assert metrics["perplexity"] == pytest.approx(2**1.5) and metrics["tokens"] == 2
    chapters, _ = instruction.loss(p.log()[:, :3], ids[:, :3], torch.ones(1, 3))
    assert chapters.item() == pytest.approx(3 * math.log(2))


def test_only_response_tokens_matter(tiny_model, tiny_tokenizer):
    """Logits that predict a prompt token or padding have no gradient, and no effect."""
    ids, mask = batch(instruction.encode(ROWS, tiny_tokenizer, InstructionConfig()))
    logits = tiny_model()(input_ids=ids).logits.detach().requires_grad_()
    instruction.loss(logits, ids, mask)[0].backward()
    reached = logits.grad.abs().sum(-1) > 0
    assert torch.equal(reached[:, :-1], mask[:, 1:].bool()) and not reached[:, -1].any()
    sure = 50.0 * torch.nn.functional.one_hot(ids.roll(-1, dims=1), 448).float()
    value, metrics = instruction.loss(sure, ids, mask)
    assert value.item() == pytest.approx(0, abs=1e-6) and metrics["token_accuracy"] == 1


def test_loss_and_gradients_equal_those_of_the_library(tiny_model, tiny_tokenizer, arch):
    """transformers' own, and what the trainer minimizes."""
    model = tiny_model(arch)
    encoded = instruction.encode(ROWS, tiny_tokenizer, InstructionConfig())
    ids, mask = batch(encoded)

    def ours():
        return instruction.loss(model(input_ids=ids).logits, ids, mask)[0]

    labels = ids.masked_fill(mask == 0, -100)
    assert_same(model, ours(), model(input_ids=ids, labels=labels).loss)
    assert_same(model, ours(), training.sft_loss(model, pack(encoded))[0])


@pytest.mark.parametrize("template, language", [("alpaca", "en"), ("alpaca_zh", "zh")])
@pytest.mark.parametrize("given", ["owl", ""])
def test_encode_joins_the_template_the_response_and_the_eos(
    tiny_tokenizer, template, language, given
):
    row = {"instruction": "Translate.", "input": given, "prompt": "", "completion": "猫头鹰"}
    encoded = instruction.encode([row], tiny_tokenizer, InstructionConfig(template=template))
    form = templates.ALPACA[f"{language}_input" if given else language]
    text = form.format(instruction="Translate.", input=given)
    assert text.endswith(("### Response:\n", "### 回复：\n")) and ("owl" in text) == bool(given)
    prompt, answer = (tiny_tokenizer(part)["input_ids"] for part in (text, "猫头鹰"))
    ids, mask = (part.tolist() for part in encoded[0])
    assert ids == [*prompt, *answer, tiny_tokenizer.eos_token_id]
    assert mask == [0] * len(prompt) + [1] * (len(answer) + 1)


def test_the_chapters_loop_learns_prompts_and_no_end(tiny_tokenizer):
    right = instruction.encode(ROWS, tiny_tokenizer, InstructionConfig())
    settings = InstructionConfig(learn_prompt=True, learn_eos=False)
    wrong = instruction.encode(ROWS, tiny_tokenizer, settings)
    for good, bad in zip(right, wrong, strict=True):
        assert good.ids.tolist() == [*bad.ids, tiny_tokenizer.eos_token_id]
        assert bad.mask.all() and len(bad.mask) == len(bad.ids)
    assert wrong.response_tokens == wrong.tokens == right.tokens - len(ROWS)
    for setting in ({"template": "aplaca"}, {"max_length": 1}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            InstructionConfig(**setting)


def test_vary_keeps_count_and_mix():
    rows = tinytown.instruction_rows("train", 1500)
    poor = instruction.vary(rows, 1200, phrasings=1)
    assert instruction.vary(rows, 1200) == rows[:1200]
    assert {row["phrasing"] for row in poor} == {"ask0"} != {row["phrasing"] for row in rows}
    groups = {(row["task"], row["lang"]) for row in poor}
    kept = [row for row in rows if (row["task"], row["lang"]) in groups][:1200]
    assert [(r["task"], r["lang"]) for r in poor] == [(r["task"], r["lang"]) for r in kept]
    english = instruction.vary(rows, 2000, languages=["en"], families=["fact", "polite"])
    assert len(english) == 2000 and {r["lang"] for r in english} == {"en"}
    assert {r["task"] for r in english} == {"fact", "polite"}
    with pytest.raises(ValueError, match="families"):
        instruction.vary(rows, 10, families=["opposite"])


def test_contains_looks_inside_but_not_inside_words():
    row = {"task": "counting", "lang": "en", "completion": "3.", "accept": ["3."]}
    assert instruction.contains(row, "There are 3 of them, I think")
    assert not instruction.contains(row, "There are 13 of them")
    zh = {"task": "to_zh", "lang": "en", "completion": "医生。", "accept": ["医生"]}
    assert instruction.contains(zh, "她是医生吗")
    listing = row | {"task": "listing", "completion": "Red, blue.", "accept": ["red", "blue"]}
    assert not instruction.contains(listing, "red")
    assert instruction.contains({"prompt": "?", "completion": "Paris"}, "It is paris.")


def test_end_probability(tiny_model, tiny_tokenizer):
    """The probability that one forward pass gives to the EOS after each response."""
    encoded = data.encode(ROWS, tiny_tokenizer)
    logits = [tiny_model()(input_ids=torch.from_numpy(e.ids)[None]).logits for e in encoded]
    expected = [p.softmax(-1)[0, -2, tiny_tokenizer.eos_token_id].item() for p in logits]
    found = instruction.end_probability(tiny_model(), encoded)
    assert found == pytest.approx(np.mean(expected), rel=1e-4)
