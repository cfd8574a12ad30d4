"""Gated linear units: both implementations against the fp64 definition, and what they may and may not write."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.glu import glu, kernel, reference
from tests.accuracy import assert_as_accurate

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates instead of rounding
DTYPES = [torch.float32, torch.float16, BF16]

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def run(gate: torch.Tensor, up: torch.Tensor, dout: torch.Tensor, activation: str, dtype: torch.dtype):
    gate, up = (t.detach().to(dtype).requires_grad_() for t in (gate, up))
    out = reference.glu(gate, up, activation)
    out.backward(dout.to(dtype))
    return [out, gate.grad, up.grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 77), (2, 3000), (1, 1)])
def test_as_accurate_as_pytorch(op, device, dtype, activation, shape):
    gate, up, dout = (2 * torch.randn(shape, device=device) for _ in range(3))
    gate, up, dout = gate.to(dtype), up.to(dtype), dout.to(dtype)
    truth = run(gate, up, dout, activation, torch.float64)
    theirs = run(gate, up, dout, activation, dtype)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    out = glu(gate, up, activation, implementation=op)
    out.backward(dout)
    assert out.dtype == dtype
    assert_as_accurate([out, gate.grad, up.grad], theirs, truth, ["out", "dgate", "dup"])


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's; exp(-x) is inf, as it is on a GPU
def test_extreme_gates(op, device, activation, dtype):
    largest = torch.finfo(torch.float16).max
    gate = torch.tensor([[0.0, -0.0, 1e-4, -1e-4, 12.0, -12.0, 90.0, -90.0, largest, -largest]], device=device)
    gate, one = gate.to(dtype), torch.ones(1, 10, device=device, dtype=dtype)
    truth = run(gate, one, one, activation, torch.float64)
    theirs = run(gate, one, one, activation, dtype)
    out, dgate, dup = (torch.empty_like(gate) for _ in range(3))
    op.backward(one, gate, one, activation, dgate, dup, out)
    assert_as_accurate([out, dgate], theirs[:2], truth[:2])


@pytest.mark.parametrize("pad", [3, 8, 16])
@pytest.mark.parametrize("N", [48, 1100])
def test_strided_rows_and_nothing_outside_the_view(op, device, pad, N):
    gate_up = torch.randn(5, 2 * N, device=device)
    gate, up = gate_up[:, :N], gate_up[:, N:]
    dout = torch.randn(5, N + pad, device=device)[:, :N]
    buffers = [torch.full((5, N + pad), 7.0, device=device) for _ in range(4)]
    out, dgate, dup, again = (b[:, :N] for b in buffers)
    op.forward(gate, up, "silu", out)
    op.backward(dout, gate, up, "silu", dgate, dup, again)
    expected = run(gate, up, dout, "silu", torch.float32)
    for mine, theirs in zip((out, dgate, dup, again), (*expected, expected[0])):
        torch.testing.assert_close(mine, theirs.detach())
    assert all((b[:, N:] == 7.0).all() for b in buffers)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_in_place(op, device, activation):
    gate, up, dout = (torch.randn(4, 96, device=device) for _ in range(3))
    expected = run(gate, up, dout, activation, torch.float32)
    op.backward(dout, gate, up, activation, gate, up)
    torch.testing.assert_close(gate, expected[1])
    torch.testing.assert_close(up, expected[2])


def test_columns_that_are_not_contiguous(op, device):
    gate, up = (torch.randn(40, 6, device=device).t() for _ in range(2))
    out = torch.empty(6, 40, device=device)
    op.forward(gate, up, "gelu", out)
    torch.testing.assert_close(out, reference.glu(gate, up, "gelu"))
    dgate, dup = torch.empty_like(out), torch.empty_like(out)
    op.backward(torch.ones((), device=device).expand(6, 40), gate, up, "gelu", dgate, dup)
    torch.testing.assert_close(dup, torch.nn.functional.gelu(gate).contiguous())


def test_empty(op, device):
    x = torch.randn(0, 16, device=device)
    op.forward(x, x, "silu", x)
    op.backward(x, x, x, "silu", x, x, x)


def test_unknown_activation(op, device):
    x = torch.randn(2, 2, device=device)
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        op.forward(x, x, "relu", x)


def test_custom_ops(device):
    tensors = [torch.randn(3, 16, device=device) for _ in range(6)]
    torch.library.opcheck(kernel.glu_forward.op, (*tensors[:3], "silu"))
    torch.library.opcheck(kernel.glu_backward.op, (*tensors, "gelu_tanh"))
    torch.library.opcheck(kernel.glu_backward.op, (*tensors[:5], None, "gelu"))
