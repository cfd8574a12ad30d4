"""Attention within documents: softmax(scale · q kᵀ + mask) v, the mask block-diagonal and causal."""

from __future__ import annotations

import torch

from fastplug.ops.document_attention.documents import Documents


def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """q [B, H, S, D], k and v [B, H / groups, S, D] -> [B, S, H, D], in the dtype of q, computed in it."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~documents.mask(window), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)
