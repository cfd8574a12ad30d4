"""A matrix product that is added in place."""

from __future__ import annotations

import torch

from fastplug.ops.library import custom_op


@custom_op("out")
def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float, alpha: float) -> None:
    """beta · out + alpha · left @ right in ``out``, which may be a view.

    An op of its own for ``torch.compile``: of ``addmm_`` it makes a product into a new tensor, which copies ``out``
    into that first, and the result back where ``out`` is a view.
    """
    out.addmm_(left, right, beta=beta, alpha=alpha)


__all__ = ["add_product"]
