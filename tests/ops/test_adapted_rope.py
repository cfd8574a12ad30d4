"""Adapters' shares and RoPE of q, k and v in one pass: both implementations against fp64, and a layer's with it."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastplug.ops.adapted_rope import kernel, reference
from fastplug.ops.adapted_rope.reference import Adapted, Heads
from fastplug.ops.lora.attention_input import AttentionInput, Norm, attention_input
from fastplug.ops.lora.group import Group
from fastplug.ops.rope.reference import rotate
from fastplug.ops.table import choose, fastplug_ops
from tests.accuracy import assert_as_accurate
from tests.ops.test_lora_products import projection

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter's bf16 products are wrong
pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param  # type: ignore[no-any-return]


class Case:
    """Random operands of ``shape`` [B, S]; ``batched``: cos and sin are of each row."""

    def __init__(
        self, shape: tuple[int, int], heads: Heads, ranks: tuple[int, int, int], batched: bool, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        (B, S), self.heads = shape, heads
        widths = [heads.width * count for count in (heads.queries, heads.keys, heads.keys)]
        self.qkv, self.xa = (
            torch.randn(B * S, sum(widths), device=device),
            torch.randn(B * S, sum(ranks), device=device),
        )
        parts = [torch.randn(width, rank, device=device) for width, rank in zip(widths, ranks)]
        self.b = torch.block_diag(*parts)
        self.columns = (ranks[0], ranks[0] + ranks[1], sum(ranks))
        angles = torch.rand(B if batched else 1, S, heads.width // 2, device=device).repeat(1, 1, 2) * 6
        self.cos, self.sin = angles.cos(), angles.sin()

    def operands(self, dtype: torch.dtype) -> tuple[torch.Tensor, Adapted, Heads, torch.Tensor, torch.Tensor]:
        """In ``dtype``; with values that 16 bits hold, in every dtype the same ones."""
        qkv, xa, b, cos, sin = (t.bfloat16().to(dtype) for t in (self.qkv, self.xa, self.b, self.cos, self.sin))
        return qkv, Adapted(xa, b, self.columns), self.heads, cos, sin

    def one_by_one(self, dtype: torch.dtype) -> torch.Tensor:
        """As one would write it."""
        qkv, adapted, heads, cos, sin = self.operands(dtype)
        full = torch.addmm(qkv, adapted.xa, adapted.b.t())
        full = full.view(-1, cos.shape[1], heads.queries + 2 * heads.keys, heads.width)
        turned, v = full.split([heads.queries + heads.keys, heads.keys], dim=2)
        return torch.cat((rotate(turned, cos, sin), v), dim=2).view(qkv.shape)


CASES = [
    ((1, 64), Heads(4, 4, 64), (16, 16, 16), False),
    ((2, 70), Heads(5, 2, 64), (8, 4, 16), True),
    ((3, 33), Heads(8, 1, 128), (32, 16, 8), False),
    ((1, 1), Heads(1, 1, 64), (1, 2, 3), True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_pytorch(op, device, dtype, case):
    if op is kernel and dtype == torch.float32 and device.type == "cuda":
        pytest.skip("the kernel is for 16 bits; the interpreter's products are right in 32")
    made = Case(*case, device)
    qkv, *others = made.operands(dtype)
    op.forward(qkv, *others)
    assert_as_accurate([qkv], [made.one_by_one(dtype)], [made.one_by_one(torch.float64)])


def test_angles_may_lie_apart(op, device):
    made = Case(*CASES[1], device)
    qkv, adapted, heads, cos, sin = made.operands(torch.float32)
    expected = qkv.clone()
    op.forward(expected, adapted, heads, cos, sin)
    apart = torch.stack((cos, sin), dim=-1)
    op.forward(qkv, adapted, heads, apart[..., 0], apart[..., 1])
    assert torch.equal(qkv, expected)


@pytest.mark.gpu
def test_of_a_large_model(device):
    made = Case((4, 2048), Heads(32, 8, 128), (16, 16, 16), False, device)
    qkv, *others = made.operands(torch.bfloat16)
    again = qkv.clone()
    assert kernel.suits(len(qkv), *others[:3])
    kernel.forward(qkv, *others)
    assert_as_accurate([qkv], [made.one_by_one(torch.bfloat16)], [made.one_by_one(torch.float64)])
    kernel.forward(again, *others)
    assert torch.equal(qkv, again)


def test_what_suits(device, monkeypatch):
    monkeypatch.setattr(kernel, "_here", lambda device: True)
    _, adapted, heads, cos, _ = Case(*CASES[0], device).operands(torch.bfloat16)

    def suits(tokens: int = 5000, heads: Heads = heads, cos: torch.Tensor = cos, **parts: Any) -> bool:
        return kernel.suits(tokens, adapted._replace(**parts), heads, cos)

    assert suits()
    assert not reference.suits(5000, adapted, heads, cos)
    assert not suits(tokens=1000)
    assert not suits(heads=heads._replace(width=80))
    assert not suits(cos=cos[..., :32])  # a part of each head is turned
    assert not suits(xa=adapted.xa.float(), b=adapted.b.float())
    assert not suits(xa=adapted.xa.t().contiguous().t())
    assert not suits(columns=(16, 32, 112))
    monkeypatch.undo()
    assert suits() == (device.type == "cuda" and torch.cuda.get_device_capability(device) >= kernel.OLDEST)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_one_pass(device, dropout, bias):
    """The same outputs and gradients as in a pass each, from the node before attention."""
    shapes = [(4 * 16, 48), (2 * 16, 48), (2 * 16, 48)]
    projections = [projection(*shape, device, i) for i, shape in enumerate(shapes)]
    leaves = [torch.randn(2, 9, 48, device=device), torch.rand(48, device=device) + 0.5]
    for p in projections:
        assert p.a is not None
        assert p.b is not None
        p.dropout, p.bias = dropout, torch.randn(p.shape[0], device=device) if bias else None
        leaves += [p.a.detach().clone(), p.b.detach().clone()]
    angles = torch.rand(1, 9, 8, device=device).repeat(1, 1, 2)
    calls: list[bool] = []

    def forward(*operands: Any) -> None:
        calls.append(True)
        reference.forward(*operands)

    def run(suits: bool) -> list[torch.Tensor]:
        table = choose(fastplug_ops(), device)
        table.adapted_rope = SimpleNamespace(suits=lambda *_: suits, forward=forward)
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        for i, p in enumerate(projections):
            p.a, p.b = own[2 + 2 * i : 4 + 2 * i]
        spec = AttentionInput(Group(projections, torch.float32, table), 16, Norm(1e-6))
        torch.manual_seed(3)
        outputs = attention_input(spec, own[0], angles.cos(), angles.sin(), own[1])
        generator = torch.Generator().manual_seed(4)
        loss = sum((out * torch.randn(out.shape, generator=generator).to(device)).sum() for out in outputs)
        return [*outputs, *torch.autograd.grad(loss, own)]

    for mine, other in zip(run(True), run(False)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert calls == [True]
