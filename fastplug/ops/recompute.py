"""Know when gradient checkpointing is about to stop: then the last product of a layer need not be computed again.

``torch.utils.checkpoint`` (non-reentrant) runs a region a second time only for the tensors that its nodes save, and
stops at the last of them. A node that is about to save exactly the tensors that are still missing is the last one, so
its output will never be read.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

HOOK = "_recomputation_hook.__init__.<locals>.pack_hook"
FIRST_HOOK = "_checkpoint_hook.__init__.<locals>.pack_hook"
_ASKED: weakref.WeakSet[Callable[..., object]] = weakref.WeakSet()


class Countdown(torch.autograd.graph.saved_tensors_hooks):
    """Counts the tensors that nodes save; with ``total``, :func:`tensors_left` counts down to the last of them."""

    def __init__(self, total: int | None = None) -> None:
        self.total, self.count = total, 0
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return tensor.detach()  # an output that saved itself would never be freed

    @staticmethod
    def _unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Handover:
    """What the first pass of a region hands to the second one, where both are recorded.

    A node that has made something small of something large gives the former, in the order in which the second pass
    takes it, and need not make the latter again.

    Attributes:
        tensors: What was given.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._taken: int | None = None

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first pass, whose nodes give."""
        self.tensors.clear()
        with self._during(None):
            yield

    @contextmanager
    def second(self) -> Iterator[None]:
        """The second pass, whose nodes take."""
        with self._during(0):
            yield

    @contextmanager
    def _during(self, taken: int | None) -> Iterator[None]:
        self._taken = taken
        token = _HANDOVER.set(self)
        try:
            yield
        finally:
            _HANDOVER.reset(token)

    @property
    def takes(self) -> bool:
        """Whether this is the second pass."""
        return self._taken is not None

    def give(self, tensor: torch.Tensor) -> None:
        self.tensors.append(tensor)

    def take(self) -> torch.Tensor:
        assert self._taken is not None
        self._taken += 1
        return self.tensors[self._taken - 1]


_HANDOVER: ContextVar[Handover | None] = ContextVar("fastplug_handover", default=None)


def handover() -> Handover | None:
    """That of the recording in progress."""
    return None if torch.compiler.is_compiling() else _HANDOVER.get()


def checkpointing() -> str:
    """What takes the tensors that nodes save: ``"nothing"`` but themselves, ``"checkpointed"`` where the first pass of
    ``torch.utils.checkpoint`` throws them away, or other ``"hooks"``."""
    pack = _pack()
    if pack is None:
        return "nothing"
    first = getattr(pack, "__qualname__", None) == FIRST_HOOK and pack.__module__ == "torch.utils.checkpoint"
    return "checkpointed" if first else "hooks"


def graph_goes() -> bool:
    """Whether the backward that runs is the last one of its graph, so that what its nodes hold goes with them."""
    return not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()


def recomputing() -> bool:
    """Whether gradient checkpointing is computing a region again."""
    return _recomputation() is not None


def nodes_stay() -> bool:
    """Whether only the tensors that a node saves are thrown away and made again, by ``torch.utils.checkpoint``.

    The second pass makes them for the nodes of the first one. What those hold beside them is still there, so that the
    second pass need not make it; both passes have to save the same tensors, and both are told the same here.
    """
    if torch.compiler.is_compiling():
        return False
    hook = _recomputation()
    return checkpointing() == "checkpointed" if hook is None else not isinstance(hook, Countdown)


def first_asking() -> bool:
    """Whether nobody has asked this yet in the present pass of a region that ``torch.utils.checkpoint`` computes.

    What only one node of a region may keep is kept by the same one in both passes.
    """
    pack = _pack()  # each pass has one of its own
    if pack is None or pack in _ASKED:
        return False
    _ASKED.add(pack)
    return True


def tensors_left() -> int | None:
    """How many saved tensors the recomputation in progress still waits for before it stops.

    None when nothing is being recomputed, or when it would run on to the end of the region.
    """
    hook = _recomputation()
    if hook is None:
        return None
    if isinstance(hook, Countdown):
        return hook.total - hook.count  # type: ignore[operator]  # which has a total, or it would be no recomputation
    found = inspect.getclosurevars(hook).nonlocals
    frame = found["target_frame_ref"]()
    if frame is None or not frame.early_stop:
        return None
    return len(frame.weak_holders) - frame.recomp_counter[found["gid"]]  # type: ignore[no-any-return]


def _recomputation() -> Countdown | Callable[..., object] | None:
    """What takes the tensors that nodes save in a recomputation: a countdown, or ``torch.utils.checkpoint``'s hook.

    None where nothing is being recomputed, and while the compiler traces: it decides by itself what is computed again.
    """
    if torch.compiler.is_compiling():
        return None
    pack = _pack()
    if pack is None:
        return None
    countdown = getattr(pack, "__self__", None)
    if isinstance(countdown, Countdown):
        return None if countdown.total is None else countdown
    ours = getattr(pack, "__qualname__", None) == HOOK and pack.__module__ == "torch.utils.checkpoint"
    return pack if ours else None


def _pack() -> Callable[..., object] | None:
    """What takes the tensors that nodes save now, without what was wrapped around it; None: they keep them."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else inspect.unwrap(hooks[0])
