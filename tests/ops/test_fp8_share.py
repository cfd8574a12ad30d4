"""An FP8 product with an adapter's share in one kernel, on Hopper GPUs: as accurate as the product and an addition."""

from __future__ import annotations

import logging

import pytest
import torch

from fastplug.ops.fp8 import kernel, reference, share
from fastplug.ops.fp8.reference import FP8
from fastplug.ops.gluon import multiprocessors
from fastplug.ops.low_rank import kernel as low_rank
from tests.accuracy import assert_as_accurate

SHAPES = [(16, 16, 16, 8, 1.0), (100, 208, 144, 16, 0.5), (300, 528, 272, 48, 1.0), (129, 272, 128, 128, -2.0)]


@pytest.fixture
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that the kernel is for, which takes small products too."""
    if not multiprocessors(device):
        pytest.skip("not this GPU")
    monkeypatch.setattr(share, "WAVES", 0)
    return device


def operands(
    M: int, N: int, K: int, R: int, device: torch.device, turned: bool = False
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """a, its scales, b, its scales; left [M, R], right [N, R], by columns if ``turned``."""
    x, w = (torch.randn(shape, device=device).bfloat16() for shape in ((M, K), (N, K)))
    left = torch.randn(M, R, device=device).bfloat16()
    right = torch.randn((R, N) if turned else (N, R), device=device).bfloat16()
    return (*reference.quantize_rows(x), *reference.quantize_rows(w)), left, right.t() if turned else right


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("M", "N", "K", "R", "alpha"), SHAPES)
def test_as_accurate_as_two_steps(hopper, M, N, K, R, alpha, turned):
    rows, left, right = operands(M, N, K, R, hopper, turned)
    y = kernel.product_add(*rows, left, right, torch.bfloat16, alpha)
    assert y is not None
    a, b = (values.double() * scale.double()[:, None] for values, scale in (rows[:2], rows[2:]))
    theirs = kernel.product(*rows, torch.bfloat16)
    low_rank.add(theirs, left, right, alpha)
    assert_as_accurate([y], [theirs], [a @ b.t() + alpha * (left.double() @ right.double().t())])


@pytest.mark.gpu
def test_the_same_bits_each_time(hopper):
    rows, left, right = operands(1000, 4112, 2080, 32, hopper)
    first, second = (kernel.product_add(*rows, left, right, torch.bfloat16) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_what_the_kernel_leaves_alone(hopper, monkeypatch):
    (a, _, b, _), left, right = operands(64, 64, 64, 16, hopper)

    def suits(a=a, b=b, left=left, right=right, dtype=torch.bfloat16):
        return share.suits(a, b, left, right, dtype)

    assert suits()
    assert suits(right=right.t().contiguous().t())
    assert not suits(left=left[:, :4], right=right[:, :4].contiguous())  # rows of 8 bytes
    assert not suits(left=left.repeat(1, 9), right=right.repeat(1, 9))  # a rank of 144
    assert not suits(left=left.t().contiguous().t())
    assert not suits(a=a[:0], left=left[:0])
    assert not suits(left=left.float(), right=right.float())
    assert not suits(left=left.float(), right=right.float(), dtype=torch.float32)
    monkeypatch.setattr(share, "WAVES", 2)
    assert not suits()


def test_other_devices_keep_the_two_steps(device):
    rows, left, right = operands(16, 16, 16, 16, device)
    assert reference.product_add(*rows, left, right, torch.bfloat16) is None
    if device.type == "cpu":
        assert kernel.product_add(*rows, left, right, torch.bfloat16) is None


def test_a_triton_that_cannot_compile_it_is_asked_once(device, monkeypatch, caplog):
    rows, left, right = operands(16, 16, 16, 16, device)
    arguments = (torch.empty(16, 16, device=device, dtype=torch.bfloat16), *rows, left, right, 1.0)

    def failing(*args):
        raise RuntimeError("error encountered during parsing")

    monkeypatch.setattr(share, "broken", [])
    monkeypatch.setattr(share, "fp8_product_add", failing)
    with caplog.at_level(logging.WARNING, "fastplug"):
        assert not share.attempt(*arguments)
    assert "does not compile the kernel" in caplog.text
    assert not share.suits(rows[0], rows[2], left, right, torch.bfloat16)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(share, "fp8_product_add", full)
    with pytest.raises(torch.OutOfMemoryError):
        share.attempt(*arguments)


@pytest.mark.gpu
def test_custom_op(hopper):
    rows, left, right = operands(32, 32, 32, 16, hopper)
    y = torch.empty(32, 32, device=hopper, dtype=torch.bfloat16)
    assert rows[0].dtype == FP8
    torch.library.opcheck(share.fp8_product_add.op, (y, *rows, left, right, 1.0), test_utils="test_faketensor")
