"""Truths about log-probabilities: exact categoricals, padding that cannot matter, whitening."""

import math

import pytest
import torch

from labkit.logprobs import (
    masked_mean,
    masked_whiten,
    position_ids,
    sequence_logps,
    token_logps,
)


def test_token_logps_are_the_logs_of_known_probabilities():
    """Logits log p give back p: 1/2, 1/4 by hand, whatever constant is added."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    logits = (p.log() + torch.tensor([[3.0], [-7.0], [0.0]]))[None]
    logps = token_logps(logits, torch.tensor([[2, 0, 2]]))
    assert logps.tolist() == [pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-6)]


def test_token_logps_stay_exact_for_bfloat16_logits():
    logits = torch.zeros(1, 2, 1000, dtype=torch.bfloat16)
    logps = token_logps(logits, torch.zeros(1, 2, dtype=torch.long))
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(-math.log(1000), abs=1e-5)


def test_token_logps_refuse_shifted_logits():
    with pytest.raises(ValueError, match="logits.*unshifted"):
        token_logps(torch.zeros(1, 2, 5), torch.zeros(1, 3, dtype=torch.long))


def test_all_continuations_together_have_probability_one(tiny_model, arch):
    """The chain rule: the two-token responses' probabilities, given a prompt, sum to 1.

    Summed over every second token for a fixed first one, they give the first one's own.
    """
    model = tiny_model(arch)
    size = model.config.vocab_size
    prompt, first = [7, 11, 30], 42
    ids = torch.tensor([[*prompt, first, last] for last in range(size)])
    mask = torch.ones_like(ids)
    both = torch.tensor([0, 0, 0, 1, 1]).expand_as(ids)
    with torch.no_grad():
        joint = sequence_logps(model, ids, mask, both).exp().sum()
        one = torch.tensor([0, 0, 0, 1]).view(1, 4)
        alone = sequence_logps(model, ids[:1, :4], mask[:1, :4], one).exp()
        exact = model(ids[:1, :3]).logits[0, -1].softmax(-1)[first]
    assert joint.item() == pytest.approx(exact.item(), rel=1e-4)
    assert alone.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_under_padding_cannot_matter(tiny_model, arch, side):
    model = tiny_model(arch)
    prompt, response = [9, 20, 33, 8], [50, 61, 1]
    alone = torch.tensor([prompt + response])
    marks = torch.tensor([[0] * 4 + [1] * 3])
    with torch.no_grad():
        expected = sequence_logps(model, alone, torch.ones_like(alone), marks)
        for filler in (0, 5, 200):
            pad, zero = [filler] * 6, [0] * 6
            rows = [(pad, alone[0].tolist()), (zero, [1] * 7), (zero, marks[0].tolist())]
            ids, attention, response_mask = (
                torch.tensor([a + b if side == "left" else b + a]) for a, b in rows
            )
            got = sequence_logps(model, ids, attention, response_mask)
            assert got.item() == pytest.approx(expected.item(), abs=2e-4)


def test_a_first_token_has_no_context_even_after_padding(tiny_model):
    """With everything marked as response, padding before the first token changes nothing."""
    model = tiny_model()
    text = [9, 20, 33]
    plain = torch.tensor([text])
    with torch.no_grad():
        expected = sequence_logps(model, plain, torch.ones_like(plain), torch.ones_like(plain))
        for filler in (0, 77):
            ids = torch.tensor([[filler, filler, *text]])
            mask = torch.tensor([[0, 0, 1, 1, 1]])
            got = sequence_logps(model, ids, mask, torch.ones_like(ids))
            assert got.item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_average_is_the_sum_over_the_number_of_response_tokens(tiny_model):
    model = tiny_model()
    ids = torch.tensor([[9, 20, 33, 8, 40], [9, 21, 34, 9, 41]])
    ones = torch.ones_like(ids)
    marks = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    total = sequence_logps(model, ids, ones, marks)
    mean = sequence_logps(model, ids, ones, marks, average=True)
    assert torch.allclose(total, mean * torch.tensor([3.0, 1.0]))


def test_the_sum_is_minus_the_librarys_loss(tiny_model, arch):
    """Parity: transformers' mean cross-entropy with the prompt's labels ignored."""
    model = tiny_model(arch)
    ids = torch.tensor([[9, 20, 33, 8, 40, 41]])
    labels = ids.clone()
    labels[0, :3] = -100
    marks = torch.tensor([[0, 0, 0, 1, 1, 1]])
    loss = model(ids, labels=labels).loss
    mean = sequence_logps(model, ids, torch.ones_like(ids), marks, average=True)
    assert mean.item() == pytest.approx(-loss.item(), abs=1e-5)


def test_positions_count_real_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    positions = position_ids(mask)
    assert positions[0, 2:].tolist() == [0, 1, 2]
    assert positions[1, :3].tolist() == [0, 1, 2]
    assert positions.min() >= 0


def test_masked_mean_ignores_even_nan_under_the_mask():
    x = torch.tensor([[1.0, float("nan")], [2.0, 6.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, mask, dim=1).tolist() == [1.0, 4.0]
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
