"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) in plain PyTorch: ``y = x / sqrt(mean(x^2) + eps) * weight``."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = True
) -> torch.Tensor:
    """The op as models write it, differentiable: the definition of both cast orders.

    ``cast_first`` is Llama's order (normalize in fp32, cast to x's dtype, then scale); otherwise Gemma's (scale by
    ``offset + weight`` in fp32, then cast).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_first:
        return normed.to(x.dtype) * (weight + offset if offset else weight)
    return (normed * (offset + weight.to(normed.dtype))).to(x.dtype)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    cast_first: bool = True,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``h = x + residual`` and ``y = rms_norm(h)``.

    Args:
        x: [M, N], any float dtype, any row stride.
        weight: [N] of any float dtype, or None for no scale.
        eps: Added to the mean square.
        residual: [M, N], added to ``x``; the sum is rounded to x's dtype before it is normalized.
        offset: Added to ``weight`` (1 in Gemma, whose weights are stored around 0).
        cast_first: Round the normalized value to x's dtype before the scale (Llama), or only after it (Gemma).
        out: [M, N] to write ``y`` into; rows may be strided.
        out_dtype: Dtype of ``y`` where ``out`` is not given; x's by default.

    Returns:
        ``(y, h, rstd)``: ``h`` is ``x`` itself without a residual; ``rstd`` [M] fp32 is ``1 / sqrt(mean(h^2) + eps)``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else (x.to(wide) + residual.to(wide)).to(x.dtype)
    rstd = torch.rsqrt(h.to(wide).square().mean(-1) + eps)
    y = h.to(wide) * rstd[:, None]
    if cast_first:
        y = y.to(x.dtype).to(wide)
    if weight is not None:
        y = y.mul_(weight.to(wide) + offset)
    if out is not None:
        return out.copy_(y), h, rstd
    return y.to(out_dtype or x.dtype), h, rstd


def backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    offset: float = 0.0,
    cast_first: bool = True,
    dh: torch.Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of :func:`forward`.

    With ``g = dy * (offset + weight)`` and ``n = h * rstd``: ``dx = rstd * (g - n * mean(g * n)) + dh`` and
    ``dweight = sum over rows of dy * n``, both accumulated in fp32 and rounded once.

    Args:
        dy: [M, N], gradient of ``y``.
        h: [M, N] and ``rstd`` [M], as :func:`forward` returned them.
        weight: As in forward.
        cast_first: Accepted for symmetry: rounding has no gradient, so both cast orders share one formula.
        dh: [M, N], gradient of ``h`` from its other uses (the residual stream), or None.
        weight_grad: Whether ``dweight`` is wanted.

    Returns:
        ``(dx, dweight)``: ``dx`` [M, N] in h's dtype is the gradient of ``x`` and of ``residual``; ``dweight`` [N] in
        weight's dtype, or None.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    normed = h.to(wide) * rstd[:, None]
    g = dy.to(wide)
    scaled = g if weight is None else g * (weight.to(wide) + offset)
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)).mul_(rstd[:, None])
    if dh is not None:
        dx = dx.add_(dh)
    dweight = (g * normed).sum(0).to(weight.dtype) if weight_grad and weight is not None else None
    return dx.to(h.dtype), dweight
