"""y += alpha · x bᵀ: both implementations against fp64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.low_rank import kernel, reference
from tests.accuracy import assert_as_accurate

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter's bf16 products are wrong
pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "rank"), [((70, 136), 16), ((3, 257), 5), ((1, 1), 1), ((65, 40), 48), ((9, 9), 200)]
)
@pytest.mark.parametrize("alpha", [1.0, -0.37])
def test_as_accurate_as_pytorch(op, device, dtype, shape, rank, alpha):
    y, x, b = (torch.randn(s, device=device).to(dtype) for s in (shape, (shape[0], rank), (shape[1], rank)))
    truth = y.double() + alpha * x.double() @ b.double().t()
    theirs = torch.addmm(y, x, b.t(), alpha=alpha)
    before = y.clone()
    elsewhere = op.added(y, x, b, alpha)
    assert torch.equal(y, before)
    op.add(y, x, b, alpha)
    assert_as_accurate([y], [theirs], [truth])
    assert_as_accurate([elsewhere], [theirs], [truth])


@pytest.mark.parametrize("pad", [3, 8])
def test_strided_operands_and_nothing_outside_the_view(op, device, pad):
    buffer = torch.randn(20, 40 + pad, device=device)
    before = buffer.clone()
    x = torch.randn(20, 30, device=device)[:, 5:21]
    b = torch.randn(16, 40, device=device).t()
    op.add(buffer[:, :40], x, b)
    torch.testing.assert_close(buffer[:, :40], before[:, :40] + x @ b.t())
    assert torch.equal(buffer[:, 40:], before[:, 40:])
    out = op.added(before[:, :40], x, b)
    assert out.is_contiguous()
    torch.testing.assert_close(out, before[:, :40] + x @ b.t())


def test_nothing_to_add(op, device):
    y = torch.randn(4, 6, device=device)
    before = y.clone()
    op.add(y, torch.empty(4, 0, device=device), torch.empty(6, 0, device=device))
    assert torch.equal(op.added(y, torch.empty(4, 0, device=device), torch.empty(6, 0, device=device)), before)
    op.add(y[:0], torch.empty(0, 3, device=device), torch.empty(6, 3, device=device))
    assert torch.equal(y, before)


def test_custom_op(device):
    y, x, b = torch.randn(5, 32, device=device), torch.randn(5, 4, device=device), torch.randn(32, 4, device=device)
    torch.library.opcheck(kernel.low_rank_add.op, (y, x, b, 0.5))
    torch.library.opcheck(kernel.low_rank_added.op, (y, x, b, 0.5, torch.empty_like(y)))
