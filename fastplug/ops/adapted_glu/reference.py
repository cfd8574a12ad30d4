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
    """What the backward sums up beside the gradients of gate and up.

    Attributes:
        gb: The gradient of ``xa`` times s, [T, rank] in its dtype.
        b: That of ``b`` where it is not zero: of the gate's rows and columns, and of up's, each [N, its rank] in fp32
            or wider.
        a: That of ``a``, [rank, N] in fp32 or wider.
        normed: ``gb`` times 1/rms of the tokens, if that was given.
    """

    gb: torch.Tensor
    b: tuple[torch.Tensor, ...]
    a: torch.Tensor
    normed: torch.Tensor | None = None


def suits(tokens: int, adapted: Adapted, activation: str) -> bool:
    """Whether one pass is faster here than the products and the gated unit one by one: never in plain PyTorch."""
    return False


def forward(
    gate_up: torch.Tensor, adapted: Adapted, activation: str, out: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor | None:
    """Write act(gate + share) · (up + share) into ``out``; returns s · out Aᵀ [T, rank] in its dtype.

    None, with nothing written, where the device cannot after all.

    Args:
        gate_up: [T, 2 N] of the base alone.
        adapted: See :class:`Adapted`.
        activation: As of :func:`fastplug.ops.glu.reference.forward`.
        out: [T, N].
        scaling: s of the projection that follows.
    """
    gate, up = _full(gate_up, adapted).chunk(2, dim=-1)
    glu.forward(gate, up, activation, out)
    return (scaling * (out.to(gate.dtype) @ adapted.a.to(gate.dtype).t())).to(out.dtype)


def backward(
    d_out: torch.Tensor,
    gb: torch.Tensor,
    gate_up: torch.Tensor,
    adapted: Adapted,
    activation: str,
    d_gate_up: torch.Tensor,
    scalings: tuple[float, float] = (1.0, 1.0),
    rstd: torch.Tensor | None = None,
) -> Thin | None:
    """Write the gradient of gate and up; returns what follows from it and from the unit's result, or None as above.

    Args:
        d_out: [T, N], the gradient of the unit's result without gb A, the share of down's adapter.
        gb: s · g B of that adapter, [T, rank].
        gate_up, adapted, activation: As of :func:`forward`.
        d_gate_up: [T, 2 N]. May be ``gate_up``.
        scalings: s of gate and of up; equal if they share an adapter.
        rstd: 1/rms of the norm before gate and up, [T] in fp32 or wider, or None.
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
    of_xa = d_full @ adapted.b.to(full.dtype)
    for columns, scaling in {part.start: (part, s) for part, s in zip(adapted.columns, scalings)}.values():
        of_xa[:, columns] *= scaling
    of_xa = of_xa.to(adapted.xa.dtype)
    normed = None if rstd is None else (of_xa.to(full.dtype) * rstd[:, None]).to(of_xa.dtype)
    return Thin(of_xa, b, a, normed)


def _full(base: torch.Tensor, adapted: Adapted) -> torch.Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    return base.to(wide) + adapted.xa.to(wide) @ adapted.b.to(wide).t()
