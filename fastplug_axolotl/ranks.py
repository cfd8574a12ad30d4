"""The decision must be the same on all ranks: a rank that decided otherwise computes other gradients, or hangs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from fastplug.errors import FastPlugError


def is_true_on_any(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank; every rank must call this."""
    return any(_gather(flag))


def require_same_decisions(decisions: Sequence[Any]) -> None:
    """Compare the decisions of a report over all ranks; every rank must call this.

    Raises:
        FastPlugError: On every rank, if one patched another site, or with another implementation, than the first.
    """
    everyone = _gather([(d.name, d.status, d.implementation, d.reason) for d in decisions])
    for rank, theirs in enumerate(everyone):
        for ours, other in zip_longest(everyone[0], theirs):
            if ours is None or other is None or ours[:3] != other[:3]:  # a reason may name the rank's own device
                raise FastPlugError(
                    f"fastplug: rank {rank} decided {_text(other)}, but rank 0 {_text(ours)}; "
                    "use the same packages and the same kind of device on all ranks"
                )


def _gather(mine: Any) -> list[Any]:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _text(decision: tuple[str, str, str | None, str | None] | None) -> str:
    if decision is None:
        return "nothing on this site"
    name, status, implementation, reason = decision
    detail = ": ".join(part for part in (implementation, reason) if part)
    return f"{name or 'model'}: {status}" + (f" ({detail})" if detail else "")
