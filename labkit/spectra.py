"""Singular values of weight updates: how many directions does a change of weights need?

Of an update D = W_tuned - W_0 with singular values s1 >= s2 >= …, the best approximation of rank
r keeps the share (s1² + … + sr²) / (s1² + s2² + …) of the energy (Eckart and Young 1936). A random
matrix prefers no direction, and yet keeps more than r / min(d, k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from labkit import models


def weights(model: Any) -> dict[str, Tensor]:
    """Float32 copies of the weights of all linear layers but the output head, by layer name."""
    layers = models.linear_layers(model).items()
    return {name: layer.weight.detach().float().clone() for name, layer in layers}


def updates(model: Any, origin: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W_tuned - W_0 for every layer of `origin`, which `weights` gave before training."""
    return {name: weight - origin[name] for name, weight in weights(model).items()}


def energy(matrix: Tensor, ranks: Sequence[int]) -> list[float]:
    """The share of the squared singular values of a (d, k) matrix in the first r, for each r."""
    squares = torch.linalg.svdvals(matrix.float()).double() ** 2
    if not squares.any():
        raise ValueError("matrix: expected an update other than zero; was the model trained?")
    shares = squares.cumsum(0) / squares.sum()
    return [shares[min(r, len(shares)) - 1].item() for r in ranks]


def mean_energy(matrices: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[str, float]:
    """`energy`, averaged over the matrices: {rank: share}."""
    each = [energy(matrix, ranks) for matrix in matrices.values()]
    return {str(r): fmean(shares[i] for shares in each) for i, r in enumerate(ranks)}


def random_like(matrices: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Matrices of independent normal numbers, of the same names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(m.shape, generator=generator) for n, m in matrices.items()}


@torch.no_grad()
def truncate(model: Any, origin: Mapping, changes: Mapping[str, Tensor], rank: int) -> None:
    """Sets each weight to W_0 plus the best approximation of its update of this rank."""
    for name, change in changes.items():
        u, s, v = torch.linalg.svd(change.float(), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        model.get_submodule(name).weight.copy_(origin[name] + best)
