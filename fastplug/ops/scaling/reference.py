"""Scaling the columns or the rows of a matrix in plain PyTorch."""

from __future__ import annotations

import torch


def scale_columns(
    x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, factor: float = 1.0, accumulate: bool = False
) -> None:
    """Write factor · x · diag(scale) into ``out``, or add it to what is there.

    Computed in fp32 (fp64 for fp64) and rounded once, to out's dtype.

    Args:
        x: [rows, columns], any floating-point dtype and strides.
        scale: [columns], any floating-point dtype.
        out: [rows, columns], unit column stride. May be x itself.
        factor: Of the product.
        accumulate: Whether ``out`` holds something to add to. Then it is not x.

    Raises:
        ValueError: Shapes that do not fit, or an ``out`` with strided columns.
    """
    check(x, scale, out, 1)
    _product(x, scale, out, factor, accumulate)


def scale_rows(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write diag(scale) · x into ``out``; as :func:`scale_columns`, with ``scale`` [rows]."""
    check(x, scale, out, 0)
    _product(x, scale[:, None], out, 1.0, False)


def check(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, dim: int) -> None:
    """Raise ``ValueError`` unless x and out are matrices of one shape and scale has the length of their ``dim``."""
    if x.dim() != 2 or scale.shape != (x.shape[dim],) or out.shape != x.shape:
        what = ("rows", "columns")[dim]
        raise ValueError(
            f"the {what} of {tuple(x.shape)} cannot be scaled by {tuple(scale.shape)} into {tuple(out.shape)}"
        )
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError(f"out has strides {out.stride()}: its last dimension must be contiguous to be written into")


def _product(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, factor: float, accumulate: bool) -> None:
    scale = scale.to(torch.promote_types(torch.promote_types(x.dtype, out.dtype), torch.float32))
    if accumulate:
        out.addcmul_(x, scale, value=factor)
        return
    if factor != 1.0:
        scale = scale * factor
    if torch.compiler.is_compiling():  # which writes no view by out=
        out.copy_(x * scale)
    else:
        torch.mul(x, scale, out=out)
