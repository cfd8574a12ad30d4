"""The gated unit with the adapters around it in one pass: the op, its kernel without a GPU and on one, and the MLP."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastplug.ops import gluon
from fastplug.ops.adapted_glu import kernel, reference
from fastplug.ops.adapted_glu.reference import Adapted, Thin
from fastplug.ops.glu import reference as glu
from fastplug.ops.lora.attention_input import Norm
from fastplug.ops.lora.gated_mlp import GatedMLP, gated_mlp
from fastplug.ops.lora.group import Group, Projection
from fastplug.ops.table import choose, fastplug_ops
from tests.accuracy import assert_as_accurate
from tests.ops.gluon_on_cpu import emulated
from tests.ops.test_lora_products import HIDDEN, INNER, TOKENS, mlp_reference, projection

BF16 = torch.bfloat16
NAMES = ["out", "xa of down", "d_gate_up", "gb", "d b", "d a", "normed gb"]
needs_gluon = pytest.mark.skipif(not gluon.recent(), reason="this Triton has not what the kernel is written in")


@dataclass
class Case:
    """Random operands of both directions; ``joint``: gate and up come from one projection with one adapter."""

    tokens: int
    width: int
    ranks: tuple[int, int, int] = (16, 16, 16)
    activation: str = "silu"
    joint: bool = False
    dtype: torch.dtype = BF16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        gate, up, down = self.ranks
        total = gate if self.joint else gate + up
        self.columns = (slice(0, gate), slice(0, gate)) if self.joint else (slice(0, gate), slice(gate, total))
        self.gate_up = self.random(self.tokens, 2 * self.width)
        self.xa, self.a = self.random(self.tokens, total), 0.3 * self.random(down, self.width)
        self.b = torch.zeros(2 * self.width, total, dtype=self.dtype, device=self.device)
        for i, columns in enumerate(self.columns):
            rows = slice(i * self.width, (i + 1) * self.width)
            self.b[rows, columns] = 0.3 * self.random(self.width, columns.stop - columns.start)
        self.d_out, self.gb = self.random(self.tokens, self.width), self.random(self.tokens, down)
        self.scaling, self.scalings = 0.7, (1.5, 1.5 if self.joint else 0.6)  # of down, of gate and up
        wide = torch.promote_types(self.dtype, torch.float32)
        self.rstd = 0.5 + torch.rand(self.tokens, device=self.device, dtype=wide)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    @property
    def adapted(self) -> Adapted:
        return Adapted(self.xa, self.b, self.columns, self.a)

    def autograd(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """What PyTorch makes of it, written as one would write it."""
        gate_up, xa, b, a = (t.to(dtype).requires_grad_() for t in (self.gate_up, self.xa, self.b, self.a))
        parts = (gate_up + xa @ b.t()).chunk(2, dim=-1)
        out = glu.glu(*parts, self.activation)
        through = out @ a.t()
        upstream = self.d_out.to(dtype), self.gb.to(dtype)
        grads = torch.autograd.grad([out, through], [gate_up, xa, b, a], upstream)
        of_b = torch.cat([part[:, columns].flatten() for part, columns in zip(grads[2].chunk(2), self.columns)])
        factors = torch.empty(xa.shape[1], dtype=dtype, device=self.device)
        for columns, scaling in zip(self.columns, self.scalings):
            factors[columns] = scaling
        of_xa = grads[1] * factors
        normed = (of_xa * self.rstd[:, None]).to(dtype)
        return [out.detach(), self.scaling * through.detach(), grads[0], of_xa, of_b, grads[3], normed]

    def run(self, op: Any) -> list[torch.Tensor]:
        out = torch.full((self.tokens, self.width), float("nan"), dtype=self.dtype, device=self.device)
        d_gate_up = torch.full_like(self.gate_up, float("nan"))
        xa = op.forward(self.gate_up, self.adapted, self.activation, out, self.scaling)
        thin = self.backward(op, self.gate_up, d_gate_up)
        assert xa is not None
        assert thin.normed is not None
        return [out, xa, d_gate_up, thin.gb, torch.cat([part.flatten() for part in thin.b]), thin.a, thin.normed]

    def backward(self, op: Any, gate_up: torch.Tensor, d_gate_up: torch.Tensor) -> Thin:
        operands = (self.d_out, self.gb, gate_up, self.adapted, self.activation, d_gate_up, self.scalings)
        thin: Thin = op.backward(*operands, self.rstd)
        bare = op.backward(*operands[:-2], torch.empty_like(d_gate_up))
        assert bare.normed is None
        factor = torch.tensor(self.scalings[0], device=self.device).to(thin.gb.dtype)
        torch.testing.assert_close(bare.gb[:, self.columns[0]] * factor, thin.gb[:, self.columns[0]])
        return thin

    def check(self, found: list[torch.Tensor]) -> None:
        assert_as_accurate(found, self.autograd(self.dtype), self.autograd(torch.float64), NAMES)


CASES = [
    {"tokens": 64, "width": 64},
    {"tokens": 200, "width": 320},
    {"tokens": 130, "width": 200, "ranks": (8, 16, 8), "activation": "gelu_tanh"},
    {"tokens": 65, "width": 72, "ranks": (32, 8, 24)},
    {"tokens": 200, "width": 136, "ranks": (64, 64, 64)},
    {"tokens": 100, "width": 128, "ranks": (16, 16, 8), "joint": True},
]


@pytest.mark.parametrize("case", CASES)
def test_the_reference(case, device):
    made = Case(**case, device=device, dtype=torch.float64)
    for mine, theirs in zip(made.run(reference), made.autograd(torch.float64)):
        torch.testing.assert_close(mine, theirs)


def in_one_pass(case: Case, late: bool, **modules: ModuleType) -> list[torch.Tensor]:
    """Through ``kernel.py`` on the CPU, as on a GPU of three multiprocessors; ``modules`` take the kernels' place."""

    def launcher(direction: str) -> Any:
        module = modules.get(direction) or importlib.import_module(f"fastplug.ops.adapted_glu.hopper_{direction}")
        return emulated(module, late)["launch"]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernel, "multiprocessors", lambda device: 3)
        patched.setattr(kernel, "launcher", launcher)
        patched.setattr(kernel, "broken", {})
        found = case.run(kernel)
        assert not any(kernel.broken.values())
        return found


