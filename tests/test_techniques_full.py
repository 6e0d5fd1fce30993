"""Full fine-tuning and its remedies: the pull, what is frozen, replay."""

import pytest
import torch
from torch import nn

from labkit import data, models, training
from labkit.techniques import full
from labkit.techniques.full import FullConfig

ROWS = [{"prompt": f"What is {n} plus one?", "completion": str(n + 1)} for n in range(30)]
TEXTS = [f"{n} and one is {n + 1}." for n in range(30)]


def move(model, step):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += step


def tune(model, tokenizer, **options):
    encoded = data.encode(ROWS[:16], tokenizer, max_length=64)
    config = training.TrainConfig(learning_rate=1e-2, batch_size=4, precision="fp32")
    training.sft(model, tokenizer, encoded.dataset, config, progress=False, **options)
    return model


def test_worked_example():
    """Weights (1, 2), (3) with reference (1, 0), (0): mean of 0, 4, 9 is 13/3.

    The gradient is 2 (p - p0) / 3: (0, 4/3) and 2.
    """
    model = nn.ParameterDict(
        {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([3.0]))}
    )
    value = full.l2_pull(model, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])})
    value.backward()
    assert value.item() == pytest.approx(13 / 3)
    assert model["a"].grad.tolist() == pytest.approx([0, 4 / 3])
    assert model["b"].grad.tolist() == pytest.approx([2])


def test_pull_is_zero_at_the_start_and_so_is_its_gradient(tiny_model, arch):
    model = tiny_model(arch)
    value = full.l2_pull(model, full.keep(model))
    value.backward()
    assert value.item() == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


def test_pull_does_not_depend_on_the_size_of_the_model():
    """All weights moved by 0.1: the mean of squares is 0.01, for 10 weights as for 10,000."""
    for size in (10, 10_000):
        layer = nn.Linear(size, 1, bias=False)
        reference = full.keep(layer)
        move(layer, 0.1)
        assert full.l2_pull(layer, reference).item() == pytest.approx(0.01, rel=1e-4)


def test_shared_weights_count_once(tiny_model):
    """With a tied head, N is the number of different weights: moving one by 1 gives 1 / N."""
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    reference = full.keep(model)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    count = models.parameter_counts(model).total
    assert full.l2_pull(model, reference).item() == pytest.approx(1 / count, rel=1e-4)


def test_reference_is_a_copy_on_its_own():
    layer = nn.Linear(3, 2)
    reference = full.keep(layer)
    before = reference["weight"].clone()
    move(layer, 1.0)
    assert torch.equal(reference["weight"], before)
    assert not any(p0.requires_grad for p0 in reference.values())


def test_reference_in_bfloat16_halves_the_memory_and_stays_near_zero():
    layer = nn.Linear(64, 64)
    small, large = full.keep(layer, torch.bfloat16), full.keep(layer)
    assert sum(p.nbytes for p in small.values()) * 2 == sum(p.nbytes for p in large.values())
    # bfloat16 has 8 significant bits: rounding is off by at most 2^-9 of the weight
    largest = max(p.abs().max().item() for p in layer.parameters())
    assert 0 < full.l2_pull(layer, small).item() <= (largest / 2**8) ** 2


def test_weights_stored_in_bfloat16_are_kept_exactly():
    layer = nn.Linear(8, 8).to(torch.bfloat16).float()
    assert full.l2_pull(layer, full.keep(layer, torch.bfloat16)).item() == 0


def test_the_callers_loss_is_unchanged():
    layer = nn.Linear(3, 2)
    reference = full.keep(layer)
    move(layer, 1.0)
    loss = torch.tensor(2.0)
    total = full.regularized(loss, layer, reference, alpha=3.0)
    assert loss.item() == 2.0
    assert total.item() == pytest.approx(5.0)


