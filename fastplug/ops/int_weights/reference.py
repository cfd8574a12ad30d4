"""Decoding of integer weights in plain PyTorch.

One arithmetic covers all of these formats. A code q of 1 to 8 bits, a scale s and, where the format has one, a zero
point z give the weight ``(q - z) * s``, and every operation is rounded to the dtype of the scales, as the libraries
compute it. The formats differ in where a code lies (:attr:`Layout.packing`), in which elements share a scale, and in
how a zero point is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PACKINGS = ("row", "input", "output", "split")
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # which four bits of a word hold its first, second ... column


class Layout(NamedTuple):
    """How a weight is stored; plain values only.

    Attributes:
        shape: (N, K) = (out_features, in_features).
        bits: Bits of a code, 1 to 8.
        packing: Where the code of element (n, k) lies. The bits of a word are numbered from the lowest.

            * ``row``: [N, ...] words of any width: row n is a stream of bits, code k begins at bit ``k * bits``
              (compressed-tensors, torchao, and plain int8).
            * ``input``: int32 [..., N]: column n is such a stream over k (GPTQ).
            * ``output``: int32 [K, N * bits / 32], 4 bits: row k is such a stream over n, with the columns of a word in
              the order of :data:`AWQ_PLACES` (AWQ).
            * ``split``: the N * K codes in a row are cut into as many equal parts as codes fit into a word, and word i
              holds code i of every part, that of the first in the highest bits (HQQ).
        group: Columns that share a scale; K where a row has one.
        sign: What a code means: ``unsigned``; ``twos`` complement; ``offset``: less ``2 ** (bits - 1)``.
        packed_zeros: Whether zero points are packed like the codes, int32 [N * bits / 32, groups], each a stream over n
            (in AWQ's order with packing ``output``).
        zero_plus_one: Whether the true zero point is the stored one plus one, modulo ``2 ** bits`` (GPTQ's first
            format).
        add_zero: Whether the weight is ``q * s + z`` instead (tinygemm).
        factor: What the result is multiplied by in the end (LLM.int8() keeps ``absmax`` for a scale: 1 / 127).
    """

    shape: tuple[int, int]
    bits: int
    packing: str = "row"
    group: int = 0
    sign: str = "unsigned"
    packed_zeros: bool = False
    zero_plus_one: bool = False
    add_zero: bool = False
    factor: float = 1.0


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
    """Decode rows ``row_start`` to ``row_start + len(out)`` of a weight [N, K] into ``out``.

    Args:
        codes: The packed codes, see :class:`Layout`.
        scales: [P, G] fp32, fp16 or bf16, any strides: row n uses row ``n % P``, column k column ``k // group``.
        layout: How the weight is stored.
        out: [rows, K] fp32, fp16 or bf16; the row stride may exceed K.
        zeros: [P, G] of any dtype, or packed; None for zero.
        g_idx: int32 [K], the column of ``scales`` that column k uses instead of ``k // group`` (GPTQ's act-order).
        row_start: First row to decode.

    Raises:
        ValueError: The tensors cannot hold these rows.
    """
    check(codes, scales, layout, out, zeros, g_idx, row_start)
    if not len(out):
        return
    rows = slice(row_start, row_start + len(out))
    code = codes_of(codes, layout, rows)
    half = 1 << (layout.bits - 1)
    if layout.sign != "unsigned":
        code = code.short()
        code = code - half if layout.sign == "offset" else (code ^ half) - half
    scale = _spread(_rows_of(scales, layout, rows), layout, g_idx)
    value = code.to(scales.dtype)
    zero = None if zeros is None else _spread(zeros_of(zeros, layout, rows), layout, g_idx)
    if layout.add_zero:
        value = value * scale if zero is None else value * scale + zero
    else:
        value = (value if zero is None else value - zero.to(scales.dtype)) * scale
    out.copy_(value if layout.factor == 1.0 else value * layout.factor)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of each stream in the last dimension of ``words`` (any integers), as uint8."""
    data = words.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    if bits == 8:
        return data[..., :count]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        return (data[..., None] >> shifts).bitwise_and_(mask).flatten(-2)[..., :count]
    chunks = -(-data.shape[-1] // bits)  # eight codes lie in as many bytes as a code has bits
    data = torch.nn.functional.pad(data, (0, chunks * bits - data.shape[-1])).unflatten(-1, (chunks, bits)).short()
    begin = torch.arange(0, 8 * bits, bits, device=data.device)
    low, shift = begin // 8, (begin % 8).short()
    high = (low + 1).clamp(max=bits - 1)
    codes = ((data[..., low] >> shift) | (data[..., high] << (8 - shift))).bitwise_and_(mask)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def codes_of(codes: torch.Tensor, layout: Layout, rows: slice) -> torch.Tensor:
    """The codes of a range of rows, uint8 [rows, K], as they are stored (no sign)."""
    (N, K), bits = layout.shape, layout.bits
    if layout.packing == "row":
        return unpack(codes.view(N, -1)[rows], bits, K)
    if layout.packing == "input":
        return unpack(codes[:, rows].t(), bits, K)
    if layout.packing == "output":
        return _in_order(unpack(codes, bits, N))[:, rows].t()
    width = 8 * codes.element_size()
    parts, flat = width // bits, codes.reshape(-1)
    mask = (1 << bits) - 1
    split = [((flat >> (parts - 1 - part) * bits) & mask).to(torch.uint8) for part in range(parts)]
    return torch.cat(split)[: N * K].view(N, K)[rows]


def zeros_of(zeros: torch.Tensor, layout: Layout, rows: slice) -> torch.Tensor:
    """The zero points of a range of rows [rows, G]."""
    if layout.packed_zeros:
        zeros = unpack(zeros.t(), layout.bits, layout.shape[0])
        zeros = (_in_order(zeros) if layout.packing == "output" else zeros).t()
        if layout.zero_plus_one:
            zeros = (zeros + 1) & ((1 << layout.bits) - 1)
    return _rows_of(zeros, layout, rows)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    """AWQ's codes [..., N] in the order of the columns."""
    return codes.unflatten(-1, (-1, 8))[..., AWQ_PLACES].flatten(-2)


def _rows_of(table: torch.Tensor, layout: Layout, rows: slice) -> torch.Tensor:
    if len(table) == 1:
        return table
    if len(table) == layout.shape[0]:
        return table[rows]
    return table[torch.arange(rows.start, rows.stop, device=table.device) % len(table)]


def _spread(table: torch.Tensor, layout: Layout, g_idx: torch.Tensor | None) -> torch.Tensor:
    """One value per column [rows, K], or [rows, 1]."""
    if g_idx is not None:
        return table.index_select(1, g_idx.int())
    if table.shape[1] == 1 or layout.group == 1:
        return table
    return table.repeat_interleave(layout.group, 1)[:, : layout.shape[1]]


def check(
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    row_start: int,
) -> None:
    """Raise ``ValueError`` where the tensors cannot hold the rows that are asked for. Looks at shapes only."""
    N, K = layout.shape
    if out.dim() != 2 or out.shape[1] != K or row_start < 0 or row_start + len(out) > N:
        raise ValueError(f"rows {row_start}.. into {tuple(out.shape)} do not lie in a weight of {N} x {K}")
    reason = mismatch(codes, scales, layout, zeros, g_idx)
    if reason is not None:
        raise ValueError(reason)


def mismatch(
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Layout,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
) -> str | None:
    """Why these tensors are not a weight of this layout, or None. Looks at shapes and dtypes only."""
    (N, K), bits, group = layout.shape, layout.bits, layout.group
    if not 1 <= bits <= 8 or layout.packing not in PACKINGS:
        return f"there are no codes of {bits} bits in packing {layout.packing!r}"
    if group < 1:
        return f"a group of {group} columns cannot share a scale"
    have = codes.numel() * codes.element_size()
    need = _bytes(layout, codes.element_size())
    if have < need or (have > need and bits != 3):  # HQQ fills the last words of 3-bit codes up
        return f"{N} x {K} codes of {bits} bits take {need} bytes, there are {have}"
    if scales.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its scales have dtype {scales.dtype}"
    groups = -(-K // group)
    if scales.dim() != 2 or N % max(len(scales), 1) or (scales.shape[1] != groups and g_idx is None):
        return f"scales of shape {tuple(scales.shape)} do not fit {N} x {K} in groups of {group}"
    if zeros is not None:
        rows = -(-N * bits // 32) if layout.packed_zeros else len(scales)
        if zeros.shape != (rows, scales.shape[1]):
            return f"zero points of shape {tuple(zeros.shape)} do not fit, expected ({rows}, {scales.shape[1]})"
    if g_idx is not None and g_idx.shape != (K,):
        return f"g_idx has {g_idx.numel()} entries for {K} columns"
    if layout.packing == "output" and (bits != 4 or N % 8):
        return f"AWQ's order has eight columns of 4 bits in a word, not {N} of {bits} bits"
    return None


def _bytes(layout: Layout, word: int) -> int:
    """How many bytes the codes take, in words of ``word`` bytes."""
    (N, K), bits, width = layout.shape, layout.bits, 8 * word
    if layout.packing == "row":
        return N * -(-K * bits // width) * word
    if layout.packing == "input":
        return N * -(-K * bits // width) * word
    if layout.packing == "output":
        return K * -(-N * bits // width) * word
    return -(-N * K // (width // bits)) * word
