"""s · g B and gᵀ (s · x Aᵀ) in plain PyTorch, for the adapters of one tensor (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Of an adapter: its rows of y, its columns of x Aᵀ, and its factor s."""

    rows: slice
    columns: slice
    scaling: float


def suits(g: torch.Tensor, xa: torch.Tensor, b: torch.Tensor, places: Sequence[Place]) -> bool:
    """Whether one pass is faster here than a product each: never in plain PyTorch."""
    return False


def gradients(
    g: torch.Tensor, xa: torch.Tensor, b: torch.Tensor, places: Sequence[Place]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """s · g B [tokens, rank] in g's dtype and the gradient of each adapter's B [its rows, its rank] in fp32 or wider.

    Args:
        g: The gradient of y [tokens, out_features], rows may be strided.
        xa: s · x Aᵀ of all adapters [tokens, rank], contiguous.
        b: Their B, block-diagonal [out_features, rank], contiguous.
        places: Of each adapter. Every column belongs to one of them.
    """
    gb, wide = torch.empty_like(xa), torch.promote_types(g.dtype, torch.float32)
    found = []
    for rows, columns, scaling in places:
        part = g[:, rows]
        gb[:, columns] = scaling * (part.to(wide) @ b[rows, columns].to(wide))
        found.append(part.to(wide).t() @ xa[:, columns].to(wide))
    return gb, tuple(found)
