"""Weights in four bits, from scratch: the tables, blocks, packing and double quantization.

    Ŵ = c · table[code]        a code of 4 bits a weight, a constant c = max |w| a block

Pure functions on tensors, the core of `techniques/qlora` (Dettmers et al. 2023). The codes are
those of bitsandbytes, bit for bit. Left out: layers and training (`techniques/qlora`).
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F

SECOND_BLOCK = 256  # constants that share a constant of their own


@cache
def nf4() -> torch.Tensor:
    """The 16 values of NF4: quantiles of the standard normal, scaled to [-1, 1].

    They stand at evenly spaced probabilities from 1 - (1/30 + 1/32) / 2 (to seven digits, as in
    the published table) down to 1/2: eight steps above zero, seven below, and zero itself.
    """

    def quantiles(steps: int) -> list[float]:
        chances = torch.linspace(0.9677083, 0.5, steps + 1)[:-1].tolist()
        return [NormalDist().inv_cdf(p) for p in chances]

    values = torch.tensor([*(-q for q in quantiles(7)), 0.0, *reversed(quantiles(8))])
    return values / values.max()


@cache
def fp4() -> torch.Tensor:
    """bitsandbytes' float of four bits, by code: a sign, two bits of exponent, one of fraction.

    The smallest value above zero is 1/192 of the largest, where the common E2M1 has 1/12.
    """
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat([positive, -positive])


@cache
def int4() -> torch.Tensor:
    """Whole numbers from -7 to 7, over 7; the sixteenth code would break the symmetry."""
    return torch.arange(-7, 8) / 7


@cache
def dynamic8() -> torch.Tensor:
    """256 values for the constants: decades from 1e-6 to 1, each cut twice as fine as the last.

    Between an exponent and a fraction the eight bits are shared anew in each decade
    (Dettmers 2015).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*decade.tolist(), *(-decade).tolist()]
    return torch.tensor(sorted(values))


TABLES = {"nf4": nf4, "fp4": fp4, "int4": int4}


def quantize(
    values: torch.Tensor, table: torch.Tensor, block_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of the nearest table value for each weight, once its block fills [-1, 1].

        c = max |w| over the block,    code = argmin_i |w / c - table_i|

    n values of any shape give codes (n,) in uint8 and constants (ceil(n / block_size),) in
    float32. A block of zeros has the constant 0.
    """
    flat = values.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    constants = blocks.abs().amax(1)
    divisors = constants.clamp(min=1e-38)[:, None]
    scaled = blocks * (1 / divisors)
    if len(flat) % block_size:  # there bitsandbytes divides, and a last bit may hang on it
        scaled[-1] = blocks[-1] / divisors[-1]
    table = table.to(flat.device)
    order = table.argsort(stable=True)
    middles = (table[order[1:]] + table[order[:-1]]) / 2
    codes = order[torch.bucketize(scaled.clamp(-1, 1), middles)]
    return codes.to(torch.uint8).flatten()[: len(flat)], constants


def dequantize(
    codes: torch.Tensor, constants: torch.Tensor, table: torch.Tensor, block_size: int = 64
) -> torch.Tensor:
    """c · table[code]: the (n,) float32 values that stand for the quantized ones."""
    values = table.to(codes.device)[codes.int()]
    return values * constants.repeat_interleave(block_size)[: len(codes)]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the high nibble: (n,) becomes (ceil(n / 2),)."""
    codes = F.pad(codes, (0, len(codes) % 2))
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` codes of what `pack` made."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]


class Stored(NamedTuple):
    """A quantized weight: bytes of two codes, and a constant for each block.

    Doubly quantized, `constants` are codes of 8 bits for what they are above their `mean`, in
    units of `second`, one for each 256 of them.
    """

    packed: torch.Tensor
    constants: torch.Tensor
    second: torch.Tensor | None = None
    mean: torch.Tensor | None = None


def store(weight: torch.Tensor, table: torch.Tensor, block_size: int, double: bool) -> Stored:
    """`weight` in four bits; with `double` its constants, less their mean, in eight.

    The constants are all positive, so the mean is taken off to make use of the sign.
    """
    codes, constants = quantize(weight, table, block_size)
    if not double:
        return Stored(pack(codes), constants)
    mean = constants.mean()
    return Stored(pack(codes), *quantize(constants - mean, dynamic8(), SECOND_BLOCK), mean)


def rebuild(
    stored: Stored, shape: torch.Size, table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Ŵ of this shape in float32; also from the tensors of a layer of bitsandbytes."""
    constants = stored.constants
    if stored.second is not None:
        constants = dequantize(constants, stored.second, dynamic8(), SECOND_BLOCK) + stored.mean
    codes = unpack(stored.packed.flatten(), shape.numel())
    return dequantize(codes, constants, table, block_size).view(shape)


def bits_per_weight(block_size: int = 64, double: bool = True) -> float:
    """4 + 32 / block, or with double quantization 4 + (8 + 32 / 256) / block."""
    return 4 + (8 + 32 / SECOND_BLOCK if double else 32) / block_size
