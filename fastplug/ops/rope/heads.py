"""What one program of the rotary kernels does with the heads of a token: load, normalize, turn, store; and back.

Each head is held as its two channels of every pair, ``a`` and ``b`` [heads, R/2], and its rest [heads, D - R].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pairs(ptr, rows, row_mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
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
def store_pairs(ptr, rows, row_mask, a, b, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
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
def normalize(x, rstd, scale, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    x = x * rstd
    if CAST_FIRST:
        x = x.to(dtype).to(tl.float32)
    return (x * scale).to(dtype).to(tl.float32)


@triton.jit
def forward_heads(
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
        a, b = load_pairs(x_ptr, x_rows, head_mask, HALF, BLOCK, INTERLEAVED)
        if COPY_REST:
            rest_mask = head_mask & (rest_cols < REST)
            rest = tl.load(x_ptr + x_rows + 2 * HALF + rest_cols, mask=rest_mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
            if COPY_REST:
                squares += tl.sum(rest * rest, axis=1)
            rstd = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
            wa, wb = load_pairs(weight_ptr, row_zero, row_true, HALF, BLOCK, INTERLEAVED)
            a = normalize(a, rstd, offset + wa, x_ptr.dtype.element_ty, CAST_FIRST)
            b = normalize(b, rstd, offset + wb, x_ptr.dtype.element_ty, CAST_FIRST)
            if COPY_REST:
                w = tl.load(weight_ptr + 2 * HALF + rest_cols, mask=rest_cols < REST, other=0.0).to(tl.float32)
                rest = normalize(rest, rstd, offset + w, x_ptr.dtype.element_ty, CAST_FIRST)
        store_pairs(out_ptr, out_rows, head_mask, a * cos - b * sin, b * cos + a * sin, HALF, BLOCK, INTERLEAVED)
        if COPY_REST:
            tl.store(out_ptr + out_rows + 2 * HALF + rest_cols, rest.to(out_ptr.dtype.element_ty), mask=rest_mask)


@triton.jit
def backward_heads(
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
        da, db = load_pairs(d_ptr, d_rows, head_mask, HALF, BLOCK, INTERLEAVED)
        ga = da * cos + db * sin
        gb = db * cos - da * sin
        if COPY_REST:
            rest_mask = head_mask & (rest_cols < REST)
            gr = tl.load(d_ptr + d_rows + 2 * HALF + rest_cols, mask=rest_mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            a, b = load_pairs(x_ptr, heads * x_stride, head_mask, HALF, BLOCK, INTERLEAVED)
            wa, wb = load_pairs(weight_ptr, row_zero, row_true, HALF, BLOCK, INTERLEAVED)
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
        store_pairs(out_ptr, out_rows, head_mask, ga, gb, HALF, BLOCK, INTERLEAVED)
        if COPY_REST:
            tl.store(out_ptr + out_rows + 2 * HALF + rest_cols, gr.to(out_ptr.dtype.element_ty), mask=rest_mask)
    return dwa, dwb, dwr


@triton.jit
def angles(cos_ptr, sin_ptr, batch, position, batch_stride, position_stride, HALF: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    offsets = batch * batch_stride + position * position_stride + cols
    cos = tl.load(cos_ptr + offsets, mask=cols < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=cols < HALF, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def store_partial(ptr, dwa, dwb, dwr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    row_zero = tl.zeros((1, 1), tl.int32)
    store_pairs(ptr, row_zero, row_zero == 0, dwa, dwb, HALF, BLOCK, INTERLEAVED)
    rest_cols = tl.arange(0, BLOCK_REST)[None, :]
    tl.store(ptr + 2 * HALF + rest_cols, dwr, mask=rest_cols < REST)
