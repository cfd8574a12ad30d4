"""Scaled columns and rows: both implementations against fp64, and what they may and may not write."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.scaling import kernel, reference
from fastplug.ops.table import TRITON_OPS, Guarded, table_for
from tests.accuracy import assert_as_accurate

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates instead of rounding
DTYPES = [torch.float32, torch.float16, BF16]
SHAPES = [(9, 64), (5, 77), (2, 3000), (700, 3), (1, 1)]

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def case(device, shape, dim, dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype), torch.rand(shape[dim], device=device) + 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.37])
@pytest.mark.parametrize("accumulate", [False, True])
def test_columns(op, device, dtype, shape, factor, accumulate):
    x, scale = case(device, shape, 1, dtype)
    start = torch.randn(shape, device=device).to(dtype)
    out = start.clone() if accumulate else torch.full_like(start, float("nan"))
    start = start if accumulate else torch.zeros_like(start)
    op.scale_columns(x, scale, out, factor, accumulate)
    truth = start.double() + factor * x.double() * scale.double()
    assert_as_accurate([out], [(start.float() + factor * (x.float() * scale)).to(dtype)], [truth])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(op, device, dtype, shape):
    x, scale = case(device, shape, 0, dtype)
    out = torch.full_like(x, float("nan"))
    op.scale_rows(x, scale, out)
    truth = x.double() * scale.double()[:, None]
    assert_as_accurate([out], [(x.float() * scale[:, None]).to(dtype)], [truth])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once_to_the_dtype_of_out(op, device, dtype):
    x, scale = case(device, (6, 40), 1, dtype)
    out = torch.empty(6, 40, device=device)
    op.scale_columns(x, scale.to(dtype), out)
    torch.testing.assert_close(out, x.float() * scale.to(dtype).float())


@pytest.mark.parametrize("pad", [3, 8, 16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_strided_rows_and_nothing_outside_the_view(op, device, pad, accumulate):
    x = torch.randn(11, 100 + pad, device=device)[:, :100]
    scales = torch.rand(2, 111, device=device)
    buffer = torch.full((11, 100 + 2 * pad), 7.0, device=device)
    out = buffer[:, pad : pad + 100]
    op.scale_columns(x, scales[0, :100], out, 0.5, accumulate)
    torch.testing.assert_close(out, 0.5 * x * scales[0, :100] + (7.0 if accumulate else 0.0))
    op.scale_rows(x, scales[1, 100:], out)
    torch.testing.assert_close(out, x * scales[1, 100:, None])
    assert bool((buffer[:, :pad] == 7.0).all())
    assert bool((buffer[:, pad + 100 :] == 7.0).all())


def test_columns_that_are_not_contiguous(op, device):
    x, scale = torch.randn(40, 6, device=device).t(), torch.rand(80, device=device)[::2]
    out = torch.empty(6, 40, device=device)
    op.scale_columns(x, scale, out)
    torch.testing.assert_close(out, x * scale)
    op.scale_columns(torch.ones((), device=device).expand(6, 40), scale, out)  # the gradient of a sum
    torch.testing.assert_close(out, scale.expand(6, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_place_gives_the_same_bits(op, device, dtype):
    for dim, scaled in ((1, op.scale_columns), (0, op.scale_rows)):
        whole, scale = case(device, (12, 300), dim, dtype)
        for x in (whole.clone(), torch.cat((whole, whole), 1)[:, 300:]):
            out = torch.empty_like(whole)
            scaled(x, scale, out)
            scaled(x, scale, x)
            assert torch.equal(x, out)
            assert not torch.equal(x, whole)


def test_empty(op, device):
    for shape in ((0, 16), (16, 0)):
        x = torch.randn(shape, device=device)
        op.scale_columns(x, torch.ones(shape[1], device=device), x)
        op.scale_columns(x, torch.ones(shape[1], device=device), torch.empty_like(x), accumulate=True)
        op.scale_rows(x, torch.ones(shape[0], device=device), x)


def test_shapes_that_do_not_fit(op, device):
    x = torch.randn(4, 6, device=device)
    out, four, six = torch.empty_like(x), torch.ones(4, device=device), torch.ones(6, device=device)
    with pytest.raises(ValueError, match="the columns of"):
        op.scale_columns(x, four, out)
    with pytest.raises(ValueError, match="the rows of"):
        op.scale_rows(x, six, out)
    with pytest.raises(ValueError, match="the columns of"):
        op.scale_columns(x, six, out[:3])
    with pytest.raises(ValueError, match="the columns of"):
        op.scale_columns(x, six[None], out)
    with pytest.raises(ValueError, match="the rows of"):
        op.scale_rows(x[0], six, out[0])
    with pytest.raises(ValueError, match="must be contiguous"):
        op.scale_rows(x, four, torch.empty(6, 4, device=device).t())


def test_fp64_goes_to_the_reference(device):
    assert "scaling" in TRITON_OPS
    assert hasattr(table_for(device).scaling, "scale_rows")
    guarded = Guarded(kernel, reference, "scaling", {"scaling": "triton"})
    x, scale = torch.randn(3, 20, dtype=torch.float64, device=device), torch.rand(20, device=device).double()
    out = torch.empty_like(x)
    guarded.scale_columns(x, scale, out)
    assert torch.equal(out, x * scale)


def test_custom_op(device):
    x, scale, out = torch.randn(3, 16, device=device), torch.rand(16, device=device), torch.randn(3, 16, device=device)
    torch.library.opcheck(kernel.scale_matrix.op, (x, scale, out, False, 0.5, True))
    torch.library.opcheck(kernel.scale_matrix.op, (None, scale[:3], out, True, 1.0, False))


def test_compiled(op, device):
    """Views of a buffer, in place and not, as the DoRA group calls them."""

    def computed(x, scale, rows):
        z = x * 2
        op.scale_columns(z, scale, z)
        buffer = torch.zeros(len(x), 2 * x.shape[1], device=x.device)
        half = buffer[:, x.shape[1] :]
        op.scale_columns(x, scale, half, 0.5)
        op.scale_columns(z, scale, half, 2.0, True)
        op.scale_rows(z, rows, z)
        return z, buffer

    x, scale, rows = torch.randn(4, 16, device=device), torch.rand(16, device=device), torch.rand(4, device=device)
    torch._dynamo.reset()
    for found, expected in zip(torch.compile(computed, backend="aot_eager")(x, scale, rows), computed(x, scale, rows)):
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
