"""Rotary position embedding in Triton: one launch for q and k, one program a token, so cos and sin are read once.

Each head is held as its two channels of every pair, ``a`` and ``b`` [heads, R/2], and its rest [heads, D - R].
The functions are those of ``reference``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.configs import config
from fastplug.ops.launch import check_output, on_device, persistent_programs, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op
from fastplug.ops.rope.reference import check_saved


def _strides_of(*tensors: str) -> list[str]:
    return [f"{tensor}_{dimension}" for tensor in tensors for dimension in "bsh"]


@triton.jit
def _load_pairs(ptr, rows, row_mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """``(a, b)`` [heads, BLOCK] in fp32 of the heads that start at ``ptr + rows`` [heads, 1]."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.load(ptr + rows + cols, mask=row_mask & (cols < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    else:
        cols = tl.arange(0, BLOCK)[None, :]
        mask = row_mask & (cols < HALF)
        a = tl.load(ptr + rows + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(ptr + rows + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(ptr, rows, row_mask, a, b, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.interleave(a, b).to(ptr.dtype.element_ty)
        tl.store(ptr + rows + cols, x, mask=row_mask & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, BLOCK)[None, :]
        mask = row_mask & (cols < HALF)
        tl.store(ptr + rows + cols, a.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + rows + HALF + cols, b.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalize(x, rstd, scale, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    x = x * rstd
    if CAST_FIRST:
        x = x.to(dtype).to(tl.float32)
    return (x * scale).to(dtype).to(tl.float32)


@triton.jit
def _forward_heads(
    x_ptr,  # one token's [HEADS, D]
    out_ptr,  # likewise
    weight_ptr,  # [D] or None
    x_stride,  # between heads
    out_stride,
    cos,  # [1, BLOCK]
    sin,
    eps,
    offset,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    COPY_REST: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    rest_cols = tl.arange(0, BLOCK_REST)[None, :]
    row_zero = tl.zeros((1, 1), tl.int32)
    row_true = row_zero == 0
    for start in range(0, HEADS, BLOCK_H):
        heads = (start + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        head_mask = heads < HEADS
        x_rows, out_rows = heads * x_stride, heads * out_stride
        a, b = _load_pairs(x_ptr, x_rows, head_mask, HALF, BLOCK, INTERLEAVED)
        if COPY_REST:
            rest_mask = head_mask & (rest_cols < REST)
            rest = tl.load(x_ptr + x_rows + 2 * HALF + rest_cols, mask=rest_mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
            if COPY_REST:
                squares += tl.sum(rest * rest, axis=1)
            rstd = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
            wa, wb = _load_pairs(weight_ptr, row_zero, row_true, HALF, BLOCK, INTERLEAVED)
            a = _normalize(a, rstd, offset + wa, x_ptr.dtype.element_ty, CAST_FIRST)
            b = _normalize(b, rstd, offset + wb, x_ptr.dtype.element_ty, CAST_FIRST)
            if COPY_REST:
                w = tl.load(weight_ptr + 2 * HALF + rest_cols, mask=rest_cols < REST, other=0.0).to(tl.float32)
                rest = _normalize(rest, rstd, offset + w, x_ptr.dtype.element_ty, CAST_FIRST)
        _store_pairs(out_ptr, out_rows, head_mask, a * cos - b * sin, b * cos + a * sin, HALF, BLOCK, INTERLEAVED)
        if COPY_REST:
            tl.store(out_ptr + out_rows + 2 * HALF + rest_cols, rest.to(out_ptr.dtype.element_ty), mask=rest_mask)


@triton.jit
def _backward_heads(
    d_ptr,  # one token's [HEADS, D]
    out_ptr,  # likewise
    x_ptr,  # likewise, or None
    weight_ptr,  # [D] or None
    d_stride,  # between heads
    out_stride,
    x_stride,
    cos,  # [1, BLOCK]
    sin,
    eps,
    offset,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    COPY_REST: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Write one token's gradients; returns its share of the weight's gradient as pairs and rest."""
    rest_cols = tl.arange(0, BLOCK_REST)[None, :]
    row_zero = tl.zeros((1, 1), tl.int32)
    row_true = row_zero == 0
    dwa = tl.zeros((1, BLOCK), tl.float32)
    dwb = tl.zeros((1, BLOCK), tl.float32)
    dwr = tl.zeros((1, BLOCK_REST), tl.float32)
    for start in range(0, HEADS, BLOCK_H):
        heads = (start + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        head_mask = heads < HEADS
        d_rows, out_rows = heads * d_stride, heads * out_stride
        da, db = _load_pairs(d_ptr, d_rows, head_mask, HALF, BLOCK, INTERLEAVED)
        ga = da * cos + db * sin
        gb = db * cos - da * sin
        if COPY_REST:
            rest_mask = head_mask & (rest_cols < REST)
            gr = tl.load(d_ptr + d_rows + 2 * HALF + rest_cols, mask=rest_mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            a, b = _load_pairs(x_ptr, heads * x_stride, head_mask, HALF, BLOCK, INTERLEAVED)
            wa, wb = _load_pairs(weight_ptr, row_zero, row_true, HALF, BLOCK, INTERLEAVED)
            squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
            if COPY_REST:
                rest = tl.load(x_ptr + heads * x_stride + 2 * HALF + rest_cols, mask=rest_mask, other=0.0)
                rest = rest.to(tl.float32)
                squares += tl.sum(rest * rest, axis=1)
            rstd = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
            # Heads past the last have a = 0; with eps = 0 their rstd is infinite and 0 * inf would poison the sums.
            rstd = tl.where(head_mask, rstd, 0.0)
            a *= rstd
            b *= rstd
            if WEIGHT_GRAD:
                dwa += tl.sum(ga * a, axis=0)[None, :]
                dwb += tl.sum(gb * b, axis=0)[None, :]
            ga *= offset + wa
            gb *= offset + wb
            dot = tl.sum(ga * a, axis=1) + tl.sum(gb * b, axis=1)
            if COPY_REST:
                w = tl.load(weight_ptr + 2 * HALF + rest_cols, mask=rest_cols < REST, other=0.0).to(tl.float32)
                rest *= rstd
                if WEIGHT_GRAD:
                    dwr += tl.sum(gr * rest, axis=0)[None, :]
                gr *= offset + w
                dot += tl.sum(gr * rest, axis=1)
            mean = (dot / (2 * HALF + REST))[:, None]
            ga = rstd * (ga - a * mean)
            gb = rstd * (gb - b * mean)
            if COPY_REST:
                gr = rstd * (gr - rest * mean)
        _store_pairs(out_ptr, out_rows, head_mask, ga, gb, HALF, BLOCK, INTERLEAVED)
        if COPY_REST:
            tl.store(out_ptr + out_rows + 2 * HALF + rest_cols, gr.to(out_ptr.dtype.element_ty), mask=rest_mask)
    return dwa, dwb, dwr


@triton.jit
def _angles(cos_ptr, sin_ptr, batch, position, batch_stride, position_stride, HALF: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    offsets = batch * batch_stride + position * position_stride + cols
    cos = tl.load(cos_ptr + offsets, mask=cols < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=cols < HALF, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit(do_not_specialize=[*_strides_of("q", "k", "q_out", "k_out"), "cos_b", "cos_s", "S"])
def _forward_kernel(
    q_ptr,  # [B, S, Q_HEADS, D]
    k_ptr,  # [B, S, K_HEADS, D]
    cos_ptr,  # [B or 1, S, R]
    sin_ptr,
    q_out_ptr,  # as q
    k_out_ptr,  # as k
    q_weight_ptr,  # [D] or None
    k_weight_ptr,
    q_b, q_s, q_h,  # strides of batch, position, head, in units of UNIT elements
    k_b, k_s, k_h,
    q_out_b, q_out_s, q_out_h,
    k_out_b, k_out_s, k_out_h,
    cos_b, cos_s,
    S,
    eps,
    offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    Q_COPY_REST: tl.constexpr,
    K_COPY_REST: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    cos, sin = _angles(cos_ptr, sin_ptr, b, s, cos_b * UNIT, cos_s * UNIT, HALF, BLOCK)
    _forward_heads(
        q_ptr + (b * q_b + s * q_s) * UNIT, q_out_ptr + (b * q_out_b + s * q_out_s) * UNIT, q_weight_ptr,
        q_h * UNIT, q_out_h * UNIT, cos, sin, eps, offset,
        Q_HEADS, HALF, REST, Q_COPY_REST, CAST_FIRST, INTERLEAVED, BLOCK_Q, BLOCK, BLOCK_REST,
    )  # fmt: skip
    _forward_heads(
        k_ptr + (b * k_b + s * k_s) * UNIT, k_out_ptr + (b * k_out_b + s * k_out_s) * UNIT, k_weight_ptr,
        k_h * UNIT, k_out_h * UNIT, cos, sin, eps, offset,
        K_HEADS, HALF, REST, K_COPY_REST, CAST_FIRST, INTERLEAVED, BLOCK_K, BLOCK, BLOCK_REST,
    )  # fmt: skip


@triton.jit
def _store_partial(ptr, dwa, dwb, dwr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    row_zero = tl.zeros((1, 1), tl.int32)
    _store_pairs(ptr, row_zero, row_zero == 0, dwa, dwb, HALF, BLOCK, INTERLEAVED)
    rest_cols = tl.arange(0, BLOCK_REST)[None, :]
    tl.store(ptr + 2 * HALF + rest_cols, dwr, mask=rest_cols < REST)


@triton.jit(do_not_specialize=[*_strides_of("dq", "dk", "dq_out", "dk_out", "q", "k"), "cos_b", "cos_s", "tokens", "S"])
def _backward_kernel(
    dq_ptr,  # [B, S, Q_HEADS, D]
    dk_ptr,  # [B, S, K_HEADS, D]
    cos_ptr,  # [B or 1, S, R]
    sin_ptr,
    dq_out_ptr,  # as dq
    dk_out_ptr,  # as dk
    q_ptr,  # as dq, or None
    k_ptr,
    q_weight_ptr,  # [D] or None
    k_weight_ptr,
    partial_ptr,  # [programs, 2, D] fp32 or None: each program's share of the weights' gradients
    dq_b, dq_s, dq_h,  # strides of batch, position, head, in units of UNIT elements
    dk_b, dk_s, dk_h,
    dq_out_b, dq_out_s, dq_out_h,
    dk_out_b, dk_out_s, dk_out_h,
    q_b, q_s, q_h,
    k_b, k_s, k_h,
    cos_b, cos_s,
    tokens,
    S,
    eps,
    offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    Q_COPY_REST: tl.constexpr,
    K_COPY_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    q_dwa = tl.zeros((1, BLOCK), tl.float32)
    q_dwb = tl.zeros((1, BLOCK), tl.float32)
    q_dwr = tl.zeros((1, BLOCK_REST), tl.float32)
    k_dwa = tl.zeros((1, BLOCK), tl.float32)
    k_dwb = tl.zeros((1, BLOCK), tl.float32)
    k_dwr = tl.zeros((1, BLOCK_REST), tl.float32)
    token = program  # a while loop: Triton 3.6 cannot interpret a range over tensors with numpy 2.4
    while token < tokens:
        b, s = token // S, token % S
        cos, sin = _angles(cos_ptr, sin_ptr, b, s, cos_b * UNIT, cos_s * UNIT, HALF, BLOCK)
        dwa, dwb, dwr = _backward_heads(
            dq_ptr + (b * dq_b + s * dq_s) * UNIT, dq_out_ptr + (b * dq_out_b + s * dq_out_s) * UNIT,
            None if q_ptr is None else q_ptr + (b * q_b + s * q_s) * UNIT, q_weight_ptr,
            dq_h * UNIT, dq_out_h * UNIT, q_h * UNIT, cos, sin, eps, offset,
            Q_HEADS, HALF, REST, Q_COPY_REST, partial_ptr is not None, INTERLEAVED, BLOCK_Q, BLOCK, BLOCK_REST,
        )  # fmt: skip
        q_dwa += dwa
        q_dwb += dwb
        q_dwr += dwr
        dwa, dwb, dwr = _backward_heads(
            dk_ptr + (b * dk_b + s * dk_s) * UNIT, dk_out_ptr + (b * dk_out_b + s * dk_out_s) * UNIT,
            None if k_ptr is None else k_ptr + (b * k_b + s * k_s) * UNIT, k_weight_ptr,
            dk_h * UNIT, dk_out_h * UNIT, k_h * UNIT, cos, sin, eps, offset,
            K_HEADS, HALF, REST, K_COPY_REST, partial_ptr is not None, INTERLEAVED, BLOCK_K, BLOCK, BLOCK_REST,
        )  # fmt: skip
        k_dwa += dwa
        k_dwb += dwb
        k_dwr += dwr
        token += tl.num_programs(0)
    if partial_ptr is not None:
        D: tl.constexpr = 2 * HALF + REST
        partial_ptr += program * 2 * D
        _store_partial(partial_ptr, q_dwa, q_dwb, q_dwr, HALF, REST, BLOCK, BLOCK_REST, INTERLEAVED)
        _store_partial(partial_ptr + D, k_dwa, k_dwb, k_dwr, HALF, REST, BLOCK, BLOCK_REST, INTERLEAVED)


def tile(heads: int, half: int) -> int:
    """Heads of one tile of [heads, half] pairs: all of them, up to 2048 pairs."""
    return min(power_of_2(heads), max(1, 2048 // power_of_2(half)))


def _shape(q: torch.Tensor, k: torch.Tensor, rotary: int, heavy: bool = False) -> dict[str, int]:
    pairs_per_warp = config(q.device).per_warp(q.element_size()) // (2 if heavy else 1)
    half, rest = rotary // 2, q.shape[-1] - rotary // 2 * 2
    block, block_rest = power_of_2(half), power_of_2(rest)
    block_q, block_k = tile(q.shape[2], half), tile(k.shape[2], half)
    warps = min(8, power_of_2(max(block_q, block_k) * (block + block_rest // 2) // pairs_per_warp))
    # A tile with fewer elements than threads is computed by several warps at once, and in place one of them could
    # read what another has already written: masked heads fill the tile instead.
    fill = max(1, 32 * warps // (min(block, block_rest) if rest else block))
    return {
        "Q_HEADS": q.shape[2], "K_HEADS": k.shape[2], "HALF": half, "REST": rest, "BLOCK_Q": max(block_q, fill),
        "BLOCK_K": max(block_k, fill), "BLOCK": block, "BLOCK_REST": block_rest, "num_warps": warps,
    }  # fmt: skip


def _strides(tensors: list[torch.Tensor | None], cos: torch.Tensor) -> tuple[list[int], int]:
    strides = [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]
    strides += [0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)]
    unit = stride_unit(*strides)
    return [stride // unit for stride in strides], unit


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype


@custom_op("q_out", "k_out")
def rope_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    interleaved: bool,
) -> None:
    """Write the rotated q and k [B, S, heads, D]. Last dimensions are contiguous; cos and sin have equal strides."""
    B, S = q.shape[:2]
    if B * S == 0:
        return
    shape = _shape(q, k, cos.shape[-1])
    strides, unit = _strides([q, k, q_out, k_out], cos)
    rest = shape["REST"] > 0
    with on_device(q):
        _forward_kernel[(B * S,)](
            q, k, cos, sin, q_out, k_out, q_weight, k_weight, *strides, S, eps, offset,
            Q_COPY_REST=rest and not (q_weight is None and _same(q, q_out)),
            K_COPY_REST=rest and not (k_weight is None and _same(k, k_out)),
            CAST_FIRST=cast_first, INTERLEAVED=interleaved, UNIT=unit, enable_fp_fusion=True, **shape,
        )  # fmt: skip


@custom_op("dq_out", "dk_out", "partial")
def rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    partial: torch.Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> None:
    """Write the gradients of q and k and, where given, ``partial`` [programs, 2, D] fp32, the weights' shares."""
    B, S = dq.shape[:2]
    if B * S == 0:
        return
    normed = q_weight is not None or k_weight is not None
    shape = _shape(dq, dk, cos.shape[-1], heavy=normed)  # the norm keeps twice as much in registers
    strides, unit = _strides([dq, dk, dq_out, dk_out, q, k], cos)
    rest = shape["REST"] > 0
    with on_device(dq):
        _backward_kernel[(B * S if partial is None else partial.shape[0],)](
            dq, dk, cos, sin, dq_out, dk_out, q, k, q_weight, k_weight, partial, *strides, B * S, S, eps, offset,
            Q_COPY_REST=rest and not (q_weight is None and _same(dq, dq_out)),
            K_COPY_REST=rest and not (k_weight is None and _same(dk, dk_out)),
            INTERLEAVED=interleaved, UNIT=unit, enable_fp_fusion=True, **shape,
        )  # fmt: skip


def _angles_for(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = unit_stride(cos), unit_stride(sin)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    *,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cast_first: bool = True,
) -> None:
    """See :func:`fastplug.ops.rope.reference.forward`."""
    check_output("q_out", q_out, q.shape)
    check_output("k_out", k_out, k.shape)
    cos, sin = _angles_for(cos, sin)
    rope_forward(
        unit_stride(q), unit_stride(k), cos, sin, q_out, k_out, q_weight, k_weight, eps, offset, cast_first, interleaved
    )


def backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    *,
    interleaved: bool = False,
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cast_first: bool = True,
    weight_grad: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """See :func:`fastplug.ops.rope.reference.backward`. Weight gradients are deterministic partial sums."""
    check_saved(q, k, q_weight, k_weight)
    check_output("dq_out", dq_out, dq.shape)
    check_output("dk_out", dk_out, dk.shape)
    cos, sin = _angles_for(cos, sin)
    q = unit_stride(q) if q is not None and q_weight is not None else None
    k = unit_stride(k) if k is not None and k_weight is not None else None
    partial = None
    if weight_grad and (q_weight is not None or k_weight is not None):
        programs = persistent_programs(dq.device, dq.shape[0] * dq.shape[1])
        allocate = torch.zeros if dq.numel() == 0 else torch.empty
        partial = allocate((programs, 2, dq.shape[-1]), dtype=torch.float32, device=dq.device)
    rope_backward(
        unit_stride(dq), unit_stride(dk), cos, sin, dq_out, dk_out, q, k, q_weight, k_weight, partial,
        eps, offset, interleaved,
    )  # fmt: skip
    if partial is None:
        return None, None
    total = partial.sum(0)
    dq_weight = None if q_weight is None else total[0].to(q_weight.dtype)
    dk_weight = None if k_weight is None else total[1].to(k_weight.dtype)
    return dq_weight, dk_weight