@needs_gluon
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_without_a_gpu(case, late):
    made = Case(**case)
    made.check(in_one_pass(made, late))


@needs_gluon
def test_more_tokens_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK", 64)
    made = Case(150, 128)
    made.check(in_one_pass(made, True))


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if not gluon.multiprocessors(device):
        pytest.skip("not this GPU")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, {"tokens": 1000, "width": 14336}, {"tokens": 9000, "width": 1024}])
def test_the_kernel_on_a_gpu(case, hopper):
    made = Case(**case, device=hopper)
    assert kernel.suits(made.tokens, made.adapted, made.activation)
    found = made.run(kernel)
    made.check(found)
    for mine, again in zip(found, made.run(kernel)):
        assert torch.equal(mine, again)
    assert not any(kernel.broken.values())


@pytest.mark.gpu
def test_over_gate_and_up_on_a_gpu(hopper):
    made = Case(500, 1024, device=hopper)
    found, base = made.run(kernel), made.gate_up.clone()
    thin = kernel.backward(made.d_out, made.gb, base, made.adapted, "silu", base, made.scalings, made.rstd)
    assert thin is not None
    assert torch.equal(base, found[2])
    assert torch.equal(thin.gb, found[3])


def test_what_suits(monkeypatch):
    made = Case(64, 64)

    def suits(activation: str = "silu", **parts: Any) -> bool:
        return kernel.suits(parts.pop("tokens", 64), made.adapted._replace(**parts), activation)

    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 132)
    assert suits()
    assert not suits("gelu")
    assert not suits(tokens=0)
    assert not suits(a=made.a[:4])  # rows of other than 16 bytes
    assert not suits(a=made.a[:, :60])
    assert not suits(a=made.a.repeat(5, 1))  # a rank of 80
    assert not suits(xa=made.xa.float(), b=made.b.float(), a=made.a.float())
    monkeypatch.setitem(kernel.broken, ("forward", "silu", 16, BF16), ["does not compile"])
    assert not suits()
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 0)
    assert not suits("gelu_tanh")


def test_a_triton_that_cannot_compile_it_is_asked_once(monkeypatch):
    made, asked = Case(64, 64), []

    def launcher(direction: str) -> Any:
        asked.append(1)
        raise RuntimeError("error encountered during parsing")

    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(kernel, "broken", {})
    monkeypatch.setattr(kernel, "launcher", launcher)
    out = torch.empty(64, 64, dtype=BF16)
    assert kernel.suits(64, made.adapted, "silu")
    for _ in range(2):
        assert kernel.forward(made.gate_up, made.adapted, "silu", out) is None
        assert not kernel.suits(64, made.adapted, "silu")
    assert len(asked) == 1
    # A backward that does not compile changes nothing about forwards: what gate and up hold stays decided.
    monkeypatch.setattr(kernel, "broken", {})
    assert kernel.backward(made.d_out, made.gb, made.gate_up, made.adapted, "silu", made.gate_up) is None
    assert kernel.suits(64, made.adapted, "silu")


