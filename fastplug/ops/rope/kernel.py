"""Rotary position embedding in Triton: one launch for q and k, one program a token, so cos and sin are read once.

What a program does with the heads of its token is in ``heads``. The functions are those of ``reference``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.launch import check_output, on_device, persistent_programs, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op
from fastplug.ops.rope.heads import angles, backward_heads, forward_heads, store_partial
from fastplug.ops.rope.reference import check_saved


def _strides_of(*tensors: str) -> list[str]:
    return [f"{tensor}_{dimension}" for tensor in tensors for dimension in "bsh"]


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
    cos, sin = angles(cos_ptr, sin_ptr, b, s, cos_b * UNIT, cos_s * UNIT, HALF, BLOCK)
    forward_heads(
        q_ptr + (b * q_b + s * q_s) * UNIT, q_out_ptr + (b * q_out_b + s * q_out_s) * UNIT, q_weight_ptr,
        q_h * UNIT, q_out_h * UNIT, cos, sin, eps, offset,
        Q_HEADS, HALF, REST, Q_COPY_REST, CAST_FIRST, INTERLEAVED, BLOCK_Q, BLOCK, BLOCK_REST,
    )  # fmt: skip
    forward_heads(
        k_ptr + (b * k_b + s * k_s) * UNIT, k_out_ptr + (b * k_out_b + s * k_out_s) * UNIT, k_weight_ptr,
        k_h * UNIT, k_out_h * UNIT, cos, sin, eps, offset,
        K_HEADS, HALF, REST, K_COPY_REST, CAST_FIRST, INTERLEAVED, BLOCK_K, BLOCK, BLOCK_REST,
    )  # fmt: skip


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
        cos, sin = angles(cos_ptr, sin_ptr, b, s, cos_b * UNIT, cos_s * UNIT, HALF, BLOCK)
        dwa, dwb, dwr = backward_heads(
            dq_ptr + (b * dq_b + s * dq_s) * UNIT, dq_out_ptr + (b * dq_out_b + s * dq_out_s) * UNIT,
            None if q_ptr is None else q_ptr + (b * q_b + s * q_s) * UNIT, q_weight_ptr,
            dq_h * UNIT, dq_out_h * UNIT, q_h * UNIT, cos, sin, eps, offset,
            Q_HEADS, HALF, REST, Q_COPY_REST, partial_ptr is not None, INTERLEAVED, BLOCK_Q, BLOCK, BLOCK_REST,
        )  # fmt: skip
        q_dwa += dwa
        q_dwb += dwb
        q_dwr += dwr
        dwa, dwb, dwr = backward_heads(
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
        store_partial(partial_ptr, q_dwa, q_dwb, q_dwr, HALF, REST, BLOCK, BLOCK_REST, INTERLEAVED)
        store_partial(partial_ptr + D, k_dwa, k_dwb, k_dwr, HALF, REST, BLOCK, BLOCK_REST, INTERLEAVED)


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
        launched(_forward_kernel, (B * S,))(
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
        launched(_backward_kernel, (B * S if partial is None else partial.shape[0],))(
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