def test_reference_of_another_model_is_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="reference: weight: expected .2, 4., got .2, 3."):
        full.l2_pull(layer, full.keep(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="no such weight"):
        full.l2_pull(nn.Linear(3, 2, bias=False), full.keep(layer))


def test_no_pull_without_alpha(tiny_model):
    assert full.pull(tiny_model("llama"), FullConfig()) is None


def test_a_strong_pull_keeps_the_weights_nearer(tiny_model, tiny_tokenizer):
    moved = {}
    for alpha in (0.0, 1e5):
        model = tiny_model("llama")
        start = full.keep(model)
        tune(model, tiny_tokenizer, extra_loss=full.pull(model, FullConfig(alpha=alpha)))
        moved[alpha] = full.l2_pull(model, start).item()
    assert 0 < moved[1e5] < moved[0.0] / 2


def test_frozen_weights_do_not_move_and_the_others_do(tiny_model, tiny_tokenizer, arch):
    model = full.attach(tiny_model(arch), FullConfig(frozen_layers=1, frozen_embeddings=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lower = {id(p) for p in full.layers(model)[0].parameters()}
    lower.add(id(model.get_input_embeddings().weight))
    tune(model, tiny_tokenizer)
    moved = {id(p): not torch.equal(p, before[n]) for n, p in model.named_parameters()}
    assert not any(moved[i] for i in lower)
    assert all(moved[id(p)] for p in full.layers(model)[1].parameters() if p.ndim == 2)


def test_everything_trains_by_default_even_after_freezing(tiny_model, arch):
    model = full.attach(tiny_model(arch), FullConfig(frozen_layers=2))
    assert models.parameter_counts(model).share < 1
    assert models.parameter_counts(full.attach(model, FullConfig())).share == 1


def test_frozen_weights_are_not_copied(tiny_model):
    model = full.attach(tiny_model("llama"), FullConfig(frozen_layers=1))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and not frozen & set(full.keep(model))


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.25, 10), (0.5, 30)])
def test_replay_share_is_exact(share, count):
    """30 rows: 10 texts make a quarter of 40, 30 a half of 60."""
    mixed = full.mix_replay(ROWS, TEXTS, share, seed=3)
    texts = [row["text"] for row in mixed if "text" in row]
    assert len(texts) == len(set(texts)) == count
    assert len(mixed) == 30 + count
    assert all(row in mixed for row in ROWS)
    assert len(texts) == share * len(mixed)


def test_replay_is_mixed_in_and_repeatable():
    first = full.mix_replay(ROWS, TEXTS, 0.5, seed=3)
    kinds = ["text" in row for row in first]
    assert sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) > 10
    assert first == full.mix_replay(ROWS, TEXTS, 0.5, seed=3)
    assert first != full.mix_replay(ROWS, TEXTS, 0.5, seed=4)
    assert full.mix_replay(ROWS, [], 0.0) == ROWS


def test_replayed_text_carries_loss_on_every_token(tiny_tokenizer):
    mixed = full.mix_replay(ROWS[:1], TEXTS[:1], 0.5)
    encoded = data.encode(mixed, tiny_tokenizer, max_length=64)
    whole = ["text" in row for row in mixed]
    assert [all(mask) for mask in encoded.dataset["completion_mask"]] == whole


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": -1.0}, {"alpha": float("nan")}, {"replay": 1.0}, {"frozen_layers": -1},
     {"frozen_layers": 1.5}, {"reference_dtype": "int8"}],
)  # fmt: skip
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        FullConfig(**wrong)


def test_too_much_is_refused(tiny_model):
    with pytest.raises(ValueError, match="frozen_layers: expected at most 2"):
        full.attach(tiny_model("llama"), FullConfig(frozen_layers=3))
    with pytest.raises(ValueError, match="texts: expected at least 30"):
        full.mix_replay(ROWS, TEXTS[:29], 0.5)
    with pytest.raises(ValueError, match="share: expected a share"):
        full.mix_replay(ROWS, TEXTS, 1.0)
    with pytest.raises(ValueError, match="weights that train"):
        full.keep(tiny_model("llama").requires_grad_(False))
