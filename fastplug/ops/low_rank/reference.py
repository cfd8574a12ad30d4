"""y + alpha · x bᵀ in plain PyTorch, in y or elsewhere: LoRA's update of what is there already (Hu et al. 2021)."""

from __future__ import annotations

import torch


def add(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> None:
    """Add alpha · x bᵀ to ``y`` in place, summed in fp32 and rounded once.

    Args:
        y: [M, N], rows may be strided.
        x: [M, R] in y's dtype, any strides.
        b: [N, R] in y's dtype, any strides.
        alpha: A factor.
    """
    y.addmm_(x, b.t(), alpha=alpha)


def added(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """y + alpha · x bᵀ [M, N], contiguous, of the same tensors as :func:`add`; ``y`` stays as it is."""
    return torch.addmm(y, x, b.t(), alpha=alpha)
