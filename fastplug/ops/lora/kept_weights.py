"""Forms of frozen weights that are kept from step to step, so that no product makes them anew.

A form is found by the modules that own the weights, and made again when a stored weight has moved or was written to.
So nothing here outlives a merge or a load, and FSDP's weights, which move at each gathering, are soon not kept.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from fastplug.ops import ahead
from fastplug.ops.launch import recording

SHARE = 0.5  # of the device's memory that has to stay free for weights to be kept of fastplug's own accord
RENEWALS = 4  # of one form, after which its weights are taken to move all the time

State = list[tuple[int, int]]
T = TypeVar("T")


class Entry(NamedTuple):
    """Whose weights a form was made of, where and which version they were, the form, and its bytes if a tensor."""

    owners: list[weakref.ref[object]]
    state: State
    form: Any
    size: int = 0


@dataclass(eq=False)
class KeptWeights:
    """What is kept of one model.

    Attributes:
        keep: True, False, or None for as long as half of the device's memory stays free.
        limit: Bytes that what is kept may take, if a plan says it: see :meth:`limit_to`.
        held: Bytes that it takes.
    """

    keep: bool | None
    limit: int | None = None
    held: int = 0
    _entries: dict[Hashable, Entry] = field(default_factory=dict)
    _renewals: Counter[Hashable] = field(default_factory=Counter)

    def get(
        self,
        owners: Sequence[object],
        name: str,
        state: Callable[[], State],
        make: Callable[[], T],
        device: torch.device,
    ) -> tuple[T, bool]:
        """The form of that name, and whether it is kept, which means that nobody may write to it.

        Args:
            owners: The modules of the weights, in their order; None among them where one is not known.
            name: Which form it is.
            state: Tells where each stored weight lies and which version it is, see :meth:`Group.stored_state`.
            make: Makes it anew.
            device: Where it lies.
        """
        if self.keep is False or torch.compiler.is_compiling() or any(owner is None for owner in owners):
            return make(), False  # a compiler knows no addresses
        if ahead.going():
            return make(), False  # garbage
        if self.limit is not None and recording(device):
            return make(), False  # the next plan may let go of what is kept
        key, now = (name, *map(id, owners)), state()
        entry = self._entries.get(key)
        if entry is not None:
            if entry.state == now and all(ref() is owner for ref, owner in zip(entry.owners, owners)):
                return entry.form, True
            del self._entries[key]
            self.held -= entry.size
            self._renewals[key] += 1
        form = make()
        size = form.numel() * form.element_size() if isinstance(form, torch.Tensor) else 0
        if self._renewals[key] >= RENEWALS or not self._room(device, size):
            return form, False
        self._entries[key] = Entry([weakref.ref(owner) for owner in owners], now, form, size)
        self.held += size
        return form, True

    def limit_to(self, size: int) -> int:
        """Keep no more than so many bytes from now on. What was kept last goes first; returns the bytes of that."""
        self.limit, before = size, self.held
        while self.held > size:
            self.held -= self._entries.popitem()[1].size
        return before - self.held

    def forget(self, modules: Iterable[object]) -> None:
        """Let go of what was made of the weights of these modules, whoever still holds this."""
        gone = set(map(id, modules))
        for key in [key for key, entry in self._entries.items() if gone & {id(ref()) for ref in entry.owners}]:
            self.held -= self._entries.pop(key).size

    def _room(self, device: torch.device, size: int) -> bool:
        if recording(device):
            return False  # it would lie in the graph's memory
        if self.limit is not None:
            return self.held + size <= self.limit
        if device.type != "cuda":
            return bool(self.keep)
        if self.keep:
            return True
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached > SHARE * total
