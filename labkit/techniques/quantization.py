"""Weights in four bits, from scratch: the tables, blocks, packing and double quantization.

    Ŵ = s · table[code]        a code of 4 bits per weight, a scale s = max |w| per block

The core of `qlora` (Dettmers et al. 2023); the codes are those of bitsandbytes, bit for bit.
"""

from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_BLOCK = 256  # scales that share a scale of their own


def _nf4() -> Tensor:
    """Quantiles of the standard normal in [-1, 1]: seven below zero, zero, eight above.

    Their probabilities are evenly spaced, from 1/2 to 1 - (1/30 + 1/32) / 2 (to seven digits).
    """
    halves = (torch.linspace(0.9677083, 0.5, n + 1)[:-1].tolist() for n in (7, 8))
    low, high = ([NormalDist().inv_cdf(p) for p in half] for half in halves)
    values = torch.tensor([*(-value for value in low), 0.0, *reversed(high)])
    return values / values.max()


def _dynamic8() -> Tensor:
    """256 values for the scales (Dettmers 2015): decades from 1e-6 to 1, each twice as fine."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*decade.tolist(), *(-decade).tolist()]
    return torch.tensor(sorted(values))


NF4, DYNAMIC8 = _nf4(), _dynamic8()
# bitsandbytes' float: its smallest value above zero is 1/192 of the largest, E2M1's is 1/12.
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
INT4 = torch.arange(-7, 8) / 7  # the sixteenth code would break the symmetry
TABLES = {"nf4": NF4, "fp4": FP4, "int4": INT4}


def to_codes(values: Tensor, table: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """code = argmin_i |w / s - table_i| for each weight, with s = max |w| over its block.

    n values of any shape give codes (n,) in uint8 and scales (ceil(n / block_size),) in float32.
    """
    flat, table = values.detach().float().flatten(), table.to(values.device)
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    scales = blocks.abs().amax(1)
    divisors = scales.clamp(min=1e-38)[:, None]  # a block of zeros has the scale 0
    scaled = blocks * (1 / divisors)
    if len(flat) % block_size:  # there bitsandbytes divides, which can change a last bit
        scaled[-1] = blocks[-1] / divisors[-1]
    order = table.argsort(stable=True)
    middles = (table[order[1:]] + table[order[:-1]]) / 2
    codes = order[torch.bucketize(scaled.clamp(-1, 1), middles)]
    return codes.to(torch.uint8).flatten()[: len(flat)], scales


def from_codes(codes: Tensor, scales: Tensor, table: Tensor, block_size: int = 64) -> Tensor:
    """s · table[code]: the (n,) float32 values that codes (n,) and their scales stand for."""
    values = table.to(codes.device)[codes.int()]
    return values * scales.repeat_interleave(block_size)[: len(codes)]


def pack(codes: Tensor) -> Tensor:
    """Two codes per byte, the first in the high nibble: (n,) becomes (ceil(n / 2),)."""
    codes = F.pad(codes, (0, len(codes) % 2))
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of what `pack` made."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]


class Quantized(NamedTuple):
    """A quantized weight: bytes of two codes, and a scale (absmax) per block.

    Doubly quantized, `scales` are codes of 8 bits for scale - `mean`, one of `second_scales` per 256.
    """

    packed: Tensor
    scales: Tensor
    second_scales: Tensor | None = None
    mean: Tensor | None = None


def quantize(weight: Tensor, table: Tensor, block_size: int, double: bool) -> Quantized:
    """`weight` in four bits; with `double` its scales in eight."""
    codes, scales = to_codes(weight, table, block_size)
    if not double:
        return Quantized(pack(codes), scales)
    mean = scales.mean()
    return Quantized(pack(codes), *to_codes(scales - mean, DYNAMIC8, SCALE_BLOCK), mean)


def dequantize(weight: Quantized, shape: torch.Size, table: Tensor, block_size: int) -> Tensor:
    """Ŵ of this shape in float32; also from the tensors of a layer of bitsandbytes."""
    scales = weight.scales
    if weight.second_scales is not None:
        scales = from_codes(scales, weight.second_scales, DYNAMIC8, SCALE_BLOCK) + weight.mean
    codes = unpack(weight.packed.flatten(), shape.numel())
    return from_codes(codes, scales, table, block_size).view(shape)


def bits_per_weight(block_size: int = 64, double: bool = True) -> float:
    """4 + 32 / block, or with double quantization 4 + (8 + 32 / 256) / block."""
    return 4 + (8 + 32 / SCALE_BLOCK if double else 32) / block_size
