"""A group's products with their adapters, over a decoded and a dense base: outputs and every gradient."""

from __future__ import annotations

import copy
import functools

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastplug.ops.adapted_glu import reference as adapted_glu
from fastplug.ops.lora.attention_input import Norm
from fastplug.ops.lora.gated_mlp import GatedMLP, gated_mlp
from fastplug.ops.lora.group import Group, Projection
from fastplug.ops.lora.linear import lora_linear
from fastplug.ops.table import table_for
from fastplug.quant.bnb4 import BitsAndBytes4
from fastplug.quant.plain import Plain
from tests.accuracy import assert_as_accurate

HIDDEN, INNER, TOKENS, RANK = 64, 128, 24, 8


def projection(out_features: int, in_features: int, device: torch.device, seed: int) -> Projection:
    torch.manual_seed(seed)
    weight = torch.randn(out_features, in_features) / in_features**0.5
    linear = bnb.nn.Linear4bit(in_features, out_features, bias=False, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    linear.to(device)
    a = torch.nn.Parameter((torch.randn(RANK, in_features) / in_features**0.5).to(device))
    b = torch.nn.Parameter((torch.randn(out_features, RANK) / RANK**0.5).to(device))
    read = functools.partial(BitsAndBytes4().read, linear)
    return Projection(read, (out_features, in_features), a=a, b=b, scaling=0.5 + 0.25 * seed)


def dense_projection(out_features: int, in_features: int, device: torch.device, seed: int) -> Projection:
    p = projection(out_features, in_features, device, seed)
    linear = torch.nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16)
    p.read = functools.partial(Plain().read, linear)
    return p


def dense(p: Projection, dtype: torch.dtype) -> torch.Tensor:
    weight = p.read()
    out = torch.empty(p.shape, dtype=torch.bfloat16, device=weight.tensors[0].device)
    weight.decode(out, table_for(out.device))
    return out.to(dtype)


