"""Adapters' shares and RoPE of q, k and v in one pass, in Triton. The functions are those of ``reference``.

A program has some tokens and some heads of q, of k or of v. A share is a product over the adapter's rank whose
accumulator begins as the tile that it is added to; each half of a head is one, so that turning needs no shuffling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.adapted_rope.reference import Adapted, Heads
from fastplug.ops.ahead import launched
from fastplug.ops.launch import on_device, power_of_2

ROWS, HEADS = 32, 4  # tokens and heads of a program
WARPS = 4
LARGEST_RANK = 64
WIDTHS = (64, 128)  # of heads
FEWEST = 4096  # tokens: with fewer it was not measured
OLDEST = (8, 0)  # compute capability: tensor cores that take both 16-bit dtypes


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(
    qkv,  # [T, (Q_HEADS + 2 K_HEADS) · 2 HALF], in place
    xa,  # [T, RANK]
    b,  # [channels, RANK]
    cos_ptr,  # [B or 1, S, 2 HALF]
    sin_ptr,
    cos_b,  # strides of batch and position
    cos_s,
    T,
    S,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    END_Q: tl.constexpr,  # where the columns of q's adapter end, and of k's
    END_K: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,  # as wide as the widest adapter, at least 16
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    CHANNELS: tl.constexpr = (Q_HEADS + 2 * K_HEADS) * 2 * HALF
    OF_Q: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS  # programs that share some tokens
    OF_K: tl.constexpr = (K_HEADS + HEADS - 1) // HEADS
    ALL: tl.constexpr = OF_Q + 2 * OF_K
    group = tl.program_id(0) % ALL
    is_k = (group >= OF_Q) & (group < OF_Q + OF_K)
    is_v = group >= OF_Q + OF_K
    first = tl.where(is_v, Q_HEADS + K_HEADS, tl.where(is_k, Q_HEADS, 0))  # head of q, k or v
    last = tl.where(is_v, Q_HEADS + 2 * K_HEADS, tl.where(is_k, Q_HEADS + K_HEADS, Q_HEADS))
    start = first + (group - tl.where(is_v, OF_Q + OF_K, tl.where(is_k, OF_Q, 0))) * HEADS
    column = tl.where(is_v, END_K, tl.where(is_k, END_Q, 0)) + tl.arange(0, R)[None, :]
    columns = tl.where(is_v, RANK, tl.where(is_k, END_K, END_Q))

    token = (tl.program_id(0) // ALL).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, HALF)[None, :]
    angle = token // S * cos_b + token % S * cos_s + place
    turned = token < tl.where(is_v, 0, T)  # v stays as it is
    cos = tl.load(cos_ptr + angle, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=turned, other=0.0).to(tl.float32)
    x = tl.load(xa + token * RANK + column, mask=(token < T) & (column < columns), other=0.0)
    low = qkv + token * CHANNELS + start * (2 * HALF) + place
    u = tl.load(low, mask=token < tl.where(start < last, T, 0), other=0.0)
    w = tl.load(low + HALF, mask=token < tl.where(start < last, T, 0), other=0.0)
    for i in range(HEADS):
        head = start + i
        channel = head * (2 * HALF) + tl.arange(0, HALF)[:, None]
        inside = token < tl.where(head < last, T, 0)
        ahead = token < tl.where((i + 1 < HEADS) & (head + 1 < last), T, 0)
        low = qkv + token * CHANNELS + head * (2 * HALF) + place
        next_u = tl.load(low + 2 * HALF, mask=ahead, other=0.0)  # on its way while this head is computed
        next_w = tl.load(low + 3 * HALF, mask=ahead, other=0.0)
        mine = (column < tl.where(head < last, columns, 0)) & (channel >= 0)
        weight = b + channel * RANK + column
        b_low = tl.load(weight, mask=mine, other=0.0)
        b_high = tl.load(weight + HALF * RANK, mask=mine, other=0.0)
        first_half = tl.dot(x, tl.trans(b_low), u.to(tl.float32), input_precision="ieee")
        second_half = tl.dot(x, tl.trans(b_high), w.to(tl.float32), input_precision="ieee")
        tl.store(low, (first_half * cos - second_half * sin).to(qkv.dtype.element_ty), mask=inside)
        tl.store(low + HALF, (second_half * cos + first_half * sin).to(qkv.dtype.element_ty), mask=inside)
        u, w = next_u, next_w


def suits(tokens: int, adapted: Adapted, heads: Heads, cos: torch.Tensor) -> bool:
    """See :func:`fastplug.ops.adapted_rope.reference.suits`."""
    xa, b, (end_q, end_k, rank) = adapted
    if torch.compiler.is_compiling() or tokens < FEWEST or heads.width not in WIDTHS or cos.shape[-1] != heads.width:
        return False
    if xa.dtype not in (torch.bfloat16, torch.float16) or xa.dtype != b.dtype:
        return False
    if max(end_q, end_k - end_q, rank - end_k) > LARGEST_RANK or not (xa.is_contiguous() and b.is_contiguous()):
        return False
    return _here(xa.device)


def _here(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


def forward(qkv: torch.Tensor, adapted: Adapted, heads: Heads, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """See :func:`fastplug.ops.adapted_rope.reference.forward`."""
    xa, b, (end_q, end_k, rank) = adapted
    if not (cos.stride() == sin.stride() and cos.stride(2) == 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    groups = triton.cdiv(heads.queries, HEADS) + 2 * triton.cdiv(heads.keys, HEADS)
    batch_stride = 0 if cos.shape[0] == 1 else cos.stride(0)
    with on_device(qkv):
        launched(_forward_kernel, (triton.cdiv(len(qkv), ROWS) * groups,))(
            qkv, xa, b, cos, sin, batch_stride, cos.stride(1), len(qkv), cos.shape[1], Q_HEADS=heads.queries,
            K_HEADS=heads.keys, HALF=heads.width // 2, END_Q=end_q, END_K=end_k, RANK=rank,
            R=max(16, power_of_2(max(end_q, end_k - end_q, rank - end_k))), ROWS=ROWS, HEADS=HEADS, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
