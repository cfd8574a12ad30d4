"""The gated unit with the adapters around it in plain PyTorch: act(gate + share) · (up + share), see ``__init__.py``.

The share of gate and up together is x Bᵀ with x = s · input Aᵀ and B block-diagonal (Hu et al. 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastplug.ops.glu import reference as glu


class Adapted(NamedTuple):
    """The adapters of gate and up, and of the projection that follows (down).

    Attributes:
        xa: s · x Aᵀ of gate and up, [T, rank].
        b: Their B, [2 N, rank]: the gate's rows first.
        columns: Which columns of both are the gate's and which are up's; all others are zero in those rows of ``b``.
        a: A of down, [rank, N].
    """

    xa: torch.Tensor
    b: torch.Tensor
    columns: tuple[slice, slice]
    a: torch.Tensor


class Thin(NamedTuple):
    """What the backward sums up beside the gradients of gate and up, in fp32 or wider.

    Attributes:
        gb: The gradient of ``xa``, [T, rank].
        b: That of ``b`` where it is not zero: of the gate's rows and columns, and of up's, each [N, its rank].
        a: That of ``a``, [rank, N].
    """

    gb: torch.Tensor
    b: tuple[torch.Tensor, ...]
    a: torch.Tensor


def suits(tokens: int, adapted: Adapted, activation: str) -> bool:
    """Whether one pass is faster here than the products and the gated unit one by one: never in plain PyTorch."""
    return False


def forward(gate_up: torch.Tensor, adapted: Adapted, activation: str, out: torch.Tensor) -> torch.Tensor | None:
    """Write act(gate + share) · (up + share) into ``out``; returns out Aᵀ [T, rank] in fp32 or wider.

    None, with nothing written, where the device cannot after all.

    Args:
        gate_up: [T, 2 N] of the base alone.
        adapted: See :class:`Adapted`.
        activation: As of :func:`fastplug.ops.glu.reference.forward`.
        out: [T, N].
    """
    gate, up = _full(gate_up, adapted).chunk(2, dim=-1)
    glu.forward(gate, up, activation, out)
    return out.to(gate.dtype) @ adapted.a.to(gate.dtype).t()


def backward(
    d_out: torch.Tensor,
    gb: torch.Tensor,
    gate_up: torch.Tensor,
    adapted: Adapted,
    activation: str,
    d_gate_up: torch.Tensor,
) -> Thin | None:
    """Write the gradient of gate and up; returns what follows from it and from the unit's result, or None as above.

    Args:
        d_out: [T, N], the gradient of the unit's result without gb A, the share of down's adapter.
        gb: s · g B of that adapter, [T, rank].
        gate_up, adapted, activation: As of :func:`forward`.
        d_gate_up: [T, 2 N]. May be ``gate_up``.
    """
    full = _full(gate_up, adapted)
    gate, up = full.chunk(2, dim=-1)
    out = torch.empty_like(gate)
    d = d_out.to(full.dtype) + gb.to(full.dtype) @ adapted.a.to(full.dtype)
    d_full = torch.empty_like(full)
    d_gate, d_up = d_full.chunk(2, dim=-1)
    glu.backward(d, gate, up, activation, d_gate, d_up, out)
    d_gate_up.copy_(d_full)
    d_full, out = d_gate_up.to(full.dtype), out.to(d_gate_up.dtype).to(full.dtype)
    a = gb.to(full.dtype).t() @ out
    xa = adapted.xa.to(full.dtype)
    b = tuple(part.t() @ xa[:, columns] for part, columns in zip(d_full.chunk(2, dim=-1), adapted.columns))
    return Thin(d_full @ adapted.b.to(full.dtype), b, a)


def _full(base: torch.Tensor, adapted: Adapted) -> torch.Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    return base.to(wide) + adapted.xa.to(wide) @ adapted.b.to(wide).t()
