"""A device whose memory is made up: everything that asks for numbers gets these, everything else is real."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastplug.memory.meter import HostMeter, Mark

MiB = 2**20
# For a process that trains with gloo: without the GPU, if the machine has one, and with Triton's interpreter.
ON_A_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


class Moment:
    """A moment of a clock that the test sets."""

    def __init__(self, at: float | None) -> None:
        self.at = at

    def milliseconds_since(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, Moment)
        return None if self.at is None or earlier.at is None else self.at - earlier.at


class Device:
    """A :class:`~fastplug.memory.meter.Meter` of ``total`` bytes, on which only the given model lies.

    Attributes:
        others: Bytes that other processes hold.
        clock: Milliseconds that pass between two marks; None: the device never gets there, so nothing is measured.
        limits: What the allocator was limited to, in order; None where that was given back.
        expanded: Whether the allocator was asked to put scattered pieces of free memory together.
    """

    def __init__(self, model: Any, total: int, context: int = MiB // 8) -> None:
        self._host = HostMeter(model)
        self._total, self._context = total, context
        self.others, self.retried = 0, 0
        self.clock: float | None = None
        self._now = 0.0
        self.highest: tuple[int, int] = (0, 0)
        self.limits: list[int | None] = []
        self.released = 0
        self.expanded = False

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - self.others - self.reserved() - self._context

    def context(self) -> int:
        return self._context

    def reserved(self) -> int:
        return self._host.allocated()

    def allocated(self) -> int:
        return self._host.allocated()

    def peak(self) -> tuple[int, int]:
        return self.highest

    def retries(self) -> int:
        return self.retried

    def mark(self) -> Mark:
        self._now += self.clock or 0.0
        return Moment(None if self.clock is None else self._now)

    def limit(self, size: int) -> None:
        self.limits.append(size)

    def expand(self) -> bool:
        self.expanded = True
        return True

    def restore(self) -> None:
        self.limits.append(None)

    def release(self) -> None:
        self.released += 1


def gradients(model: Any, batch: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step, from the same random numbers each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
