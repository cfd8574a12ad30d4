"""Forms of frozen weights that are kept from step to step, so that no product makes them anew.

Or from a backward to the forward that comes next, where they take no more than the activations that went there: those
of all layers together are there when no activations are, and each one goes when its layer has kept its own. They lie in
blocks of the size of the largest activation, so that what is freed on either side is what the other one needs next.

A form is found by the modules that own the weights, and made again when a stored weight has moved or was written to.
So nothing here outlives a merge or a load, and FSDP's weights, which move at each gathering, are soon not kept.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from fastplug.ops import ahead
from fastplug.ops.launch import recording

SHARE = 0.5  # of the device's memory that has to be free for weights to be kept of fastplug's own accord
LARGEST_BLOCK = 2  # times as large as the weights that it is for
ALIGNED = 256  # bytes at which the parts of a block begin
RENEWALS = 4  # of one form, after which its weights are taken to move all the time

State = list[tuple[int, int]]
Empty = Callable[..., torch.Tensor]  # torch.empty, or what allocates as it does
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


def block_size(activation: int, weights: int) -> int:
    """Bytes of the block for what a backward hands on: those of the activation that it frees, if that is not much
    larger than the weights are."""
    return activation if weights <= activation <= LARGEST_BLOCK * weights else weights


class Block:
    """Memory for what one backward hands on.

    Args:
        size: Bytes of it.
    """

    def __init__(self, size: int) -> None:
        self._size, self._used = size, 0
        self._memory: torch.Tensor | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """An uninitialized tensor in it, or None where it does not fit."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > self._size:
            return None
        if self._memory is None:
            self._memory = torch.empty(self._size, dtype=torch.uint8, device=device)
        found = self._memory[self._used : self._used + size].view(dtype).view(*shape)
        self._used += -(-size // ALIGNED) * ALIGNED
        return found


@dataclass(eq=False)
class KeptWeights:
    """What is kept of one model.

    Attributes:
        keep: True, False, or None for as long as half of the device's memory stays free.
        limit: Bytes that what is kept may take, if a plan says it: see :meth:`limit_to`.
        once: Whether what is not kept is made once a step: the backward hands it to the next forward. None is for
            backwards that begin with half of the device's memory free.
        held: Bytes that what is kept takes.
        leaves: Whether the layer whose forward runs may have its backward hand something on. A memory plan says it.
    """

    keep: bool | None
    limit: int | None = None
    once: bool | None = False
    held: int = 0
    leaves: bool = True
    _block: Block | None = None  # that the backward fills now
    _entries: dict[Hashable, Entry] = field(default_factory=dict)
    _handed: dict[Hashable, Entry] = field(default_factory=dict)
    _renewals: Counter[Hashable] = field(default_factory=Counter)
    _backward: tuple[int, bool] = (-1, False)  # the latest, and whether there was room when it began

    def get(
        self,
        owners: Sequence[object],
        name: str,
        state: Callable[[], State],
        make: Callable[[Empty], T],
        device: torch.device,
        hands_on: bool = False,
        size: int = 0,
    ) -> tuple[T, bool]:
        """The form of that name, and whether it is kept, which means that nobody may write to it.

        Args:
            owners: The modules of the weights, in their order; None among them where one is not known.
            name: Which form it is.
            state: Tells where each stored weight lies and which version it is, see :meth:`Group.stored_state`.
            make: Makes it anew, in memory that the function which it gets allocates.
            device: Where it lies.
            hands_on: Whether this is a backward that frees at least as much as the form takes.
            size: Bytes that it takes, where a limit is to count them.
        """
        idle = self.keep is False and not hands_on and not self._handed
        if idle or not self._serves(owners, device):
            return make(torch.empty), False
        key, now = (name, *map(id, owners)), state()
        kept = self._current(self._entries, key, owners, now)
        if kept is not None:
            return kept.form, True
        handed = self._current(self._handed, key, owners, now)
        if handed is not None and hands_on:  # another forward waits for its backward, and takes it after that
            return handed.form, True
        if handed is not None:
            self._block = None
            return self._handed.pop(key).form, False
        tired = self._renewals[key] >= RENEWALS
        stays = not tired and self.keep is not False and self._room(device, size)
        hands_on = hands_on and not tired and not stays and self._hands_on(device)
        form = make(self._empty if hands_on else torch.empty)
        if not (stays or hands_on):
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
        may_go = self.limit is not None or self.once is not False  # before a graph that reads it runs
        return not (may_go and recording(device))

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
    def may_be_handed(self) -> bool:
        """Whether the backward of the layer whose forward runs may hand something on, as far as is known by now."""
        return self.leaves and self.once is not False

    def frees(self, size: int) -> None:
        """What the backward that runs hands on next will lie in a block of so many bytes, see :func:`block_size`."""
        self._block = Block(size)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for something to hand on."""
        found = None if self._block is None else self._block.take(shape, dtype, device)
        return torch.empty(shape, dtype=dtype, device=device) if found is None else found

    @property
    def handed(self) -> int:
        """Bytes of what a backward has handed to the next forward, with all of the blocks that it lies in."""
        forms = [entry.form for entry in self._handed.values() if isinstance(entry.form, torch.Tensor)]
        storages = [form.untyped_storage() for form in forms]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def let_go(self) -> int:
        """Drop what was handed to the next forward; returns the bytes of it."""
        if not self._handed:  # as in each step of a generation
            return 0
        size = self.handed
        self._handed.clear()
        self._block = None
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
