"""Preference pairs: rows of every layout, cut alike, what teaches nothing is left out and named."""

import logging
from functools import partial

import numpy as np
import pytest
import torch

from labkit import data, training
from labkit.formats import Located
from labkit.pairs import encode_pairs, pack_pairs
from labkit.techniques import dpo, orpo

ROW = {"prompt": "What is two?", "chosen": "It is two.", "rejected": "Bread."}
TURNS = [
    {"role": "user", "content": "What is two?"},
    {"role": "assistant", "content": "It is two."},
    {"role": "user", "content": "And four?"},
]


def texts(pair, tokenizer):
    both = (pair.chosen, pair.rejected)
    return [tokenizer.decode(example.ids[example.mask == 1]) for example in both]


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        ROW | {"prompt": TURNS},
        ROW | {"chosen": [{"role": "assistant", "content": "It is two."}]},
        {"prompt": "What is two?", "responses": ["Bread.", "It is two."], "ranks": [1, 0]},
    ],
)
def test_both_responses_follow_one_prompt_and_end(row, tiny_tokenizer):
    (pair,) = encode_pairs([row], tiny_tokenizer)
    assert texts(pair, tiny_tokenizer) == ["It is two.<|end|>", "Bread.<|end|>"]
    prompts = [example.ids[example.mask == 0] for example in (pair.chosen, pair.rejected)]
    assert np.array_equal(*prompts)
    encoded = data.encode([{"prompt": row["prompt"], "completion": "It is two."}], tiny_tokenizer)
    assert np.array_equal(encoded[0].ids, pair.chosen.ids)


def test_a_ranking_gives_all_its_pairs(tiny_tokenizer):
    row = {"prompt": "What?", "responses": ["c", "a", "b"], "ranks": [3, 1, 2]}
    found = [texts(p, tiny_tokenizer) for p in encode_pairs([row], tiny_tokenizer)]
    end = "<|end|>"
    assert found == [["a" + end, "b" + end], ["a" + end, "c" + end], ["b" + end, "c" + end]]


@pytest.mark.parametrize("limit", [24, 16, 12, 6])
def test_long_ones_are_cut_alike(limit, tiny_tokenizer):
    """(40 + 12, 40 + 5) at 24 keeps 12 of the prompt for both, not 12 and 19."""
    row = {"prompt": "p" * 40, "chosen": "abcdefghijk", "rejected": "wxyz"}
    (pair,) = encode_pairs([row], tiny_tokenizer, max_length=limit)
    prompts = [example.ids[example.mask == 0] for example in (pair.chosen, pair.rejected)]
    assert np.array_equal(*prompts)
    assert len(pair.chosen.ids) == limit >= len(pair.rejected.ids)
    assert pair.rejected.mask.any()


def test_what_teaches_nothing_is_left_out_and_named(tiny_tokenizer, caplog):
    same = {"prompt": "p", "chosen": "a" * 30 + "x", "rejected": "a" * 30 + "y"}
    rows = [ROW | {"rejected": " "}, ROW, ROW | {"rejected": ROW["chosen"]}, same]
    with caplog.at_level(logging.WARNING):
        assert len(encode_pairs(rows, tiny_tokenizer, max_length=20)) == 1
    assert "3 rows" in caplog.text and "row 1" in caplog.text
    for nothing in (rows[:1], [same], [], [{"prompt": "p", "completion": "q"}]):
        with pytest.raises(ValueError, match="rows"):
            encode_pairs(nothing, tiny_tokenizer, max_length=20)


def test_a_batch_holds_pairs_in_order(make_pairs):
    pairs = make_pairs(6)
    for packing in (True, False):
        batch = pack_pairs(pairs, packing)
        assert batch.weight == 6 and batch.size == 12 and batch.reference is None
        counts = np.bincount(batch.example.numpy(), minlength=12).reshape(6, 2)
        expected = [[p.chosen.mask.sum(), p.rejected.mask.sum()] for p in pairs]
        assert counts.tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("module", "config"),
    [(dpo, partial(dpo.DPOConfig, nll=0.5)), (orpo, orpo.ORPOConfig)],
    ids=["dpo", "orpo"],
)
def test_accumulation_changes_nothing(tiny_model, make_pairs, module, config, size):
    """8 pairs at once, 4 times 2, 8 times 1: the same gradients, of an NLL term as well."""
    pairs, weights = dpo.with_reference(make_pairs(8), tiny_model(seed=1)), []
    steps = dict(max_steps=1, optimizer="sgd", learning_rate=1.0, warmup_ratio=0.0)
    for batch_size in (8, size):
        model = tiny_model()
        made = config(batch_size=batch_size, gradient_accumulation=8 // batch_size, **steps)
        loss = partial(module.pair_loss, config=made)
        training.fit(model, pairs, loss, made, collate=pack_pairs, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_rows_of_one_place_are_told_apart(tiny_tokenizer):
    """Two files of one name may be loaded into one list: their rows then have one place."""
    rows = [Located(ROW), Located(ROW | {"chosen": "Two."})]
    for row in rows:
        row.where = "data: a.jsonl, row 1"
    found = [texts(pair, tiny_tokenizer)[0] for pair in encode_pairs(rows, tiny_tokenizer)]
    assert found == ["It is two.<|end|>", "Two.<|end|>"]
