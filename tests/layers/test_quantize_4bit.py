"""Quantizing to 4 bits: bit for bit what bitsandbytes makes."""

from __future__ import annotations

import pytest
import torch

from fastplug.ops.nf4.reference import decode_weight
from fastplug.ops.quantize_4bit import codes, implementation, kernel, reference

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(6, 128), (33, 64), (5, 77), (1, 3), (1, 1)]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("kind", codes.KINDS)
def test_the_values_of_the_codes(bnb, kind):
    assert torch.equal(codes.values(kind), bnb.get_4bit_type(kind, device="cpu"))
    assert torch.equal(codes.scale_values(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", codes.KINDS)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_exact(bnb, device, dtype, kind, blocksize, shape):
    weight = torch.randn(shape, device=device).to(dtype)
    theirs, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=kind)
    packed, absmax = implementation(device).quantize(weight, kind, blocksize)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(absmax, state.absmax)


def test_a_matrix_of_several_chunks(bnb, device, monkeypatch):
    weight = torch.randn(96, 1024, device=device)
    monkeypatch.setattr(reference, "_CHUNK", 1 << 14)
    packed, absmax = reference.quantize(weight)
    if device.type == "cpu":
        theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert torch.equal(packed, theirs.flatten())
        assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("count", [1, 255, 256, 3000, 100_000])
def test_double_quantization_is_bit_exact(bnb, device, count):
    absmax = torch.rand(count, device=device) * 0.1
    offset = absmax.mean()
    theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    found, absmax2, mean, table = implementation(device).quantize_scales(absmax)
    assert torch.equal(mean, offset)
    assert torch.equal(absmax2, state.absmax)
    assert torch.equal(table, state.code)
    assert torch.equal(found, theirs)


@pytest.mark.parametrize("kind", codes.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_takes_the_nearest_code(device, kind, dtype):
    weight = torch.randn(40, 96, device=device).to(dtype)
    packed, absmax = kernel.quantize(weight, kind, 64)
    expected, scales = reference.quantize(weight, kind, 64)
    assert torch.equal(absmax, scales)
    table = codes.values(kind, device)
    mine, theirs = (decode_weight(p, absmax, table, 64, (40, 96), torch.float32) for p in (packed, expected))
    distance = (weight.float() - mine).abs() - (weight.float() - theirs).abs()
    assert float(distance.abs().max()) <= 1e-6  # the same codes but for values halfway between two


def test_kernel_of_scales_takes_the_nearest_code(device):
    absmax = torch.rand(1000, device=device)
    found, absmax2, offset, table = kernel.quantize_scales(absmax)
    shifted = absmax - offset
    scaled = shifted / absmax2.repeat_interleave(256)[:1000]
    best = (scaled[:, None] - table).abs().amin(1)
    assert torch.allclose((scaled - table[found.int()]).abs(), best, atol=1e-6)


@pytest.mark.parametrize("op", [reference, kernel], ids=["reference", "kernel"])
def test_zeros(op, device):
    weight = torch.zeros(4, 64, device=device)
    packed, absmax = op.quantize(weight)
    assert not absmax.any()
    decoded = decode_weight(packed, absmax, codes.values("nf4", device), 64, (4, 64), torch.float32)
    assert not decoded.any()
    found, absmax2, offset, table = op.quantize_scales(absmax)
    assert not (table[found.int()] * absmax2.repeat_interleave(256)[:4] + offset).any()


def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match="no 4-bit format 'int4'"):
        reference.quantize(torch.randn(4, 64), "int4")
    with pytest.raises(ValueError, match="blocksize 48"):
        reference.quantize(torch.randn(4, 64), blocksize=48)
    with pytest.raises(ValueError, match=r"torch\.float64 cannot"):
        reference.quantize(torch.randn(4, 64).double())
    with pytest.raises(ValueError, match="no values"):
        kernel.quantize(torch.randn(0, 64))
