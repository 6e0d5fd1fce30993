"""Truths about log-probabilities: exact categoricals, padding that cannot matter, whitening."""

import math

import pytest
import torch
from helpers import example

from labkit.batching import pack
from labkit.logprobs import (
    evaluating,
    masked_mean,
    masked_whiten,
    mean_by_example,
    response_logps,
    sum_by_example,
)


@torch.no_grad()
def sums(model, examples, packing=True, pad_id=0):
    batch = pack(examples, packing, pad_id)
    return sum_by_example(response_logps(model, batch), batch)


def test_all_continuations_together_have_probability_one(tiny_model, arch):
    """The chain rule: over every last token, the two-token responses that begin with one token
    have that token's own probability, given the prompt."""
    model, prompt, first = tiny_model(arch), [7, 11, 30], 42
    every = [example([*prompt, first, last], 3) for last in range(model.config.vocab_size)]
    joint = sums(model, every).exp().sum()
    with torch.no_grad():
        exact = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[first]
    alone = sums(model, [example([*prompt, first], 3)]).exp()
    assert joint.item() == pytest.approx(exact.item(), rel=1e-4)
    assert alone.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_what_stands_beside_and_under_padding_cannot_matter(tiny_model, arch, packing):
    model, one = tiny_model(arch), example([9, 20, 33, 8, 50, 61, 1], 4)
    expected = sums(model, [one], packing=False)[0].item()
    for filler in (0, 5, 200):
        for other in ([7] * 30, [8, 9]):
            found = sums(model, [example(other, 1), one], packing, filler)[1]
            assert found.item() == pytest.approx(expected, abs=2e-4)


def test_sums_and_means_by_example(tiny_model):
    batch = pack([example([9, 20, 33, 8, 40], 2), example([9, 21], 1), example([3] * 9, 8)])
    values = torch.arange(5.0)
    counts, sums = torch.tensor([3.0, 1.0, 1.0]), sum_by_example(values, batch)
    assert torch.equal(sum_by_example(torch.ones(5), batch), counts)
    torch.testing.assert_close(mean_by_example(values, batch) * counts, sums)
    logps = response_logps(tiny_model(), batch)
    pieces = batch.in_order(logps).split([3, 1, 1])
    torch.testing.assert_close(torch.stack([p.sum() for p in pieces]), sum_by_example(logps, batch))


def test_log_probabilities_stay_exact_in_bfloat16(tiny_model):
    """A model that knows nothing gives each of 448 tokens -log 448, whatever its precision."""
    model = tiny_model().bfloat16()
    torch.nn.init.zeros_(model.lm_head.weight)
    logps = response_logps(model, pack([example([5, 6, 7], 1)]))
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx([-math.log(448)] * 2, abs=1e-5)


def test_each_part_gets_its_own_mode_back(tiny_model):
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError
    assert [m.training for m in model.modules()] == before


def test_masked_mean_ignores_even_nan_under_the_mask():
    x = torch.tensor([[1.0, float("nan")], [2.0, 6.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert masked_mean(x, mask).item() == 3.0
    assert math.isnan(masked_mean(x, torch.zeros(2, 2)).item())
    with pytest.raises(ValueError, match="mask"):
        masked_mean(x, torch.ones(2))


def test_whitened_values_have_mean_zero_and_variance_one():
    """By hand: 1 and 3 have mean 2 and population deviation 1, so they become -1 and 1."""
    x = torch.tensor([1.0, 99.0, 3.0])
    mask = torch.tensor([1, 0, 1])
    assert masked_whiten(x, mask).tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)
    x, mask = torch.randn(8, 30) * 5 + 4, torch.rand(8, 30) > 0.4
    kept = masked_whiten(x, mask)[mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-5)
    assert kept.pow(2).mean().item() == pytest.approx(1, abs=1e-4)
