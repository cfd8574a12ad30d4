"""FP8: what is rounded, what is not, and the products against fp64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.fp8 import kernel, reference
from fastplug.ops.fp8.reference import FP8, LARGEST

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest, device: torch.device) -> ModuleType:
    if request.param is kernel and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 on this GPU")
    return request.param


def representable(shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of e4m3 values times a power of two, with 448 times it among them: nothing to round.

    Triton's interpreter rounds 124.3 to 64 where a GPU makes it 128, so it can be asked about such values only.
    """
    x = (torch.randn(shape) * 100).clamp(-LARGEST, LARGEST).to(FP8).float()
    x[:, shape[1] // 2] = -LARGEST
    return (x * 2.0 ** torch.arange(-shape[0] % 5 - 4, 1).repeat(shape[0])[: shape[0], None]).to(dtype).to(device)


def skip_where_interpreted(op: ModuleType, device: torch.device) -> None:
    if op is kernel and device.type == "cpu":
        pytest.skip("the interpreter does not round as a GPU does")


def decoded(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return q.double() * scale.double()[:, None]


def assert_rounded_once(values: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor) -> None:
    """Within half a unit in the last of e4m3's four significant bits, or of its smallest numbers (2^-9 · scale)."""
    bound = truth.abs() * 2.0**-4 * (1 + 1e-5) + scale.double()[:, None] * 2.0**-10 * (1 + 1e-5)
    assert ((values - truth.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(3, 64), (5, 77), (2, 17000), (1, 1)])
def test_rows_are_rounded_once(op, device, dtype, shape):
    skip_where_interpreted(op, device)
    x = (torch.randn(shape, device=device) * torch.logspace(-3, 3, shape[0], device=device)[:, None]).to(dtype)
    q, scale = op.quantize_rows(x)
    assert q.dtype == FP8
    assert q.is_contiguous()
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, x.float().abs().amax(1) / LARGEST)
    assert_rounded_once(decoded(q, scale), x.double(), scale)


@pytest.mark.parametrize("shape", [(3, 64), (5, 77), (2, 17000), (1, 1)])
def test_what_e4m3_can_hold_stays_as_it_is(op, device, shape):
    x = representable(shape, device)
    q, scale = op.quantize_rows(x)
    assert torch.equal(decoded(q, scale), x.double())
    assert q.is_contiguous()
    w = x.t().contiguous()
    scale = op.column_scales(w)
    assert torch.equal(decoded(op.quantize_columns(w, scale), scale), x.double())


def test_rows_of_a_wider_buffer(op, device):
    buffer = torch.randn(4, 96, device=device)
    q, scale = op.quantize_rows(buffer[:, :80])
    expected = op.quantize_rows(buffer[:, :80].contiguous())
    assert torch.equal(q.float(), expected[0].float())
    assert torch.equal(scale, expected[1])


def test_zeros_and_nothing(op, device):
    q, scale = op.quantize_rows(torch.zeros(2, 32, device=device))
    assert not q.float().any()
    assert torch.equal(scale, torch.ones_like(scale))
    q, scale = op.quantize_rows(torch.empty(0, 32, device=device))
    assert q.shape == (0, 32)
    assert scale.shape == (0,)


@pytest.mark.parametrize("shape", [(64, 64), (100, 48), (1, 16), (130, 200)])
def test_columns_are_rounded_once(op, device, shape):
    skip_where_interpreted(op, device)
    w = torch.randn(shape, device=device) * torch.logspace(-2, 2, shape[1], device=device)
    w[:, 0] = 0
    scale = op.column_scales(w)
    q = op.quantize_columns(w, scale)
    assert q.shape == shape[::-1]
    assert q.is_contiguous()
    torch.testing.assert_close(scale[1:], w.abs().amax(0)[1:] / LARGEST)
    assert_rounded_once(decoded(q, scale), w.t().double(), scale)


@pytest.mark.parametrize("M", [16, 7])
def test_product(op, device, M):
    """The only errors are those of the operands, and the rounding of the result."""
    a, b = representable((M, 128), device), representable((48, 128), device)
    (qa, sa), (qb, sb) = op.quantize_rows(a), op.quantize_rows(b)
    out = op.product(qa, sa, qb, sb, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    truth = decoded(qa, sa) @ decoded(qb, sb).t()
    largest = (decoded(qa, sa).abs() @ decoded(qb, sb).abs().t()).max()
    assert ((out.double() - truth).abs() <= truth.abs() * 2.0**-8 + 2.0**-12 * largest).all()
