"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in plain PyTorch.

Each pair of channels ``(a, b)`` of a head is turned by its position's angle: ``(a cos - b sin, b cos + a sin)``. Pair j
is channels ``(j, j + R/2)`` in the "half" layout of Llama and ``(2j, 2j + 1)`` in the interleaved one of the paper.
"""

from __future__ import annotations

import torch

from fastplug.ops.rms_norm import reference as rms_norm


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The op as models write it, differentiable: ``x`` [B, S, H, D] turned by ``cos``, ``sin`` [B or 1, S, R]."""
    half = cos.shape[-1] // 2
    x, rest = x.split([2 * half, x.shape[-1] - 2 * half], dim=-1)
    c, s = cos[..., None, :half], sin[..., None, :half]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    *,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cast_first: bool = True,
) -> None:
    """Write the rotated ``q`` and ``k``; the rotation is computed in fp32 and rounded once.

    Args:
        q, k: [B, S, heads, D], any outer strides; the two may have different numbers of heads.
        cos, sin: [B or 1, S, R] with R <= D even; channels from R on are passed through. The two halves of the last
            dimension are equal, as transformers makes them; only the first is read, in both layouts.
        q_out, k_out: Shaped as ``q``, ``k``, any outer strides. May be ``q`` and ``k`` themselves.
        interleaved: Whether pair j is channels ``(2j, 2j + 1)`` rather than ``(j, j + R/2)``.
        q_weight, k_weight: [D] or None: RMSNorm each head before the rotation (Qwen3).
        eps, offset, cast_first: Of that norm; see :func:`fastplug.ops.rms_norm.reference.forward`.
    """
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            x = rms_norm.rms_norm(x, weight, eps, offset, cast_first).to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        results.append(rotate(x.to(wide), cos.to(wide), sin.to(wide), interleaved))
    q_out.copy_(results[0])
    k_out.copy_(results[1])


def backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    *,
    interleaved: bool = False,
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cast_first: bool = True,
    weight_grad: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write the gradients of :func:`forward`'s inputs: the gradients turned back, then through the norm.

    Args:
        dq, dk: [B, S, heads, D], gradients of the rotated q and k, any strides.
        cos, sin, interleaved, eps, offset, cast_first: As in forward.
        dq_out, dk_out: Receive the gradients of ``q`` and ``k``; any outer strides. May be ``dq`` and ``dk``.
        q, k: What forward was given, needed where the head is normalized.
        q_weight, k_weight: As in forward.
        weight_grad: Whether the gradients of the norm weights are wanted.

    Returns:
        ``(dq_weight, dk_weight)``, each [D] in its weight's dtype, or None.

    Raises:
        ValueError: A norm weight was given without the q or k that it normalized.
    """
    check_saved(q, k, q_weight, k_weight)
    results, dweights = [], []
    for d, x, weight in ((dq, q, q_weight), (dk, k, k_weight)):
        wide = torch.promote_types(d.dtype, torch.float32)
        dx = rotate(d.to(wide), cos.to(wide), -sin.to(wide), interleaved)
        dweight = None
        if weight is not None and x is not None:
            flat = x.reshape(-1, x.shape[-1])
            rstd = torch.rsqrt(flat.to(wide).square().mean(-1) + eps)
            dx, dweight = rms_norm.backward(
                dx.reshape(flat.shape), flat, rstd, weight,
                offset=offset, cast_first=cast_first, weight_grad=weight_grad,
            )  # fmt: skip
            dx = dx.view(d.shape)
        results.append(dx)
        dweights.append(dweight)
    dq_out.copy_(results[0])
    dk_out.copy_(results[1])
    return dweights[0], dweights[1]


def check_saved(
    q: torch.Tensor | None, k: torch.Tensor | None, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None
) -> None:
    """Raise ``ValueError`` if a head norm is to be differentiated without its input."""
    for name, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        if weight is not None and x is None:
            raise ValueError(f"{name}_weight was given without {name}: the norm's gradient needs its input")
