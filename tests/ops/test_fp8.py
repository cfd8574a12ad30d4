"""FP8: what is rounded, what is not, and the products against fp64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.fp8 import gemm, kernel, reference
from fastplug.ops.fp8.reference import FP8, LARGEST
from fastplug.ops.low_rank import reference as low_rank

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


def with_share(M: int, N: int, K: int, R: int, transposed: bool, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Operands of a product, with their scales, and the factors of an adapter's share."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter takes bf16 for integers
    a, b = ((torch.randn(shape, device=device) * 30).to(FP8) for shape in ((M, K), (N, K)))
    sa, sb = torch.rand(M, device=device) / 300, torch.rand(N, device=device) / 300
    left = torch.randn(M, R, device=device, dtype=dtype)
    right = torch.randn((R, N) if transposed else (N, R), device=device, dtype=dtype)
    return a, sa, b, sb, left, right.t() if transposed else right


def assert_adds(y: torch.Tensor, operands: tuple[torch.Tensor, ...], alpha: float) -> None:
    """At most twice the error of the product and then the addition, each rounded once."""
    a, sa, b, sb, left, right = operands
    truth = decoded(a, sa) @ decoded(b, sb).t() + alpha * (left.double() @ right.double().t())
    apart = kernel.product(a, sa, b, sb, left.dtype)
    low_rank.add(apart, left, right, alpha)
    assert (y.double() - truth).abs().max() <= 2 * (apart.double() - truth).abs().max()
    assert (y.double() - truth).norm() <= 2 * (apart.double() - truth).norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "alpha"),
    [(16, 16, 16, 8, 1.0), (100, 208, 144, 16, 0.5), (300, 528, 272, 48, 1.0), (129, 264, 128, 128, -2.0)],
)
def test_an_adapters_share_is_added_before_the_product_is_rounded(op, device, M, N, K, R, alpha, transposed):
    operands = with_share(M, N, K, R, transposed, device)
    dtype = operands[4].dtype
    if op is kernel and not gemm.suits(operands[0], operands[2], *operands[4:], dtype):
        pytest.skip("not this GPU")
    y = op.product_add(*operands, dtype, alpha)
    assert y.dtype == dtype
    assert_adds(y, operands, alpha)


@pytest.mark.parametrize(
    "config",
    [gemm.CONFIG, gemm.Config(), gemm.Config(block_n=128, warps=4, resident=2, flatten=False),
     gemm.Config(block_n=128, stages=4, exact=True, flatten=False), gemm.Config(stages=3, halves=False, flatten=False)],
)  # fmt: skip
def test_every_way_to_cut_the_product_up(device, config):
    operands = with_share(260, 272, 384, 48, False, device)
    if not gemm.suits(operands[0], operands[2], *operands[4:], operands[4].dtype):
        pytest.skip("not this GPU")
    y = torch.full((260, 272), float("nan"), device=device, dtype=operands[4].dtype)
    gemm.launch(y, *operands, 0.5, config)
    assert_adds(y, operands, 0.5)


def test_what_the_kernel_does_not_add(device, monkeypatch):
    a, _, b, _, left, right = with_share(32, 48, 64, 16, False, device)

    def adds(a=a, b=b, left=left, right=right):
        return kernel.adds(a, b, left, right, left.dtype)

    assert not reference.adds(a, b, left, right, left.dtype)
    monkeypatch.setattr(gemm, "FUSED", False)
    assert not adds()
    monkeypatch.setattr(gemm, "FUSED", True)
    if device.type == "cuda" and torch.cuda.get_device_capability() != gemm.ARCHITECTURE:
        assert not adds()
        return
    assert adds()
    assert adds(right=right.t().contiguous().t())
    assert not adds(left=left[:, :4], right=right[:, :4].contiguous())  # rows of 8 bytes
    assert not adds(left=left.repeat(1, 9), right=right.repeat(1, 9))  # a rank of 144
    assert not adds(left=left.t().contiguous().t())
    assert not adds(a=a[:0], left=left[:0])
    assert not adds(left=left.float(), right=right.float())


def test_custom_op_of_the_product_with_a_share(device):
    operands = with_share(16, 32, 16, 16, False, device)
    if not gemm.suits(operands[0], operands[2], *operands[4:], operands[4].dtype):
        pytest.skip("not this GPU")
    y = torch.empty(16, 32, device=device, dtype=operands[4].dtype)
    torch.library.opcheck(gemm.fp8_product_add.op, (y, *operands, 1.0), test_utils="test_faketensor")
