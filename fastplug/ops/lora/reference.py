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