def linear_reference(p: Projection, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x @ dense(p, x.dtype).t() + (x @ a.t()) @ b.t() * p.scaling


def assert_accurate(fused, reference, inputs) -> None:
    """Output and gradients of ``fused`` in bf16 against ``reference`` in bf16 and in fp64."""

    def run(function, dtype):
        leaves = [t.to(torch.bfloat16).to(dtype).requires_grad_() for t in inputs]
        out = function(*leaves)
        torch.manual_seed(5)
        g = torch.randn(out.shape).to(out.device).to(torch.bfloat16)
        return [out.detach(), *torch.autograd.grad(out, leaves, g.to(dtype))]

    assert_as_accurate(run(fused, torch.bfloat16), run(reference, torch.bfloat16), run(reference, torch.float64))


def mlp_reference(projections, offset, x, residual, weight, *adapters):
    h = x + residual
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * (weight + offset)
    gate, up, down = (functools.partial(linear_reference, p) for p in projections)
    a = iter(adapters)
    inner = torch.nn.functional.silu(gate(normed, next(a), next(a))) * up(normed, next(a), next(a))
    return h + down(inner, next(a), next(a))


@pytest.mark.parametrize("make", [projection, dense_projection])
@pytest.mark.parametrize("shape", [(INNER, HIDDEN), (HIDDEN, INNER)], ids=["wide", "narrow"])
def test_one_projection(device, shape, make):
    p = make(*shape, device, 2)
    ops = table_for(device)

    def fused(x, a, b):
        p.a, p.b = a, b
        return lora_linear(Group([p], x.dtype, ops), x)

    x = torch.randn(2 * INNER, shape[1], device=device)
    assert_accurate(fused, functools.partial(linear_reference, p), (x, p.a.detach(), p.b.detach()))


@pytest.mark.parametrize("make", [projection, dense_projection])
@pytest.mark.parametrize(("outlier", "offset"), [(1.0, 0.0), (300.0, 0.0), (1.0, 1.0)])
def test_a_gated_mlp(device, make, outlier, offset):
    """Also of a stream in which one channel is much larger than the others, and with Gemma's norm."""
    ops = table_for(device)
    projections = [make(*shape, device, i) for i, shape in enumerate([(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)])]
    norm = Norm(1e-6, offset, cast_first=not offset)

    def fused(x, residual, weight, *adapters):
        for p, a, b in zip(projections, adapters[::2], adapters[1::2], strict=True):
            p.a, p.b = a, b
        spec = GatedMLP(Group(projections[:2], x.dtype, ops), Group(projections[2:], x.dtype, ops), "silu", norm)
        return gated_mlp(spec, x, residual, weight)

    inputs = [torch.randn(2 * INNER, HIDDEN, device=device) for _ in range(2)] + [
        torch.rand(HIDDEN, device=device) + 0.5
    ]
    inputs[0][:, 3] *= outlier
    inputs += [t.detach() for p in projections for t in (p.a, p.b)]
    assert_accurate(fused, functools.partial(mlp_reference, projections, offset), inputs)


def test_the_gradient_of_gate_and_up_takes_their_memory_unless_the_graph_is_kept(device):
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    projections = [dense_projection(*shape, device, i) for i, shape in enumerate(shapes)]
    ops, dtype = table_for(device), torch.bfloat16
    spec = GatedMLP(Group(projections[:2], dtype, ops), Group(projections[2:], dtype, ops), "silu", Norm(1e-6))
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype).requires_grad_()
    wanted = [x, *(tensor for p in projections for tensor in (p.a, p.b))]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = gated_mlp(spec, x, torch.zeros_like(x), torch.ones(HIDDEN, device=device, dtype=dtype))
    (gate_up,) = [tensor for tensor in saved if tensor.shape == (TOKENS, 2 * INNER)]
    before = gate_up.clone()
    first = torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)
    assert torch.equal(gate_up, before)
    second = torch.autograd.grad(out, wanted, torch.ones_like(out))
    assert not torch.equal(gate_up, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


class Counting:
    """An op's functions, and how often the forward ran."""

    def __init__(self, plain):
        self.plain, self.backward, self.forwards = plain, plain.backward, 0

    def forward(self, *args):
        self.forwards += 1
        self.plain.forward(*args)


@pytest.mark.parametrize(("dropout", "forwards"), [(0.0, 1), (0.3, 2)])
def test_gradient_checkpointing_makes_the_activation_once(device, dropout, forwards):
    """What down needs of it for its adapter is kept, unless its adapter drops its input; the bits stay."""
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    projections = [dense_projection(*shape, device, i) for i, shape in enumerate(shapes)]
    for p in projections:
        p.dropout = dropout
    ops, dtype = copy.copy(table_for(device)), torch.bfloat16
    ops.glu, ops.adapted_glu = Counting(ops.glu), adapted_glu  # else a Hopper GPU makes the unit in one pass
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype).requires_grad_()
    wanted = [x, *(tensor for p in projections for tensor in (p.a, p.b))]

    def mlp(x):
        spec = GatedMLP(Group(projections[:2], dtype, ops), Group(projections[2:], dtype, ops), "silu", Norm(1e-6))
        return gated_mlp(spec, x, torch.zeros_like(x), torch.ones(HIDDEN, device=device, dtype=dtype))

    def gradients(call):
        torch.manual_seed(1)
        out = call(x)
        first = torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)
        ops.glu.forwards, before = 0, ops.glu.forwards
        second = torch.autograd.grad(out, wanted, torch.ones_like(out))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        return out, first, before

    plain, found, _ = gradients(mlp)
    out, again, ran = gradients(lambda x: checkpoint(mlp, x, use_reentrant=False))
    assert torch.equal(out, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert ran == forwards
    _, again, _ = gradients(
        lambda x: checkpoint(lambda x: checkpoint(mlp, x, use_reentrant=False), x, use_reentrant=False)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again))
