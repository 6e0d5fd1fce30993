"""Full fine-tuning and its remedies: the L2-SP penalty, what is frozen, replay."""

import random

import pytest
import torch
from helpers import weights_of
from torch import nn

from labkit import data, models, training
from labkit.techniques import full
from labkit.techniques.full import FullConfig

ROWS = [{"prompt": f"What is {n} plus one?", "completion": str(n + 1)} for n in range(30)]
TEXTS = [f"{n} and one is {n + 1}." for n in range(30)]


def tune(model, tokenizer, **options):
    encoded = data.encode(ROWS[:16], tokenizer, max_length=64)
    config = training.TrainConfig(learning_rate=1e-2, batch_size=4, precision="fp32")
    return training.fit(model, encoded, training.sft_loss, config, progress=False, **options)


def test_worked_example():
    """Weights (1, 2), (3) with reference (1, 0), (0): mean of 0, 4, 9 is 13/3.

    The gradient is 2 (p - p0) / 3: (0, 4/3) and 2.
    """
    model = nn.ParameterDict({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])})
    value = full.l2_sp(model, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])})
    value.backward()
    assert value.item() == pytest.approx(13 / 3)
    assert model["a"].grad.tolist() == pytest.approx([0, 4 / 3])
    assert model["b"].grad.tolist() == pytest.approx([2])


def test_the_penalty_and_its_gradient_are_zero_at_the_start(tiny_model, arch):
    model = tiny_model(arch)
    reference = full.reference_weights(model)
    value = full.l2_sp(model, reference)
    value.backward()
    assert value.item() == 0 and full.penalty(model, FullConfig()) is None
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    penalty = full.penalty(model, FullConfig(alpha=3.0))
    model.get_output_embeddings().weight.data[3, 5] += 1  # a tied weight counts once
    expected = 3 / models.parameter_counts(model).total
    assert penalty(model).item() == pytest.approx(expected, rel=1e-4)


def test_a_strong_penalty_keeps_the_weights_nearer_and_is_not_reported(tiny_model, tiny_tokenizer):
    moved = {}
    for alpha in (0.0, 1e5):
        model = tiny_model("llama")
        start, penalty = full.reference_weights(model), full.penalty(model, FullConfig(alpha=alpha))
        extra = lambda model, penalty=penalty: 100 + (penalty(model) if penalty else 0)  # noqa: E731
        result = tune(model, tiny_tokenizer, extra_loss=extra)
        assert all(entry["loss"] < 10 for entry in result.history)
        moved[alpha] = full.l2_sp(model, start).item()
    assert 0 < moved[1e5] < moved[0.0] / 2


def test_frozen_weights_do_not_move_and_the_others_do(tiny_model, tiny_tokenizer, arch):
    model = full.attach(tiny_model(arch), FullConfig(frozen_layers=1, frozen_embeddings=True))
    before = weights_of(model)
    lower = {id(p) for p in full.layers(model)[0].parameters()}
    lower.add(id(model.get_input_embeddings().weight))
    weights = dict(model.named_parameters())
    assert not any(id(weights[name]) in lower for name in full.reference_weights(model))
    tune(model, tiny_tokenizer)
    moved = {id(p): not torch.equal(p, before[n]) for n, p in model.named_parameters()}
    assert not any(moved[i] for i in lower)
    assert all(moved[id(p)] for p in full.layers(model)[1].parameters() if p.ndim == 2)
    assert models.parameter_counts(full.attach(model, FullConfig())).share == 1


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.25, 10), (0.5, 30)])
def test_replay_share_is_exact_and_repeatable(share, count):
    """30 rows: 10 texts make a quarter of 40, 30 a half of 60. Recorded results need the draws."""
    mixed = full.mix_replay(ROWS, TEXTS, share, seed=3)
    texts = [row["text"] for row in mixed if "text" in row]
    assert len(texts) == len(set(texts)) == count == share * len(mixed)
    rng = random.Random(3)
    expected = [*ROWS, *({"text": text} for text in rng.sample(TEXTS, count))]
    if count:
        rng.shuffle(expected)
    assert mixed == expected


def test_refusals(tiny_model):
    for wrong in ({"alpha": -1.0}, {"replay": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FullConfig(**wrong)
    with pytest.raises(ValueError, match="frozen_layers"):
        full.attach(tiny_model("llama"), FullConfig(frozen_layers=3))
    with pytest.raises(ValueError):
        full.mix_replay(ROWS, TEXTS[:29], 0.5)
    with pytest.raises(AttributeError, match="bias"):
        full.l2_sp(nn.Linear(3, 2, bias=False), full.reference_weights(nn.Linear(3, 2)))
