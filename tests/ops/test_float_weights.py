"""Weights of small floats: the reference and the kernel give the fp32 product of PyTorch's own values, rounded once."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.float_weights import Layout, kernel, reference
from fastplug.ops.float_weights.reference import E2M1

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates instead of rounding
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def every_byte(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1], device=device).remainder(256).to(torch.uint8).view(shape)


def assert_same(out: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(out, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("value", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_8_bit_value(
    op: ModuleType, device: torch.device, value: str, dtype: torch.dtype, scales: torch.dtype
) -> None:
    codes = every_byte((8, 64), device).view(TYPES[value])
    scale = torch.rand(8, 1, device=device).add(0.1).to(scales)
    out = torch.empty(8, 64, dtype=dtype, device=device)
    op.decode(codes, scale, Layout((8, 64), value, (1, 64)), out)
    assert_same(out, (codes.float() * scale.float()).to(dtype))


@pytest.mark.parametrize(
    ("shape", "block"),
    [((9, 77), (9, 77)), ((9, 77), (1, 77)), ((9, 77), (4, 13)), ((260, 130), (128, 128)), ((5, 96), (1, 32)),
     ((5, 100), (1, 32)), ((40, 384), (128, 128)), ((1, 1), (1, 1))],
    ids=str,
)  # fmt: skip
def test_blocks_and_row_ranges(
    op: ModuleType, device: torch.device, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    (N, K), (high, wide) = shape, block
    codes = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-N // high), -(-K // wide), device=device)
    truth = codes.float() * scales.repeat_interleave(high, 0)[:N].repeat_interleave(wide, 1)[:, :K]
    layout = Layout(shape, "e4m3", block)
    for start in {0, N // 3, N - 1, N}:
        for pad in (1, 8):
            buffer = torch.full((N - start, K + pad), 7.0, device=device)
            op.decode(codes, scales, layout, buffer[:, :-pad], row_start=start)
            assert torch.equal(buffer[:, :-pad], truth[start:])
            assert (buffer[:, -pad:] == 7.0).all()


def four_bit(shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of two values each, and the values."""
    packed = every_byte((shape[0], shape[1] // 2), device)
    low, high = (packed & 15).int(), (packed >> 4).int()
    return packed, torch.tensor(E2M1, device=device)[torch.stack((low, high), -1).flatten(1)]


def test_4_bit_values_are_those_of_the_format() -> None:
    """E2M1: exponent bias 1, one bit of mantissa, no infinity (OCP Microscaling Formats 1.0, table 4)."""
    expected = []
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        expected.append(-magnitude if code & 8 else magnitude)
    assert list(E2M1) == expected


@pytest.mark.parametrize("shape", [(8, 64), (9, 96), (3, 416)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_mxfp4(op: ModuleType, device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, values = four_bit(shape, device)
    exponents = torch.randint(107, 140, (shape[0], shape[1] // 32), dtype=torch.uint8, device=device)
    out = torch.empty(shape, dtype=dtype, device=device)
    op.decode(packed, exponents, Layout(shape, "e2m1", (1, 32), "e8m0"), out)
    assert_same(out, torch.ldexp(values, exponents.int().repeat_interleave(32, 1) - 127).to(dtype))


def test_ends_of_the_exponents(op: ModuleType, device: torch.device) -> None:
    packed = torch.full((4, 16), 0x22, dtype=torch.uint8, device=device)  # all ones
    exponents = torch.tensor([[0], [1], [254], [255]], dtype=torch.uint8, device=device)
    out = torch.empty(4, 32, device=device)
    op.decode(packed, exponents, Layout((4, 32), "e2m1", (1, 32), "e8m0"), out)
    truth = torch.tensor([2.0**-127, 2.0**-126, 2.0**127, torch.nan], device=device)
    assert_same(out, truth[:, None].expand(4, 32))


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("shape", [(8, 64), (5, 48)], ids=str)
def test_nvfp4(op: ModuleType, device: torch.device, shape: tuple[int, int], divide: bool) -> None:
    packed, values = four_bit(shape, device)
    scales = (torch.rand(shape[0], shape[1] // 16, device=device) * 400).to(torch.float8_e4m3fn)
    outer = torch.tensor([1234.5 if divide else 1 / 1234.5], device=device)
    buffer = torch.full((shape[0], shape[1] + 8), 7.0, device=device)
    op.decode(packed, scales, Layout(shape, "e2m1", (1, 16), "e4m3", divide), buffer[2:, :-8], outer=outer, row_start=2)
    scale = scales.float() / outer if divide else scales.float() * outer
    assert torch.equal(buffer[2:, :-8], (values * scale.repeat_interleave(16, 1))[2:])
    buffer[2:, :-8] = 7.0
    assert (buffer == 7.0).all()


def test_bytes_at_an_odd_address(op: ModuleType, device: torch.device) -> None:
    packed, values = four_bit((4, 64), device)
    shifted = torch.cat((packed.new_zeros(1), packed.flatten()))[1:].view(4, 32)
    out = torch.empty(4, 64, device=device)
    exponents = torch.full((4, 2), 127, dtype=torch.uint8, device=device)
    op.decode(shifted, exponents, Layout((4, 64), "e2m1", (1, 32), "e8m0"), out)
    assert torch.equal(out, values)


def test_what_does_not_fit_is_refused(op: ModuleType, device: torch.device) -> None:
    codes, scales, out = every_byte((8, 64), device), torch.rand(8, 1, device=device), torch.empty(8, 64, device=device)
    with pytest.raises(ValueError, match="do not lie in a weight of 8 x 64"):
        op.decode(codes, scales, Layout((8, 64), "e4m3", (1, 64)), out, row_start=1)
    with pytest.raises(ValueError, match="take 512 bytes, there are 448"):
        op.decode(codes[1:], scales, Layout((8, 64), "e4m3", (1, 64)), out)
    with pytest.raises(ValueError, match=r"scales of shape \(8, 1\) do not fit 8 x 64 in blocks of 1 x 32"):
        op.decode(codes, scales, Layout((8, 64), "e4m3", (1, 32)), out)
    with pytest.raises(ValueError, match="do not divide into groups of 12"):
        op.decode(codes[:4], scales, Layout((8, 64), "e2m1", (1, 12), "e8m0"), out)
    with pytest.raises(ValueError, match="e8m0 scales have dtype"):
        op.decode(codes[:4], scales, Layout((8, 64), "e2m1", (1, 64), "e8m0"), out)
    with pytest.raises(ValueError, match="dtype"):
        op.decode(codes.int(), scales, Layout((8, 64), "e4m3", (1, 64)), out)


def test_custom_op(device: torch.device) -> None:
    codes, scales, out = every_byte((8, 64), device), torch.rand(8, 1, device=device), torch.empty(8, 64, device=device)
    torch.library.opcheck(kernel.float_decode.op, (codes, scales, None, out, "e4m3", 1, 64, "float", False, 0))
