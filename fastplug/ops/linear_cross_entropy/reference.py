"""What the op computes, on logits that are held whole: the form to read, and to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    num_items: Tensor | int | float | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The loss as ``transformers`` computes it: logits in the model's dtype, then fp32 and ``F.cross_entropy``."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if num_items is None:
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum") / num_items
