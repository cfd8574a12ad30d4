"""Small pieces of the products: accumulation in fp32, and dropout that can be undone."""

from __future__ import annotations

import torch


def mm(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in ``dtype``, from an fp32 accumulator without a rounding between where the backend can."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inverted dropout, drawing random numbers exactly as ``torch.nn.functional.dropout`` does; the mask is bool."""
    if p == 0.0:
        return x, None
    if x.is_cuda:
        return torch.native_dropout(x, p, True)
    keep = torch.empty_like(x).bernoulli_(1 - p).bool()
    return undrop(x, keep, p), keep


def undrop(x: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    """Apply a saved dropout mask: x · mask / (1 - p)."""
    if mask is None:
        return x
    return torch.where(mask, x * (1.0 / (1.0 - p)), 0.0) if p < 1 else torch.zeros_like(x)


def joins(device: torch.device) -> bool:
    """Whether projections of one tensor are better computed by one product: it saves launches, of which a CPU has none,
    and there a zero takes as long as a number."""
    return device.type != "cpu"
