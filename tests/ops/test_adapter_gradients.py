"""g B and the gradients of B in one pass over g: both implementations against fp64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from fastplug.ops.adapter_gradients import kernel, reference
from fastplug.ops.adapter_gradients.reference import Places
from fastplug.ops.lora.attention_input import Norm
from fastplug.ops.lora.gated_mlp import GatedMLP, gated_mlp
from fastplug.ops.lora.group import Group
from fastplug.ops.lora.linear import lora_linear
from fastplug.ops.table import table_for
from tests.accuracy import assert_as_accurate
from tests.ops.test_lora_products import (
    HIDDEN,
    INNER,
    assert_accurate,
    dense_projection,
    linear_reference,
    projection,
)

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter's bf16 products are wrong
pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


class Case(NamedTuple):
    """What both functions take, in this order."""

    g: torch.Tensor
    xa: torch.Tensor
    b: torch.Tensor
    places: Places
    scalings: list[float]

    def suits(self, op: Any = kernel, **others: Any) -> bool:
        return bool(op.suits(*self._replace(**others)[:-1]))


def operands(
    tokens: int, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, pad: int = 0
) -> Case:
    """Random ones, of adapters of these widths and ranks; rows of g have ``pad`` numbers after them."""
    torch.manual_seed(0)
    rows, columns = ((0, *accumulate(part)) for part in zip(*sizes))
    channels, rank = rows[-1], columns[-1]
    g = torch.randn(tokens, channels + pad, device=device).to(dtype)[:, :channels]
    xa, b = torch.randn(tokens, rank, device=device).to(dtype), torch.zeros(channels, rank, device=device, dtype=dtype)
    for (row, end), (column, last) in zip(pairwise(rows), pairwise(columns)):
        b[row:end, column:last] = torch.randn(end - row, last - column, device=device)
    return Case(g, xa, b, Places(rows, columns), [0.5 + i for i in range(len(sizes))])


def one_by_one(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """As one would write it, a product each."""
    g, xa, b = (t.to(dtype) for t in case[:3])
    gb, of_b = [], []
    for (row, end), (column, last), scaling in zip(*map(pairwise, case.places), case.scalings):
        gb.append((g[:, row:end] @ b[row:end, column:last]) * scaling)
        of_b.append(g[:, row:end].t() @ xa[:, column:last])
    return [torch.cat(gb, dim=1), *of_b]


SIZES = [[(64, 16)], [(300, 8)], [(520, 16), (70, 16), (64, 16)], [(256, 32), (40, 4)], [(3, 1), (5, 2), (7, 3)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tokens", [1, 70, 1100])
def test_as_accurate_as_pytorch(op, device, dtype, sizes, tokens):
    if op is kernel and dtype == torch.float32 and device.type == "cuda":
        pytest.skip("the kernel is for 16 bits; the interpreter's products are right in 32")
    given, rstd = operands(tokens, sizes, dtype, device), 0.5 + torch.rand(tokens, device=device)
    gb, of_b, normed = op.gradients(*given, rstd)
    assert gb.dtype == normed.dtype == dtype
    assert all(part.dtype == torch.float32 for part in of_b)
    names = ["normed g B", "g B", *(f"d B {i}" for i in range(len(of_b)))]
    theirs, truth = (one_by_one(given, kind) for kind in (dtype, torch.float64))
    assert_as_accurate(
        [normed, gb, *of_b],
        [(theirs[0] * rstd[:, None]).to(dtype), *theirs],
        [truth[0] * rstd[:, None].double(), *truth],
        names,
    )
    again = op.gradients(*given)
    assert again[2] is None
    assert torch.equal(gb, again[0])
    assert all(torch.equal(mine, other) for mine, other in zip(of_b, again[1]))


@pytest.mark.parametrize("pad", [3, 8])
def test_rows_may_lie_apart(op, device, pad):
    given = operands(90, [(72, 16), (24, 16)], torch.float32, device, pad)
    close = op.gradients(*given._replace(g=given.g.contiguous()))
    apart = op.gradients(*given)
    for mine, other in zip([apart[0], *apart[1]], [close[0], *close[1]]):
        torch.testing.assert_close(mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[(4096, 16)], [(4096, 16), (1024, 16), (1024, 16)], [(8192, 32)]])
def test_of_a_large_model(device, sizes):
    given = operands(8200, sizes, torch.bfloat16, device)
    assert given.suits()
    gb, of_b, _ = kernel.gradients(*given)
    assert_as_accurate([gb, *of_b], one_by_one(given, torch.bfloat16), one_by_one(given, torch.float64))


@pytest.mark.gpu
def test_what_suits(device):
    case = operands(5000, [(256, 16), (64, 16)], torch.bfloat16, device)
    assert case.suits()
    assert not case.suits(reference)
    assert not case.suits(g=case.g[:4000], xa=case.xa[:4000])
    assert not case.suits(g=case.g.float(), xa=case.xa.float(), b=case.b.float())
    assert not case.suits(g=case.g.t().contiguous().t())
    assert not case.suits(b=case.b.t().contiguous().t())
    assert not operands(5000, [(256, 64)], torch.bfloat16, device).suits()
    assert not operands(5000, [(9000, 16)], torch.bfloat16, device).suits()
    assert not operands(5000, [(64, 16)] * 4, torch.bfloat16, device).suits()


class Always:
    """The reference, which also counts how often it is asked for, and says that it suits."""

    def __init__(self) -> None:
        self.calls = 0

    def suits(self, *operands: object) -> bool:
        return True

    def gradients(self, *operands: Any) -> Any:
        self.calls += 1
        return reference.gradients(*operands)


@pytest.fixture
def one_pass(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Always:
    """Makes the device's table use it."""
    found = Always()
    monkeypatch.setattr(table_for(device), "adapter_gradients", found)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_gated_mlp_in_one_pass(device, one_pass, dropout):
    """Down's adapter, and those of gate and up: what one pass makes is what a product each makes."""
    projections = [projection(*shape, device, i) for i, shape in enumerate([(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)])]
    x = torch.randn(24, HIDDEN, device=device).requires_grad_()
    wanted = [x, *(tensor for p in projections for tensor in (p.a, p.b))]

    def gradients(frozen: int | None = None) -> list[torch.Tensor]:
        torch.manual_seed(1)
        for i, p in enumerate(projections):
            p.dropout = dropout
            assert p.b is not None
            p.b.requires_grad_(i != frozen)
        groups = [Group(part, torch.float32, table_for(device)) for part in (projections[:2], projections[2:])]
        out = gated_mlp(
            GatedMLP(*groups, "silu", Norm(1e-6)), x, torch.zeros_like(x), torch.ones(HIDDEN, device=device)
        )
        return list(torch.autograd.grad(out.square().sum(), [t for t in wanted if t is not None and t.requires_grad]))

    found = gradients()
    assert one_pass.calls == 2
    gradients(frozen=0)  # the gradient of gate's B is not wanted: its group goes another way
    assert one_pass.calls == 3
    one_pass.suits = lambda *operands: False  # type: ignore[method-assign]
    for mine, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert one_pass.calls == 3


@pytest.mark.gpu
def test_a_projection_of_many_tokens(device, monkeypatch):
    """On a GPU from 4,096 tokens on."""
    p = dense_projection(512, 256, device, 1)
    asked, plain = [], kernel.gradients
    monkeypatch.setattr(table_for(device).adapter_gradients, "gradients", lambda *g: asked.append(1) or plain(*g))

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        p.a, p.b = a, b
        return lora_linear(Group([p], x.dtype, table_for(device)), x)

    x = torch.randn(4500, 256, device=device)
    assert_accurate(fused, functools.partial(linear_reference, p), (x, p.a.detach(), p.b.detach()))
    assert asked
