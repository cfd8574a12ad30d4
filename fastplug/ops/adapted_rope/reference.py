"""q, k and v with their adapters' shares, q and k turned, in plain PyTorch (Hu et al. 2021, Su et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastplug.ops.rope.reference import rotate


class Adapted(NamedTuple):
    """The adapters of q, k and v.

    Attributes:
        xa: s · x Aᵀ of all three [T, rank], contiguous.
        b: Their B, block-diagonal [channels, rank], contiguous.
        columns: Where the columns of each end.
    """

    xa: torch.Tensor
    b: torch.Tensor
    columns: tuple[int, int, int]


class Heads(NamedTuple):
    """How many heads of queries there are, of keys (as many as of values), and how wide one is."""

    queries: int
    keys: int
    width: int


def suits(tokens: int, adapted: Adapted, heads: Heads, cos: torch.Tensor) -> bool:
    """Whether one pass is faster here than a pass each: never in plain PyTorch."""
    return False


def forward(qkv: torch.Tensor, adapted: Adapted, heads: Heads, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Add x Bᵀ to ``qkv`` and turn q and k, in place; rounded once.

    Args:
        qkv: [T, channels], contiguous: q, k and v of the base alone, one after another.
        adapted: See :class:`Adapted`.
        heads: See :class:`Heads`.
        cos, sin: [B or 1, S, width], as of :func:`fastplug.ops.rope.reference.forward`.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    full = qkv.to(wide) + adapted.xa.to(wide) @ adapted.b.to(wide).t()
    shape = (-1, cos.shape[1], heads.queries + 2 * heads.keys, heads.width)
    turned, v = full.view(shape).split([heads.queries + heads.keys, heads.keys], dim=2)
    qkv.view(shape).copy_(torch.cat((rotate(turned, cos.to(wide), sin.to(wide)), v), dim=2))
