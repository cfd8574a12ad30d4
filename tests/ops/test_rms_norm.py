"""RMSNorm: both implementations against the fp64 definition, and what they may and may not write."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.rms_norm import kernel, reference, rms_norm
from tests.accuracy import assert_as_accurate

EPS = 1e-6
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates instead of rounding
DTYPES = [torch.float32, torch.float16, BF16]
ORDERS = [(0.0, True), (1.0, False)]  # Llama, Gemma

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def run(inputs: list[torch.Tensor | None], grads: list[torch.Tensor], offset: float, cast_first: bool, wide: bool):
    """``[y, h, dx, dresidual, dweight]`` by autograd through the definition, in fp64 or in the inputs' dtypes."""
    x, residual, weight = (
        None if t is None else t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in inputs
    )
    h = x if residual is None else x + residual
    y = reference.rms_norm(h, weight, EPS, offset, cast_first)
    outputs = [y] if residual is None else [y, h]
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])
    return [y, h, x.grad, *(None if t is None else t.grad for t in (residual, weight))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "cast_first"), ORDERS)
@pytest.mark.parametrize("shape", [(2, 3, 64), (7, 100), (3, 1536), (1, 1), (33, 5)])
def test_as_accurate_as_pytorch(op, device, dtype, offset, cast_first, shape):
    x, residual, dy, dh = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    inputs = [x, residual, weight]
    truth = run(inputs, [dy, dh], offset, cast_first, wide=True)
    theirs = run(inputs, [dy, dh], offset, cast_first, wide=False)
    x, residual, weight = (t.requires_grad_() for t in inputs)
    y, h = rms_norm(x, weight, EPS, offset, cast_first, residual, implementation=op)
    torch.autograd.backward([y, h], [dy, dh])
    assert y.dtype == h.dtype == dtype
    names = ["y", "h", "dx", "dresidual", "dweight"]
    assert_as_accurate([y, h, x.grad, residual.grad, weight.grad], theirs, truth, names)


@pytest.mark.parametrize(("offset", "cast_first"), ORDERS)
@pytest.mark.parametrize("weighted", [True, False])
def test_without_residual_and_with_frozen_weight(op, device, offset, cast_first, weighted):
    x = torch.randn(2, 5, 40, device=device)
    weight = torch.randn(40, device=device) if weighted else None
    dy = torch.randn_like(x)
    truth = run([x, None, weight], [dy], offset, cast_first, wide=True)
    theirs = run([x, None, weight], [dy], offset, cast_first, wide=False)
    x.requires_grad_()
    y = rms_norm(x, weight, EPS, offset, cast_first, implementation=op)
    y.backward(dy)
    assert_as_accurate([y, x.grad], [theirs[0], theirs[2]], [truth[0], truth[2]])
    assert weight is None or weight.grad is None


def test_only_h_is_used(op, device):
    x, residual = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    _, h = rms_norm(x, torch.ones(8, device=device), EPS, residual=residual, implementation=op)
    h.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))


def test_fp32_weight_on_half_input(op, device):
    x, weight, dy = torch.randn(6, 48, device=device).half(), torch.randn(48, device=device), torch.randn(6, 48)
    y, h, rstd = op.forward(x, weight, EPS, out_dtype=torch.float32)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    assert y.dtype == torch.float32
    assert_as_accurate([y], [weight * exact.half()], [weight.double() * exact])
    _, dweight = op.backward(dy.to(device).half(), h, rstd, weight, weight_grad=True)
    assert dweight.dtype == torch.float32
    assert_as_accurate([dweight], [(dy.to(device).half() * exact.half()).sum(0).float()],
                       [(dy.to(device).half().double() * exact).sum(0)])  # fmt: skip


@pytest.mark.parametrize("pad", [3, 8, 16])
def test_strided_rows_and_nothing_outside_the_view(op, device, pad):
    wide = torch.randn(9, 2 * (64 + pad), device=device)
    x, residual = wide[:, :64], wide[:, 64 + pad : 128 + pad]
    buffer = torch.full((9, 64 + pad), 7.0, device=device)
    y, h, _ = op.forward(x, None, EPS, residual=residual, out=buffer[:, :64])
    assert y.data_ptr() == buffer.data_ptr()
    expected = reference.forward(x.contiguous(), None, EPS, residual=residual.contiguous())
    torch.testing.assert_close(buffer[:, :64], expected[0])
    torch.testing.assert_close(h, expected[1])
    assert (buffer[:, 64:] == 7.0).all()


def test_columns_that_are_not_contiguous(op, device):
    x = torch.randn(40, 6, device=device).t()
    y, h, rstd = op.forward(x, None, EPS)
    torch.testing.assert_close(y, reference.rms_norm(x.contiguous(), None, EPS))
    dy = torch.ones((), device=device).expand(6, 40)
    torch.testing.assert_close(op.backward(dy, h, rstd, None)[0],
                               reference.backward(dy.contiguous(), x.contiguous(), rstd, None)[0])  # fmt: skip


@pytest.mark.parametrize("N", [8200, 32768])
def test_wide_rows(op, device, N):
    x, weight, dy = torch.randn(2, N, device=device), torch.randn(N, device=device), torch.randn(2, N, device=device)
    truth = run([x, None, weight], [dy], 0.0, True, wide=True)
    theirs = run([x, None, weight], [dy], 0.0, True, wide=False)
    y, h, rstd = op.forward(x, weight, EPS)
    dx, dweight = op.backward(dy, h, rstd, weight, weight_grad=True)
    assert_as_accurate([y, h, dx, None, dweight], theirs, truth)


def test_empty(op, device):
    x, weight = torch.randn(0, 16, device=device), torch.randn(16, device=device)
    y, h, rstd = op.forward(x, weight, EPS, residual=x)
    dx, dweight = op.backward(y, h, rstd, weight, weight_grad=True)
    assert y.shape == h.shape == dx.shape == (0, 16)
    assert torch.equal(dweight, torch.zeros(16, device=device))


def test_weight_gradient_is_deterministic(op, device):
    x, weight = torch.randn(70, 24, device=device), torch.randn(24, device=device)
    y, h, rstd = op.forward(x, weight, EPS)
    first, second = (op.backward(y, h, rstd, weight, weight_grad=True)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_output_that_cannot_be_written(device):
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        kernel.forward(torch.randn(4, 4, device=device), None, EPS, out=torch.empty(4, 4, device=device).t())
    with pytest.raises(ValueError, match=r"expected \(4, 4\)"):
        kernel.forward(torch.randn(4, 4, device=device), None, EPS, out=torch.empty(4, 5, device=device))


def test_custom_ops(device):
    x, y, h, dx = (torch.randn(5, 16, device=device) for _ in range(4))
    weight, rstd, partial = (torch.rand(n, device=device) for n in (16, 5, 32))
    torch.library.opcheck(kernel.rms_norm_forward.op, (x, x, weight, y, h, rstd, EPS, 0.0, True))
    torch.library.opcheck(kernel.rms_norm_backward.op, (y, x, rstd, weight, h, dx, partial.view(2, 16), 0.0))
