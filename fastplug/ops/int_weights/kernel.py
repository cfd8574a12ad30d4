"""Integer weights in Triton, in one launch, or in two where columns are in act-order.

The functions are those of ``reference``; the kernels are in ``tiles``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.int_weights import reference
from fastplug.ops.int_weights.reference import Layout, check
from fastplug.ops.int_weights.tiles import along_k, along_n, in_act_order, in_parts, table
from fastplug.ops.launch import check_output, on_device, power_of_2, stride_unit
from fastplug.ops.library import custom_op

SIGNS = {"unsigned": 0, "twos": 1, "offset": 2}
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@custom_op("out")
def int_decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    out: torch.Tensor,
    N: int,
    bits: int,
    packing: str,
    group: int,
    sign: str,
    packed_zeros: bool,
    zero_plus_one: bool,
    add_zero: bool,
    factor: float,
    row_start: int,
) -> None:
    """The launcher behind :func:`decode`; the arguments after ``out`` are those of ``Layout``."""
    rows, K = out.shape
    if out.numel() == 0:
        return
    scale_n = 0 if len(scales) == 1 else scales.stride(0)
    scale_g = 0 if scales.shape[1] == 1 else scales.stride(1)
    zero_n, zero_g = (0, 0) if zeros is None else zeros.stride()
    if zeros is not None and not packed_zeros:
        zero_n, zero_g = (0 if len(scales) == 1 else zero_n), (0 if scales.shape[1] == 1 else zero_g)
    stride = out.stride(0) if rows > 1 else K
    unit = stride_unit(stride)
    wrap = len(scales) not in (1, N)
    if scales.shape[1] == 1 and g_idx is None:
        group = power_of_2(K)  # one group, whatever the width: every tile lies within it
    columns = min(128, group & -group) if group % 16 == 0 else 128
    tile = config(out.device).decoded
    numbers = (scale_n, scale_g, zero_n, zero_g, stride // unit, row_start, rows, K)
    flags = (bits, SIGNS[sign], packed_zeros, zero_plus_one, add_zero, factor != 1.0, wrap, group)
    with on_device(out):
        if packing in ("row", "input"):
            codes, code_n, code_w, width, E = _words(codes, packing, bits, N, K)
            words = max(min(columns, power_of_2(K)) // E, 1)
            if g_idx is not None and E * bits == width and _fits_table(N, scales, zeros, add_zero, factor):
                form = (bits, SIGNS[sign], E, packed_zeros, zero_plus_one)
                _in_act_order(
                    (codes, code_n, code_w), (scales, zeros, *numbers[:4]), g_idx, out, stride, row_start, form
                )
                return
            tile = tile if g_idx is None else tile // 2  # a scale of its own for each code takes registers
            BN = min(tile // (words * E), power_of_2(rows))
            grid = (triton.cdiv(rows, BN), triton.cdiv(K, words * E))
            launched(along_k, grid)(
                codes, scales, zeros, g_idx, out, code_n, code_w, *numbers, -(-K // E), len(scales), factor, *flags,
                width, E, unit, BN, words, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        elif packing == "output":
            E, M, BK = 32 // bits, N * bits // 32, min(columns, power_of_2(K), 64)  # eight words of a row: a sector
            touched = (row_start + rows - 1) // E - row_start // E + 1
            BM = max(min(tile // (E * BK), power_of_2(touched)), 1)
            launched(along_n, (triton.cdiv(touched, BM), triton.cdiv(K, BK)))(
                codes, scales, zeros, out, *numbers, M, len(scales), factor, *flags, E, unit, BM, BK,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            M, parts = codes.numel(), 8 * codes.element_size() // bits
            E, BK = power_of_2(parts), min(columns, K & -K, M & -M, 64)
            BM = max(min(tile // (E * BK), power_of_2(M // BK)), 1)
            launched(in_parts, (triton.cdiv(M, BM * BK),))(
                codes, scales, zeros, out, *numbers, M, len(scales), factor, *flags, parts, E, unit, BM, BK,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _in_act_order(
    codes: tuple[torch.Tensor, int, int],
    groups: tuple[torch.Tensor, torch.Tensor | None, int, int, int, int],
    g_idx: torch.Tensor,
    out: torch.Tensor,
    stride: int,
    row_start: int,
    form: tuple[int, int, int, bool, bool],
) -> None:
    """Two launches: a table of what groups share, and the weight, whose columns find their group there.

    Args:
        codes: The words, with the strides of rows and of words.
        groups: Scales and zero points, with their strides.
        g_idx: The group of each column.
        out: See :func:`decode`.
        stride: Of its rows.
        row_start: The first row to decode.
        form: Bits and sign of a code, codes of a word, ``packed_zeros`` and ``zero_plus_one``.
    """
    (rows, K), (bits, sign, E, *zeros) = out.shape, form
    scales, G = groups[0], groups[0].shape[1]
    entries = torch.empty(G, rows, dtype=torch.int32, device=out.device)
    launched(table, (triton.cdiv(rows, 256), G))(
        *groups[:2], entries, *groups[2:], row_start, rows, bits, *zeros, 256, num_warps=4
    )
    words, code_n, code_w = codes
    unit, BW = stride_unit(stride), max(min(64, power_of_2(K)) // E, 1)
    BN = min(2 * config(out.device).decoded // (BW * E), power_of_2(rows))
    launched(in_act_order, (triton.cdiv(rows, BN), triton.cdiv(K, BW * E)))(
        words.flatten()[row_start * code_n :], entries, g_idx, out, code_n, code_w, stride // unit, rows, K,
        -(-K // E), bits, sign, DTYPES[scales.dtype], E, unit, BN, BW, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _fits_table(N: int, scales: torch.Tensor, zeros: torch.Tensor | None, add_zero: bool, factor: float) -> bool:
    """Whether a group's scale and zero point fit into a word, and the weight is ``(q - z) * s``."""
    whole = zeros is None or not zeros.is_floating_point()
    return scales.dtype in DTYPES and len(scales) == N and whole and not add_zero and factor == 1.0


def _words(codes: torch.Tensor, packing: str, bits: int, N: int, K: int) -> tuple[torch.Tensor, int, int, int, int]:
    """The codes as words, the strides of rows and of words, the bits of a word, and into how many codes to cut it."""
    if packing == "input":
        whole = (32 % bits == 0 or bits == 3) and K * bits % 32 == 0
        return codes, 1, N, 32, (32 if bits == 3 else 32 // bits) if whole else 1
    codes = codes.view(torch.uint8)
    width = codes.numel() // N
    if bits in (2, 4) and K * bits % 32 == 0 and codes.storage_offset() % 4 == 0:
        return codes.view(torch.int32), width // 4, 1, 32, 32 // bits
    return codes, width, 1, 8, 1


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    *,
    zeros: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    row_start: int = 0,
) -> None:
    """See :func:`fastplug.ops.int_weights.reference.decode`. Nothing is read back to the host."""
    check(codes, scales, layout, out, zeros, g_idx, row_start)
    check_output("out", out, out.shape)
    if layout.packing == "split" and codes.numel() * (8 * codes.element_size() // layout.bits) >= 1 << 31:
        reference.decode(codes, scales, layout, out, zeros=zeros, g_idx=g_idx, row_start=row_start)
        return
    arguments: list[Any] = [layout.shape[0], *layout[1:], row_start]
    int_decode(codes.contiguous(), scales, zeros, g_idx, out, *arguments)
