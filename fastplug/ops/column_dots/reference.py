"""Column by column dot products in plain PyTorch."""

from __future__ import annotations

import torch

_ROWS = 512  # at a time: an fp32 copy of the whole matrices would be their largest cost


def column_dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The sum over rows of x · y, in fp32 (fp64 for fp64).

    Args:
        x, y: [rows, columns] of any floating-point dtypes, unit column stride.

    Returns:
        [columns] fp32, or fp64 where x is.

    Raises:
        ValueError: Different shapes.
    """
    check(x, y)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.new_zeros(x.shape[1], dtype=wide)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        total += (x[rows].to(wide) * y[rows].to(wide)).sum(0)
    return total


def check(x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise ``ValueError`` unless x and y are matrices of one shape."""
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"columns of {tuple(x.shape)} and {tuple(y.shape)} have no dot products")
