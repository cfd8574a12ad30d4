"""FP8 products in plain PyTorch: the arithmetic of ``kernel``, on any device.

A matrix is stored as e4m3 (Micikevicius et al. 2022, arXiv:2209.05433: four exponent and three mantissa bits, largest
value 448) with one fp32 scale for each row: x = scale · q, scale = max |row| / 448. In a product a · bᵀ of two such
matrices the scales of both come out of the sum, so the products are exact and only the values are rounded.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x over its own scale.

    Args:
        x: [M, K], 16 or 32 bits, rows may be strided.

    Returns:
        ``(q, scale)``: q [M, K] e4m3, contiguous; scale [M] fp32. A row of zeros has scale 1.
    """
    wide = x.float()
    amax = wide.abs().amax(1)
    scale = torch.where(amax > 0, amax / LARGEST, 1.0)
    return (wide * (1 / scale)[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


def column_scales(w: torch.Tensor) -> torch.Tensor:
    """max |column| / 448 [K] fp32 of w [N, K]; 1 for a column of zeros."""
    amax = w.float().abs().amax(0)
    return torch.where(amax > 0, amax / LARGEST, 1.0)


def quantize_columns(w: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Each column of w [N, K] over its ``scale`` [K], transposed: [K, N] e4m3, written into ``out`` where given."""
    q = (w.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(FP8).t()
    return q.contiguous() if out is None else out.copy_(q)


def product(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(a_scale · a) (b_scale · b)ᵀ [M, N] in ``dtype``, for a [M, K] and b [N, K] e4m3 with scales [M] and [N]."""
    return ((a.float() @ b.float().t()) * a_scale[:, None] * b_scale).to(dtype)


def product_add(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    dtype: torch.dtype,
    alpha: float = 1.0,
) -> torch.Tensor | None:
    """:func:`product` and alpha · left rightᵀ in one kernel, summed in fp32 and rounded once, where there is one.

    Args:
        a, a_scale, b, b_scale, dtype: As in :func:`product`.
        left: [M, R] in ``dtype``.
        right: [N, R] in ``dtype``.
        alpha: A factor, not 0.

    Returns:
        [M, N] in ``dtype``, or None: then the product and an addition in place are the way.
    """
    return None
