"""The labels of a step: shifted, and which of them count.

Prompts and padding have no label, and nobody reads their logits. To leave them out, the host has to know how many rows
are left, since it launches the products. Asking the device when the head is due would wait for all layers; so the
number is counted before the first layer is launched, and copied to the host meanwhile. What the host then waits for is
that the device has begun with this forward: it has all of it before it, and does not run out of work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

SHARE = 15 / 16
"""Where more of the rows than that count, none are left out: picking them costs a pass over the hidden states."""


class Labels:
    """The labels that a loss is computed from.

    Args:
        labels: [B, S] token ids, ``ignore_index`` where there is none.
        kwargs: Those of the loss function: ``ignore_index``, ``shift_labels`` and ``num_items_in_batch``.

    Attributes:
        flat: [B·S], of each row of the hidden states the token that follows it.
        mask: [B·S] bool, which rows have a label.
        ignore_index: Of rows without a label.
        num_items: What the sum of the losses is divided by; their number if None.
    """

    def __init__(self, labels: torch.Tensor, kwargs: dict[str, Any]) -> None:
        self.ignore_index: int = kwargs.get("ignore_index", -100)
        self.num_items = kwargs.get("num_items_in_batch")
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=self.ignore_index)[..., 1:]
        self.flat: torch.Tensor = shifted.reshape(-1)
        self.mask = self.flat != self.ignore_index
        self._number = _number_of(self.mask) if _countable(self.flat) else None

    def counted(self, device: torch.device) -> torch.Tensor | None:
        """[R] int64 on ``device``, rising: the rows that have a label. None for all, or where they cannot be told."""
        if self._number is None:
            return None
        number, total = self._number(), self.mask.numel()
        if number > SHARE * total:
            return None
        places = torch.where(self.mask, self.mask.cumsum(0) - 1, number)  # those without a label behind the others
        rows = torch.arange(total, device=self.mask.device)
        return rows.new_empty(number + 1).scatter_(0, places, rows)[:number].to(device, non_blocking=True)


def _countable(labels: torch.Tensor) -> bool:
    """Whether their number can come to the host: not within a graph that is captured or compiled."""
    if type(labels) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    if labels.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return labels.device.type == "cpu"


def _number_of(mask: torch.Tensor) -> Callable[[], int]:
    """Sets out to count; what it returns waits for the number."""
    total = mask.sum()
    if mask.device.type == "cpu":
        number = int(total)
        return lambda: number
    landed = torch.empty((), dtype=total.dtype, pin_memory=True)
    landed.copy_(total, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(mask.device))

    def wait() -> int:
        event.synchronize()
        return int(landed)

    return wait


__all__ = ["SHARE", "Labels"]
