"""Gated linear units (Shazeer 2020, arXiv:2002.05202) in plain PyTorch: ``activation(gate) * up``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``silu``: x sigmoid(x). ``gelu``: x Phi(x) (Hendrycks and Gimpel 2016). ``gelu_tanh``: its tanh approximation."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The op as models write it, differentiable."""
    return activate(gate, activation) * up


def check_activation(activation: str) -> None:
    """Raise ``ValueError`` for an activation that is not one of ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """Write ``activation(gate) * up`` into ``out``.

    Args:
        gate, up: [M, N], any float dtype, any row stride.
        activation: ``"silu"``, ``"gelu"`` (exact) or ``"gelu_tanh"``. Computed in fp32, rounded to gate's dtype before
            the product, as the modules do.
        out: [M, N]; rows may be strided. May be ``gate`` or ``up``.

    Raises:
        ValueError: For an unknown activation, or an ``out`` of another shape or with strided columns.
    """
    check_activation(activation)
    wide = torch.promote_types(gate.dtype, torch.float32)
    _product(activate(gate, activation).to(wide), up.to(wide), out)


def backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    out: torch.Tensor | None = None,
) -> None:
    """Write ``dgate = dout * up * activation'(gate)`` and ``dup = dout * activation(gate)``; ``out`` too if given.

    Args:
        dout, gate, up, activation: As in :func:`forward`.
        dgate, dup: [M, N], rows may be strided. May be ``gate`` and ``up``.
        out: [M, N] or None: receives :func:`forward`'s result again, for a backward that needs it (of the down
            projection's adapter) without having kept it. May be ``dout``.
    """
    check_activation(activation)
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u, d = gate.to(wide), up.to(wide), dout.to(wide, copy=out is dout)
    if activation == "silu":
        s = torch.sigmoid(g)
        slope = torch.neg(g).sigmoid_().mul_(g).add_(1).mul_(s)  # not 1 - s, which cancels
        value = s.mul_(g)
    elif activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        slope = cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        value = g * cdf
    else:
        # 0.5 (1 + tanh(z)) is sigmoid(2 z); saturated long before |g| reaches 32, so g^3 cannot overflow.
        c = g.clamp(-32, 32)
        y = math.sqrt(8 / math.pi) * (c + 0.044715 * c**3)
        s = torch.sigmoid(y)
        rest = torch.sigmoid(-y)  # not 1 - s, which cancels
        slope = s + c * s * rest * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * c * c)
        value = g * s
    slope.mul_(u)  # u is read before anything is written: the outputs may be the inputs
    if out is not None:
        _product(value.to(gate.dtype).to(wide), u, out)
    _product(slope, d, dgate)
    _product(value, d, dup)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a * b``, in one pass where it can be (``torch.compile`` writes no view that way)."""
    if out.dtype == a.dtype and not torch.compiler.is_compiling():
        torch.mul(a, b, out=out)
    else:
        out.copy_(a * b)
