"""Energies of updates against matrices whose singular values are known."""

import pytest
import torch

from labkit import spectra


def test_energy_of_a_diagonal():
    """Singular values 3, 2, 1 (signs and order do not matter): squares 9, 4, 1 of 14."""
    matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
    assert spectra.energy(matrix, [1, 2, 3, 9]) == pytest.approx([9 / 14, 13 / 14, 1, 1])
    with pytest.raises(ValueError, match="zero"):
        spectra.energy(torch.zeros(4, 4), [1])


def test_a_random_matrix_prefers_no_direction():
    noise = spectra.random_like({"w": torch.zeros(256, 256)})
    shares = spectra.mean_energy(noise, [8, 64, 256])
    assert 8 / 256 < shares["8"] < 0.15 and 64 / 256 < shares["64"] < 0.65
    assert shares["256"] == pytest.approx(1)


def test_updates_and_truncation(tiny_model, arch):
    """A change of rank one comes back whole at rank one; at full rank so does any change."""
    model = tiny_model(arch)
    origin = spectra.weights(model)
    assert not any("lm_head" in name or "embed" in name for name in origin)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in origin.items():
            rows, columns = weight.shape
            change = torch.randn(rows, 1) @ torch.randn(1, columns)
            model.get_submodule(name).weight += change
    tuned, changes = spectra.weights(model), spectra.updates(model, origin)
    spectra.truncate(model, origin, changes, rank=1)
    for name, weight in spectra.weights(model).items():
        torch.testing.assert_close(weight, tuned[name], atol=1e-4, rtol=1e-4)
    spectra.truncate(model, origin, changes, rank=0)
    assert all(torch.equal(w, origin[n]) for n, w in spectra.weights(model).items())