# --- in the MLP -------------------------------------------------------------------------------------------------------


class Table:
    """An op table whose one pass is the reference's and suits; ``fails``: what of it the device cannot after all."""

    def __init__(self, device: torch.device, *fails: str) -> None:
        self.table = choose(fastplug_ops(), device)
        self.calls: list[str] = []
        forward, backward = self.counted("forward", fails), self.counted("backward", fails)
        self.adapted_glu = SimpleNamespace(suits=self.suits, forward=forward, backward=backward)
        self.fails = fails

    def suits(self, *arguments: Any) -> bool:
        """Until the forward has failed."""
        return not ("forward" in self.fails and "forward" in self.calls)

    def counted(self, name: str, fails: tuple[str, ...]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return None if name in fails else getattr(reference, name)(*arguments)

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)


def mlp(device: torch.device, table: Any, **options: Any) -> tuple[list[Projection], Callable[..., torch.Tensor]]:
    projections = [projection(INNER, HIDDEN, device, 1), projection(INNER, HIDDEN, device, 2)]
    projections.append(projection(HIDDEN, INNER, device, 3))
    table = choose(fastplug_ops(), device) if table is None else table

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *adapters: torch.Tensor) -> torch.Tensor:
        for i, p in enumerate(projections):
            p.a, p.b = adapters[2 * i : 2 * i + 2]  # type: ignore[assignment]
        groups = Group(projections[:2], BF16, table), Group(projections[2:], BF16, table)
        return gated_mlp(GatedMLP(*groups, "silu", Norm(1e-6), **options), x, residual, weight)  # type: ignore[no-any-return]

    return projections, run


def inputs(projections: list[Projection], device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(4)
    made = [torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN), 1 + 0.1 * torch.randn(HIDDEN)]
    made = [t.to(device, BF16) for t in made]
    for p in projections:
        assert p.a is not None
        assert p.b is not None
        made += [p.a.detach().to(BF16), p.b.detach().to(BF16)]
    return [t.requires_grad_() for t in made]


def gradients(run: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out = run(*leaves)
    torch.manual_seed(5)
    g = torch.randn(out.shape).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def test_an_mlp(device):
    table = Table(device)
    projections, run = mlp(device, table)
    leaves = inputs(projections, device)

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            return mlp_reference(projections, 0.0, *tensors)  # type: ignore[no-any-return]

        return gradients(call, [t.detach().to(dtype).requires_grad_() for t in leaves])

    found = gradients(run, leaves)
    assert table.calls == ["forward", "backward"]
    assert_as_accurate(found, plain(BF16), plain(torch.float64))


@pytest.mark.parametrize("how", ["drop", "checkpoint", "twice"])
def test_the_same_bits_however_it_is_kept(device, how):
    table = Table(device)
    projections, run = mlp(device, table)
    leaves = inputs(projections, device)
    expected = gradients(run, leaves)
    table.calls.clear()
    if how == "drop":
        _, other = mlp(device, table, keep_gate_up=False)
        found = gradients(other, leaves)
    elif how == "checkpoint":
        found = gradients(lambda *tensors: checkpoint(run, *tensors, use_reentrant=False), leaves)
    else:
        out = run(*leaves)
        torch.manual_seed(5)
        g = torch.randn(out.shape).to(device, BF16)
        torch.autograd.grad(out, leaves, g, retain_graph=True)
        found = [out.detach(), *torch.autograd.grad(out, leaves, g)]
    assert table.calls == ["forward", "backward", "backward"][: 3 if how == "twice" else 2]
    for mine, theirs in zip(found, expected):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("fails", [("forward",), ("backward",)])
@pytest.mark.parametrize("how", ["kept", "drop", "checkpoint"])
def test_a_device_that_cannot_after_all(device, fails, how):
    projections, usual = mlp(device, None)
    leaves = inputs(projections, device)
    _, run = mlp(device, Table(device, *fails), keep_gate_up=how != "drop")
    wrapped = (lambda *tensors: checkpoint(run, *tensors, use_reentrant=False)) if how == "checkpoint" else run
    found, expected = gradients(wrapped, leaves), gradients(usual, leaves)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


def test_adapters_of_another_kind_are_left_alone(device):
    table = Table(device)
    projections, run = mlp(device, table)
    leaves = inputs(projections, device)
    projections[0].dropout = 0.1
    gradients(run, leaves)
    projections[0].dropout = 0.0
    gradients(lambda *tensors: run(*tensors[:3], None, None, *tensors[5:]) + 0 * sum(t.sum() for t in tensors), leaves)
    assert not table.calls
