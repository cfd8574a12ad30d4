"""Running out of memory is handled inside the layer: what other layers keep is dropped, and the work is done again.

Each decoder layer of a planned model is one autograd node (``node.py``), which adds no gradient to anything before all
of the layer's are there. So work that failed half-way left nothing behind, and doing it again counts nothing twice. A
step is never repeated. Nothing here is entered where no plan is made: see ``runtime.py``.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from fastplug.memory.node import Record

T = TypeVar("T")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left: PyTorch's own, or that of a library it calls."""
    known = isinstance(error, (torch.OutOfMemoryError, RuntimeError))
    return known and (isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in LIBRARIES))


def requested(message: str) -> int:
    """The bytes that an allocation asked for, as its error says; 0 if it does not."""
    match = re.search(r"[Tt]ried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)", message)
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


class Room:
    """What can be dropped when memory runs out, for all layers of one ``apply``.

    Args:
        release: Gives cached blocks back to the device, and what waits there to be copied; the bytes of the latter.
        ran_out: Called with the bytes that were missing, once for each time something was dropped.
        spare: Lets go of what is only kept because there was room; the bytes of it.
    """

    def __init__(
        self,
        release: Callable[[], int],
        ran_out: Callable[[int], None],
        spare: Callable[[], int] = lambda: 0,
    ) -> None:
        self._release, self._ran_out, self._spare = release, ran_out, spare
        self._waiting: list[weakref.ref[Record]] = []
        self.dropped = 0  # layers whose kept tensors were dropped so far
        self.backwards = 0  # layers whose backward has run

    def add(self, record: Record) -> None:
        self._waiting.append(weakref.ref(record))

    def records(self) -> list[Record]:
        """The forwards that wait for their backward, oldest first."""
        found = [(reference, reference()) for reference in self._waiting]
        self._waiting = [reference for reference, record in found if record is not None]
        return [record for _, record in found if record is not None and not record.done]

    def forwards(self, index: int) -> int:
        """How many forwards of the layer with this index wait for their backward."""
        return sum(record.index == index for record in self.records())

    def make(self, message: str, attempt: int) -> bool:
        """Drop what layers keep until the failed request may fit, twice as much at each attempt; whether that may help.

        The oldest forwards go first: their backward comes last, so this lasts longest.
        """
        missing, spared = requested(message), self._spare()
        goal, freed, count = missing << attempt, 0, 0
        for record in () if spared and spared >= goal else self.records():
            if record.drop():
                freed, count = freed + record.held, count + 1
                if freed >= goal and count >= 1 << attempt:
                    break
        staged = self._release()
        self.dropped += count
        self._ran_out(max(missing, freed))
        return count > 0 or staged + spared > 0


def retried(room: Room, work: Callable[[], T]) -> T:
    """``work()``, again after something was dropped if it runs out of memory. It must leave nothing behind if it fails.

    Raises:
        torch.OutOfMemoryError: Nothing is left to drop, and giving cached blocks back did not help either.
    """
    attempt, last = 0, False
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            message = str(error)
        # Here the error is gone, and with it the frames that hold the tensors of the failed attempt.
        if last:
            raise torch.OutOfMemoryError(
                f"{message} (fastplug has dropped all that its decoder layers kept for the backward: {room.dropped} "
                "times a layer's; a smaller batch, a shorter sequence or offloading is needed)"
            )
        last = not room.make(message, attempt)
        attempt += 1


def with_room(planner: Any, work: Callable[[], T], less: Callable[[], T]) -> T:
    """``work()``, with what a planner's layers keep to be dropped for it. Without a planner: ``work()``.

    Head and loss come when all layers hold all they keep, so memory often runs out there and not in a layer. What stays
    of dropped layers may lie so that no large piece is free: then ``less()``, which does the same in smaller ones.
    """
    if planner is None or torch.compiler.is_compiling():
        return work()
    with contextlib.suppress(torch.OutOfMemoryError):
        return retried(planner.room, work)
    return retried(planner.room, less)


__all__ = ["Room", "out_of_memory", "requested", "retried", "with_room"]
