"""CUDA graphs on a CPU: recorded ops that are called again, in memory that is used again as a graph's pool uses it.

What a recording allocates lies in one arena. A piece of it is free once nobody holds a tensor in it any more, and the
next that fits is put there: what lives longer than its recording must be held, and what was recorded earlier may write
over what was recorded later. Recording computes nothing that stays, as on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastplug.graphs.recorder import Memory

SIZE = 192 << 20
ALIGNED = 64


class Arena:
    """Bytes that recordings share."""

    def __init__(self) -> None:
        self.bytes = np.zeros(SIZE, dtype=np.uint8)  # which takes no memory before it is written to
        self.free = [(0, SIZE)]  # (offset, size), in order
        self.end = 0  # of what was ever taken
        self.most = 0

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of this shape, contiguous as far as that one is, in the smallest free piece that holds it."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride())) if like.numel() else 0
        size = max(ALIGNED, -(-span * like.itemsize // ALIGNED) * ALIGNED)
        offset = min((piece for piece in self.free if piece[1] >= size), key=lambda piece: piece[1])[0]
        self._take(offset, size)
        self.end = max(self.end, offset + size)
        piece = self.bytes[offset : offset + size]
        weakref.finalize(piece, self._give, offset, size).atexit = False
        return self._tensor(piece, like)

    def holds(self, tensor: torch.Tensor) -> bool:
        start = self.bytes.ctypes.data
        return start <= tensor.untyped_storage().data_ptr() < start + SIZE

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same bytes, without holding them."""
        offset = tensor.data_ptr() - self.bytes.ctypes.data
        return self._tensor(self.bytes[offset : SIZE - (SIZE - offset) % tensor.itemsize], tensor)

    @staticmethod
    def _tensor(piece: Any, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(piece).view(like.dtype).as_strided(like.shape, like.stride())

    def _take(self, offset: int, size: int) -> None:
        at = next(i for i, piece in enumerate(self.free) if piece[0] == offset)
        self.free[at : at + 1] = [(offset + size, self.free[at][1] - size)] if self.free[at][1] > size else []
        self.most = max(self.most, SIZE - sum(size for _, size in self.free))

    def _give(self, offset: int, size: int) -> None:
        pieces = sorted([*self.free, (offset, size)])
        self.free = pieces[:1]
        for start, length in pieces[1:]:
            before, whole = self.free[-1]
            if before + whole == start:
                self.free[-1] = before, whole + length
            else:
                self.free.append((start, length))


class Recording(TorchDispatchMode):
    """Notes ops, with what they read and write by place."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}

        def placed(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in given:
                return value  # a view of what was given, or that itself
            return self.arena.allocate(value).copy_(value)

        found = tree_map(placed, func(*args, **kwargs))
        self.ops.append((func, *tree_map(self._place, (args, kwargs, found))))
        return found

    def _place(self, value: Any) -> Any:
        """What stands for a value in a recording: pieces of the arena are not held."""
        if not isinstance(value, torch.Tensor):
            return value
        return self.arena.view(value) if self.arena.holds(value) else value.detach()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, found in self.ops:
                for mine, new in zip(_tensors(found), _tensors(func(*args, **kwargs)), strict=True):
                    if mine.data_ptr() != new.data_ptr():
                        mine.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, torch.Tensor)]


class CPURecorder:
    """Records on a CPU."""

    devices: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.arena = Arena()

    def record(self, function: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        arena = self.arena
        before = arena.bytes[: arena.end].copy()
        with Recording(arena) as recording:
            results = function()
        arena.bytes[: len(before)] = before
        arena.bytes[len(before) : arena.end] = 0xFF  # not a number in any format
        return results, recording.replay

    def another(self) -> CPURecorder:
        return CPURecorder()

    def ready(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def memory(self) -> Memory:
        return Memory(0, 0, 1 << 40)

    def trim(self) -> None:
        pass

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.arena.view(tensor)
