"""y = a bᵀ + alpha · l rᵀ in one kernel, on Hopper GPUs: as accurate as a product and an addition."""

from __future__ import annotations

import logging

import pytest
import torch

from fastplug.ops.fp8 import kernel as fp8
from fastplug.ops.fp8 import reference as fp8_reference
from fastplug.ops.fp8.reference import FP8
from fastplug.ops.low_rank import kernel, product, reference
from tests.accuracy import assert_as_accurate

SHAPES = [(16, 16, 16, 8, 1.0), (100, 208, 144, 16, 0.5), (300, 528, 272, 48, 1.0), (129, 264, 128, 128, -2.0)]


@pytest.fixture
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that the kernel is for, which takes small products too."""
    if not product._multiprocessors(device):
        pytest.skip("not this GPU")
    monkeypatch.setattr(product, "WAVES", 0)
    return device


def operands(
    M: int, N: int, K: int, R: int, turned: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """x [M, K], w [N, K], left [M, R], right [N, R]; w and right by columns if ``turned``."""
    x, left = (torch.randn(shape, device=device).to(dtype) for shape in ((M, K), (M, R)))
    w, right = (torch.randn(shape[::-1] if turned else shape, device=device).to(dtype) for shape in ((N, K), (N, R)))
    return x, w.t() if turned else w, left, right.t() if turned else right


def exact(x: torch.Tensor, w: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    return x.double() @ w.double().t() + alpha * (left.double() @ right.double().t())


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "N", "K", "R", "alpha"), SHAPES)
def test_as_accurate_as_pytorch(hopper, M, N, K, R, alpha, dtype, turned):
    x, w, left, right = operands(M, N, K, R, turned, hopper, dtype)
    y = torch.full((M, N), float("nan"), device=hopper, dtype=dtype)
    assert kernel.product_add(y, x, w, left, right, alpha)
    theirs = torch.addmm(alpha * (left @ right.t()), x, w.t())
    assert_as_accurate([y], [theirs], [exact(x, w, left, right, alpha)])


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("M", "N", "K", "R", "alpha"), SHAPES)
def test_over_fp8(hopper, M, N, K, R, alpha, turned):
    """At most twice the error of the product and then the addition, each rounded once."""
    x, w, left, right = operands(M, N, K, R, False, hopper)
    right = right.t().contiguous().t() if turned else right
    rows = (*fp8.quantize_rows(x), *fp8.quantize_rows(w))
    y = fp8.product_add(*rows, left, right, torch.bfloat16, alpha)
    assert y is not None
    a, b = (values.double() * scale.double()[:, None] for values, scale in (rows[:2], rows[2:]))
    theirs = fp8.product(*rows, torch.bfloat16)
    kernel.add(theirs, left, right, alpha)
    assert_as_accurate([y], [theirs], [exact(a, b, left, right, alpha)])


@pytest.mark.gpu
def test_rows_of_a_larger_tensor(hopper):
    _, w, left, right = operands(200, 144, 96, 16, False, hopper)
    buffer = torch.full((200, 336), 7.0, device=hopper, dtype=torch.bfloat16)
    wide = torch.randn(200, 160, device=hopper).bfloat16()
    assert kernel.product_add(buffer[:, 96:240], wide[:, 32:128], w, left, right)
    truth = exact(wide[:, 32:128], w, left, right, 1.0)
    assert_as_accurate([buffer[:, 96:240]], [truth.bfloat16()], [truth])
    assert (buffer[:, :96] == 7).all()
    assert (buffer[:, 240:] == 7).all()


@pytest.mark.gpu
def test_the_same_bits_each_time(hopper):
    x, w, left, right = operands(1000, 4112, 2080, 32, True, hopper)
    first, second = (torch.empty(1000, 4112, device=hopper, dtype=torch.bfloat16) for _ in range(2))
    assert kernel.product_add(first, x, w, left, right)
    assert kernel.product_add(second, x, w, left, right)
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_what_the_kernel_leaves_alone(hopper, monkeypatch):
    x, w, left, right = operands(64, 64, 64, 16, False, hopper)
    y = torch.empty(64, 64, device=hopper, dtype=torch.bfloat16)
    assert product.suits(x, w, left, right, y)
    assert not product.suits(x, w, left[:, :4], right[:, :4].contiguous(), y)  # rows of 8 bytes
    assert not product.suits(x, w, left.repeat(1, 9), right.repeat(1, 9), y)  # a rank of 144
    assert not product.suits(x, w, left.t().contiguous().t(), right, y)
    assert not product.suits(x[:0], w, left[:0], right, y[:0])
    assert not product.suits(x.float(), w.float(), left.float(), right.float(), y.float())
    assert not product.suits(x[:, 1:57], w[:, :56], left, right, y)  # an address between two blocks of 16 bytes
    assert not product.suits(x.to(FP8), w.t().contiguous().t().to(FP8).t().contiguous().t(), left, right, y)
    monkeypatch.setattr(product, "WAVES", 2)
    assert not product.suits(x, w, left, right, y)


def test_other_devices_keep_the_two_steps(device):
    x, w, left, right = operands(16, 16, 16, 16, False, device)
    y = torch.empty(16, 16, device=device, dtype=torch.bfloat16)
    assert not reference.product_add(y, x, w, left, right)
    ones = torch.ones(16, device=device)
    assert fp8_reference.product_add(x.to(FP8), ones, w.to(FP8), ones, left, right, torch.bfloat16) is None
    if device.type == "cpu":
        assert not product.suits(x, w, left, right, y)


def test_a_triton_that_cannot_compile_it_is_asked_once(device, monkeypatch, caplog):
    x, w, left, right = operands(16, 16, 16, 16, False, device)
    y = torch.empty(16, 16, device=device, dtype=torch.bfloat16)
    calls = []

    def failing(*args):
        calls.append(args)
        raise RuntimeError("error encountered during parsing")

    monkeypatch.setattr(product, "broken", [])
    monkeypatch.setattr(product, "product_with_share", failing)
    with caplog.at_level(logging.WARNING, "fastplug"):
        assert not product.attempt(y, x, w, left, right, 1.0, None, None)
    assert "does not compile the kernel" in caplog.text
    assert not product.suits(x, w, left, right, y)
    monkeypatch.setattr(product, "product_with_share", lambda *args: _out_of_memory())
    with pytest.raises(torch.OutOfMemoryError):
        product.attempt(y, x, w, left, right, 1.0, None, None)


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.gpu
def test_custom_op(hopper):
    x, w, left, right = operands(32, 32, 32, 16, False, hopper)
    y = torch.empty(32, 32, device=hopper, dtype=torch.bfloat16)
    arguments = (y, x, w, left, right, 1.0, None, None)
    torch.library.opcheck(product.product_with_share.op, arguments, test_utils="test_faketensor")
