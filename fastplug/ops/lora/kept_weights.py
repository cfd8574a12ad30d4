"""Forms of frozen weights that are kept from step to step, so that no product makes them anew.

Or from a backward to the forward that comes next, where they take no more than the activations that went there: those
of all layers together are there when no activations are, and each one goes when its layer has kept its own.

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

SHARE = 0.5  # of the device's memory that has to be free for weights to be kept of fastplug's own accord
RENEWALS = 4  # of one form, after which its weights are taken to move all the time

State = list[tuple[int, int]]
T = TypeVar("T")


class Entry(NamedTuple):
    """Whose weights a form was made of, where and which version they were, the form, and its bytes if a tensor."""

    owners: list[weakref.ref[object]]
    state: State
    form: Any
    size: int = 0

    def holds(self, owners: Sequence[object], state: State) -> bool:
        """Whether the form is still that of these weights as they are now."""
        return self.state == state and all(ref() is owner for ref, owner in zip(self.owners, owners))


@dataclass(eq=False)
class KeptWeights:
    """What is kept of one model.

    Attributes:
        keep: True, False, or None for as long as half of the device's memory stays free.
        limit: Bytes that what is kept may take, if a plan says it: see :meth:`limit_to`.
        once: Whether what is not kept is made once a step: the backward hands it to the next forward. None is for
            backwards that begin with half of the device's memory free.
        held: Bytes that what is kept takes.
    """

    keep: bool | None
    limit: int | None = None
    once: bool | None = False
    held: int = 0
    _entries: dict[Hashable, Entry] = field(default_factory=dict)
    _handed: dict[Hashable, Entry] = field(default_factory=dict)
    _renewals: Counter[Hashable] = field(default_factory=Counter)
    _backward: tuple[int, bool] = (-1, False)  # the latest, and whether there was room when it began

    def get(
        self,
        owners: Sequence[object],
        name: str,
        state: Callable[[], State],
        make: Callable[[], T],
        device: torch.device,
        hands_on: bool = False,
    ) -> tuple[T, bool]:
        """The form of that name, and whether it is kept, which means that nobody may write to it.

        Args:
            owners: The modules of the weights, in their order; None among them where one is not known.
            name: Which form it is.
            state: Tells where each stored weight lies and which version it is, see :meth:`Group.stored_state`.
            make: Makes it anew.
            device: Where it lies.
            hands_on: Whether this is a backward that frees at least as much as the form takes.
        """
        idle = self.keep is False and not hands_on and not self._handed
        if idle or not self._serves(owners, device):
            return make(), False
        key, now = (name, *map(id, owners)), state()
        kept = self._current(self._entries, key, owners, now)
        if kept is not None:
            return kept.form, True
        handed = self._current(self._handed, key, owners, now)
        form = make() if handed is None else self._handed.pop(key).form
        size = form.numel() * form.element_size() if isinstance(form, torch.Tensor) else 0
        stays = self.keep is not False and self._room(device, size)
        if self._renewals[key] >= RENEWALS or not (stays or (hands_on and self._hands_on(device))):
            return form, False
        entries = self._entries if stays else self._handed
        entries[key] = Entry([weakref.ref(owner) for owner in owners], now, form, size)
        self.held += size if stays else 0
        return form, True

    def _serves(self, owners: Sequence[object], device: torch.device) -> bool:
        """Whether anything may be kept now."""
        if torch.compiler.is_compiling() or ahead.going():
            return False  # a compiler knows no addresses, and what is computed ahead is garbage
        if (self.keep is False and self.once is False) or any(owner is None for owner in owners):
            return False
        goes = self.limit is not None or self.once is not False
        return not (goes and recording(device))  # before the graph runs

    def _current(
        self, entries: dict[Hashable, Entry], key: Hashable, owners: Sequence[object], now: State
    ) -> Entry | None:
        """The entry, if it is still that of the weights; else it goes."""
        entry = entries.get(key)
        if entry is None or entry.holds(owners, now):
            return entry
        self._drop(entries, key)
        self._renewals[key] += 1
        return None

    def _drop(self, entries: dict[Hashable, Entry], key: Hashable) -> None:
        size = entries.pop(key).size
        self.held -= size if entries is self._entries else 0

    @property
    def handed(self) -> int:
        """Bytes of what a backward has handed to the next forward."""
        return sum(entry.size for entry in self._handed.values())

    def let_go(self) -> int:
        """Drop what was handed to the next forward; returns the bytes of it."""
        size = self.handed
        self._handed.clear()
        return size

    def limit_to(self, size: int) -> int:
        """Keep no more than so many bytes from now on. What was kept last goes first; returns the bytes of that."""
        self.limit, before = size, self.held
        while self.held > size:
            self.held -= self._entries.popitem()[1].size
        return before - self.held

    def forget(self, modules: Iterable[object]) -> None:
        """Let go of what was made of the weights of these modules, whoever still holds this."""
        gone = set(map(id, modules))
        for entries in (self._entries, self._handed):
            for key in [key for key, entry in entries.items() if gone & {id(ref()) for ref in entry.owners}]:
                self._drop(entries, key)

    def _room(self, device: torch.device, size: int) -> bool:
        if recording(device):
            return False  # it would lie in the graph's memory
        if self.limit is not None:
            return self.held + size <= self.limit
        if device.type != "cuda":
            return bool(self.keep)
        return self.keep is True or half_free(device)

    def _hands_on(self, device: torch.device) -> bool:
        """Whether the backward that runs may leave something. Counters of memory are read once for all its layers."""
        if self.once is not None:
            return self.once
        this = torch._C._current_graph_task_id()
        if self._backward[0] != this:
            self._backward = this, device.type == "cuda" and half_free(device)
        return self._backward[1]


def half_free(device: torch.device) -> bool:
    """Whether half of a CUDA device's memory is in no tensor of this process and no other process has it."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached > SHARE * total
