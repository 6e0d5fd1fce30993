"""Four bits per weight: truths of tables, blocks and packing, then parity with bitsandbytes."""

import pytest
import torch

from labkit.techniques import quantization as q

SHAPES = [(96, 256), (256, 688), (96, 32), (7, 33), (1, 1), (1000,), (5, 48), (4, 8, 16)]


@pytest.fixture(scope="module")
def functional():
    """bitsandbytes' functions on tensors."""
    from bitsandbytes import functional

    return functional


def normal(*shape, seed=0, std=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def test_nf4_splits_the_normal_evenly():
    """Between neighbours lies the same share of a normal distribution, on each side of zero."""
    widest = torch.special.ndtri(torch.tensor(0.9677083))
    steps = torch.special.ndtr(q.NF4.double() * widest).diff()
    for half, count in ((steps[:7], 7), (steps[7:], 8)):
        expected = torch.full_like(half, 0.4677083 / count)
        torch.testing.assert_close(half, expected, atol=1e-6, rtol=0)
    assert q.NF4[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]


def test_tables_are_those_of_bitsandbytes(functional):
    for name in ("nf4", "fp4"):
        assert torch.equal(q.TABLES[name], functional.get_4bit_type(name, device="cpu"))
    assert torch.equal(q.DYNAMIC8, functional.create_dynamic_map())


def test_worked_example():
    """s = 2, so w / s = (0.5, -1, 0, 0.3), between the values and middles of NF4:

    0.5 lies below 0.502, the middle of codes 12 and 13; -1 is code 0 and 0 is code 7; 0.3 lies
    above 0.292, the middle of codes 10 and 11. In bytes: 12, 0 and 7, 11.
    """
    codes, scales = q.to_codes(torch.tensor([1.0, -2.0, 0.0, 0.6]), q.NF4, 4)
    assert (codes.tolist(), scales.tolist()) == ([12, 0, 7, 11], [2.0])
    assert q.pack(codes).tolist() == [0xC0, 0x7B]
    back = q.from_codes(codes, scales, q.NF4, 4)
    torch.testing.assert_close(back, torch.tensor([0.8814, -2.0, 0.0, 0.6758]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", q.TABLES)
def test_every_weight_gets_the_nearest_value(name):
    weight, table = normal(40, 50), q.TABLES[name]
    codes, scales = q.to_codes(weight, table, 64)
    each = scales.repeat_interleave(64)[:2000, None]
    distances = (weight.flatten()[:, None] - each * table).abs()
    chosen = distances.gather(1, codes[:, None].long())[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), atol=1e-8, rtol=0)


def test_scale_does_not_matter_and_zeros_stay_zero():
    weight = normal(8, 64)
    codes, scales = q.to_codes(weight, q.NF4, 32)
    scaled, other = q.to_codes(1024 * weight, q.NF4, 32)
    assert torch.equal(codes, scaled) and torch.equal(1024 * scales, other)
    weight[:2] = 0
    codes, scales = q.to_codes(weight, q.NF4, 64)
    assert (q.pack(codes)[:64] == 0x77).all() and scales[:2].tolist() == [0, 0]
    assert (q.from_codes(codes, scales, q.NF4, 64)[:128] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(functional, name, dtype):
    for seed, shape in enumerate(SHAPES):
        weight = normal(*shape, seed=seed).to(dtype)
        weight.view(-1)[:100] = 0
        for size in (32, 64, 256, 4096):
            codes, scales = q.to_codes(weight, q.TABLES[name], size)
            packed, state = functional.quantize_4bit(weight, blocksize=size, quant_type=name)
            assert torch.equal(codes, q.unpack(packed.flatten(), weight.numel())), (shape, size)
            torch.testing.assert_close(scales, state.absmax, atol=1e-37, rtol=0)
            assert weight.numel() % 2 or torch.equal(q.pack(codes), packed.flatten())
            if shape == (96, 256) and size == 64 and dtype == torch.float32:
                stored = q.Quantized(packed, state.absmax)
                back = q.dequantize(stored, weight.shape, q.TABLES[name], size)
                assert torch.equal(back, functional.dequantize_4bit(packed, state))


def test_double_quantization_is_that_of_bitsandbytes(functional):
    """Its CPU code first rounds to 2^16 steps: the same codes, but at the middle between two."""
    weight = normal(512, 512)
    stored = q.quantize(weight, q.NF4, 64, double=True)
    _, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(stored.mean, state.offset)
    assert torch.equal(stored.second_scales, state.state2.absmax)
    scales = q.to_codes(weight, q.NF4, 64)[1] - stored.mean
    second = stored.second_scales.repeat_interleave(256)
    rounded = ((scales / second + 1) * 32767.5).round() / 32767.5 - 1
    same_grid = q.to_codes(rounded * second, q.DYNAMIC8, 256)[0]
    assert (same_grid == state.absmax).float().mean() > 0.9995
    assert (stored.scales == state.absmax).float().mean() > 0.99


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.126953125)])
def test_bits_are_counted(double, bits):
    weight = normal(1024, 1024)
    stored = q.quantize(weight, q.NF4, 64, double)._replace(mean=None)
    counted = 8 * sum(t.nbytes for t in stored if t is not None) / weight.numel()
    assert counted == q.bits_per_weight(64, double) == bits


def error(weight, name, double=False):
    stored = q.quantize(weight, q.TABLES[name], 64, double)
    return (q.dequantize(stored, weight.shape, q.TABLES[name], 64) - weight).square().mean().item()


def test_nf4_is_for_normal_weights_and_double_quantization_costs_little():
    weight = normal(512, 512)
    assert error(weight, "nf4") < 0.9 * min(error(weight, "fp4"), error(weight, "int4"))
    assert error(weight, "nf4") < error(weight, "nf4", True) < 1.02 * error(weight, "nf4")
    uniform = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    assert error(uniform, "int4") < 0.9 * error(uniform, "nf4")
