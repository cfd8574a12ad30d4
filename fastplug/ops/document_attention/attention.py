"""Attention within documents by the best backend there is.

* ``varlen``: a FlashAttention kernel that takes ``cu_seqlens``: PyTorch's own (2.10 and later), else that of the
  package flash-attn. fp16 and bf16 on NVIDIA GPUs; no work between documents, no mask, nothing waits for the GPU.
* ``loop``: PyTorch's causal attention, document by document. Exact everywhere and without a quadratic mask; many short
  documents are many launches, so a GPU gets it only where the mask would be large.
* ``mask``: one call with the block-diagonal mask, which is made once per step.

FlexAttention is not among them: it must be compiled in the first step, and where it could, the first one runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fastplug.ops.document_attention.documents import Documents

MASKED = 2**26  # elements of a mask above which documents run one by one: 64 MiB of it, one row of 8,192 tokens

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, "int | None", "float | None"], torch.Tensor]


def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention in which no token sees another document.

    Args:
        q: [B, H, S, D].
        k, v: [B, H / groups, S, D].
        documents: Of these B rows of S tokens.
        window: A token sees at most so many tokens, itself included; None for all before it.
        scale: Factor on q kᵀ; None for 1 / sqrt(D).

    Returns:
        [B, S, H, D], contiguous.
    """
    if window is not None and window >= documents.max_length:
        window = None
    return BACKENDS[choose(q, documents, window)](q, k, v, documents, window, scale)


def choose(q: torch.Tensor, documents: Documents, window: int | None = None) -> str:
    """The backend for q [B, H, S, D]: a key of ``BACKENDS``."""
    if not q.is_cuda:
        return "loop"
    if _flash_takes(q) and _varlen_function(window is not None) is not None:
        return "varlen"
    return "mask" if documents.rows * documents.length**2 <= MASKED else "loop"


def _flash_takes(q: torch.Tensor) -> bool:
    """Whether FlashAttention 2 has kernels for this dtype, width and GPU, the backward included."""
    if torch.version.hip is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    width, capability = q.shape[-1], torch.cuda.get_device_capability(q.device)
    largest = 256 if capability in ((8, 0), (9, 0), (10, 0)) else 192
    return capability >= (8, 0) and width % 8 == 0 and width <= largest


@functools.cache
def _varlen_function(windowed: bool) -> Callable[..., torch.Tensor] | None:
    """``f(q, k, v, cu_seqlens, max_length, window, scale)`` over [tokens, heads, D], or None where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _flash_attn_function()
    parameters = inspect.signature(varlen_attn).parameters
    if "scale" not in parameters:
        return _flash_attn_function()
    extra: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    if "window_size" not in parameters:  # 2.10
        if windowed:
            return _flash_attn_function()
        extra["is_causal"] = True

    def by_torch(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int, window: Any, scale: Any
    ) -> torch.Tensor:
        sides: dict[str, Any] = (
            {} if "is_causal" in extra else {"window_size": (-1 if window is None else window - 1, 0)}
        )
        return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, **sides, **extra)  # type: ignore[return-value]

    return by_torch


@functools.cache
def _flash_attn_function() -> Callable[..., torch.Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]
    except Exception:  # not installed, or built for another PyTorch
        return None

    def by_flash_attn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int, window: Any, scale: Any
    ) -> torch.Tensor:
        return flash_attn_varlen_func(  # type: ignore[no-any-return]
            q,
            k,
            v,
            cu,
            cu,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return by_flash_attn


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None, scale: float | None
) -> torch.Tensor:
    function = _varlen_function(window is not None)
    assert function is not None
    tokens = [part.transpose(1, 2).reshape(-1, part.shape[1], part.shape[-1]) for part in (q, k, v)]
    out = function(*tokens, documents.cu_seqlens, documents.max_length, window, scale)
    return out.view(q.shape[0], q.shape[2], q.shape[1], -1)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None, scale: float | None
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # with a mask, grouped heads would leave PyTorch's efficient kernels
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask(window), scale=scale)
    return out.transpose(1, 2).contiguous()


def _loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None, scale: float | None
) -> torch.Tensor:
    # One row of all tokens [1, heads, B * S, D], split once: slices would each make a gradient as long as the row.
    parts = [part.transpose(0, 1).reshape(1, part.shape[1], -1, part.shape[-1]) for part in (q, k, v)]
    lengths = [length for length in documents.lengths if length]
    split = zip(*(part.split(lengths, dim=2) for part in parts))
    out = torch.cat([_one(a, b, c, window, scale) for a, b, c in split], dim=2)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], q.shape[1], -1)


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float | None) -> torch.Tensor:
    """A single document [1, heads, L, D]."""
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    out = []
    for start in range(0, length, window):  # blocks of queries with the keys that they reach
        end, first = min(start + window, length), max(0, start - window + 1)
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        seen = (distance >= 0) & (distance < window)
        block = (q[:, :, start:end], k[:, :, first:end], v[:, :, first:end])
        out.append(F.scaled_dot_product_attention(*block, attn_mask=seen, scale=scale, enable_gqa=grouped))
    return torch.cat(out, dim=2)


BACKENDS: dict[str, Backend] = {"varlen": _varlen, "loop": _loop, "mask": _masked}

__all__ = ["BACKENDS", "choose", "document_attention"]
