"""Decoding of blockwise 4-bit weights (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) in plain PyTorch.

The weight's elements are numbered along rows. Byte i holds element 2i in its high and 2i + 1 in its low four bits; each
is an index into ``code``, and every ``blocksize`` elements share one scale: ``weight = code[index] * absmax[block]``.
"Double quantization" stores the scales in 8 bits likewise: ``absmax = code2[absmax] * absmax2[block2] + offset``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Nested = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]


def scales(absmax: torch.Tensor, nested: Nested | None) -> torch.Tensor:
    """The fp32 scale of each block; the nested product and sum are each rounded, as in bitsandbytes."""
    if nested is None:
        return absmax
    code, absmax2, offset, blocksize = nested
    values = code[absmax.int()]
    return values * absmax2.repeat_interleave(blocksize)[: values.numel()] + offset


def decode_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: Nested | None = None,
) -> torch.Tensor:
    """The whole weight, as one would write it on paper: the definition."""
    indices = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), dim=-1).flatten()
    scale = scales(absmax, nested).repeat_interleave(blocksize)
    elements = shape[0] * shape[1]
    return (code[indices.int()[:elements]] * scale[:elements]).to(dtype).view(shape)


def check(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, row_start: int, out: torch.Tensor,
          nested: Nested | None) -> None:  # fmt: skip
    """Raise ``ValueError`` where the tensors cannot hold the rows that are asked for."""
    rows, columns = out.shape
    end = (row_start + rows) * columns
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed has dtype {packed.dtype}: view it as torch.uint8 (packed.view(torch.uint8))")
    if row_start < 0 or packed.numel() * 2 < end:
        raise ValueError(
            f"rows {row_start}..{row_start + rows} of {columns} columns need {(end + 1) // 2} packed bytes, "
            f"there are {packed.numel()}"
        )
    if absmax.numel() * blocksize < end:
        raise ValueError(f"{absmax.numel()} scales of blocks of {blocksize} do not cover {end} elements")
    expected = torch.float32 if nested is None else torch.uint8
    if absmax.dtype != expected:
        how = "without" if nested is None else "with"
        raise ValueError(f"absmax has dtype {absmax.dtype}, expected {expected} {how} double quantization")
    if blocksize < 32 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize {blocksize} is not a power of two from 32 on, as bitsandbytes has them")


def decode(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    *,
    nested: Nested | None = None,
    row_start: int = 0,
) -> None:
    """Decode rows ``row_start`` to ``row_start + N`` of a packed weight into ``out``.

    Args:
        packed: uint8, the whole weight's bytes in any shape.
        absmax: [blocks], fp32, or uint8 with ``nested``.
        code: [16] fp32, the values that the 4-bit indices stand for.
        blocksize: Elements that share a scale, a power of two from 32 on.
        out: [N, K] fp16, bf16 or fp32, where K is the width of the packed weight; the row stride may exceed K.
        nested: ``(code2 [256] fp32, absmax2 [blocks / blocksize2] fp32, offset 0-dim fp32, blocksize2)``.
        row_start: First row to decode. Any: neither rows nor ranges need to be aligned to blocks or bytes.

    Raises:
        ValueError: The tensors cannot hold these rows, or a dtype is not as above.
    """
    check(packed, absmax, blocksize, row_start, out, nested)
    rows, columns = out.shape
    start, count = row_start * columns, rows * columns
    if count == 0:
        return
    # Both halves of each of the 256 bytes as one 8-byte item: one gather for two elements, and the fast kind of it.
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=-1).view(torch.int64).view(-1)
    packed = packed.reshape(-1)[start // 2 : (start + count + 1) // 2]
    values = pairs.index_select(0, packed.int()).view(torch.float32)[start % 2 :][:count]
    scale = scales(absmax, nested)[start // blocksize : (start + count - 1) // blocksize + 1]
    if start % blocksize == 0 and count % blocksize == 0:
        values = values.view(-1, blocksize).mul_(scale[:, None])
    else:
        values = values * scale.repeat_interleave(blocksize)[start % blocksize :][:count]
    out.copy_(values.view(rows, columns))


class Stored(NamedTuple):
    """A whole weight of ``rows`` rows, its tensors as of :func:`decode`."""

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    nested: Nested | None
    rows: int


def decode_all(weights: Sequence[Stored], blocksize: int, out: torch.Tensor) -> bool:
    """Decode several weights of blocks of one size, one below the other, into ``out`` [rows of all, K]; whether that
    was done.

    Raises:
        ValueError: As :func:`decode`.
    """
    row = 0
    for weight in weights:
        mine = out[row : row + weight.rows]
        decode(weight.packed, weight.absmax, weight.code, blocksize, mine, nested=weight.nested)
        row += weight.rows
    return True
