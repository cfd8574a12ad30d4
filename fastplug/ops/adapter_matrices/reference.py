"""A and B of several adapters as one pair of matrices, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def matrices(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], rows: Sequence[int], out_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The A one above the other [rank, in_features], and the B block-diagonally [out_features, rank], in ``dtype``.

    One A, or one B of all rows, is itself where it has that dtype.

    Args:
        a: [its rank, in_features] of each adapter, of any floating-point dtype.
        b: [its out_features, its rank] of each.
        rows: Where the rows of each B begin in the block matrix; all others are zero.
        out_features: How many rows that has.
        dtype: Of both results.
    """
    stacked = (a[0] if len(a) == 1 else torch.cat(list(a))).to(dtype)
    if len(b[0]) == out_features:
        return stacked, b[0].to(dtype)
    block = b[0].new_zeros(out_features, len(stacked), dtype=dtype)
    targets, column = [], 0
    for row, part in zip(rows, b, strict=True):
        targets.append(block[row : row + part.shape[0], column : column + part.shape[1]])
        column += part.shape[1]
    torch._foreach_copy_(targets, list(b))
    return stacked, block
