"""What one projection with a LoRA adapter computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> torch.Tensor:
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ.

    Shapes: x [..., in], weight [out, in], bias [out], a [rank, in], b [out, rank]; returns [..., out].
    """
    y = F.linear(x, weight, bias)
    if a is not None and b is not None:
        y = y + F.linear(F.linear(F.dropout(x, dropout), a), b) * scaling
    return y


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    magnitude: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """DoRA: y = c · x W'ᵀ + bias for W' = W + scaling · B A and c = magnitude / ||W'||, a constant but for magnitude.

    Shapes as above, magnitude [out]. With ``mask``, the dropped input's factors [..., in] (0 or 1 / (1 - p)), only the
    dropped input is scaled and adapted: y = x Wᵀ + bias - d Wᵀ + c · d W'ᵀ with d = x · mask.
    """
    updated = weight + scaling * (b @ a)
    c = magnitude / torch.linalg.vector_norm(updated, dim=1).detach()
    if mask is None:
        return F.linear(x, updated * c[:, None], bias)
    dropped = x * mask
    return F.linear(x - dropped, weight, bias) + F.linear(dropped, updated) * c
