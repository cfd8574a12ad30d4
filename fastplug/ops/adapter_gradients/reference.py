"""s · g B and gᵀ (s · x Aᵀ) in plain PyTorch, for the adapters of one tensor (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch


class Places(NamedTuple):
    """Where adapters are that follow one another: i has rows[i] to rows[i + 1] of y, and likewise columns of x Aᵀ."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def suits(g: torch.Tensor, xa: torch.Tensor, b: torch.Tensor, places: Places) -> bool:
    """Whether one pass is faster here than a product each: never in plain PyTorch."""
    return False


def gradients(
    g: torch.Tensor,
    xa: torch.Tensor,
    b: torch.Tensor,
    places: Places,
    scalings: Sequence[float],
    rstd: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
    """s · g B [tokens, rank] in g's dtype, the gradient of each adapter's B [its rows, its rank] in fp32 or wider, and
    the first times ``rstd``.

    Args:
        g: The gradient of y [tokens, out_features], rows may be strided.
        xa: s · x Aᵀ of all adapters [tokens, rank], contiguous.
        b: Their B, block-diagonal [out_features, rank], contiguous.
        places: Of all rows and columns.
        scalings: The factor s of each adapter.
        rstd: 1/rms [tokens] in fp32 or wider of a norm that made x, or None.
    """
    gb, wide = torch.empty_like(xa), torch.promote_types(g.dtype, torch.float32)
    found = []
    for (row, end), (column, last), scaling in zip(pairwise(places.rows), pairwise(places.columns), scalings):
        part = g[:, row:end].to(wide)
        gb[:, column:last] = scaling * (part @ b[row:end, column:last].to(wide))
        found.append(part.t() @ xa[:, column:last].to(wide))
    normed = None if rstd is None else (gb.to(wide) * rstd[:, None]).to(gb.dtype)
    return gb, tuple(found), normed
