"""A decoder layer as one autograd node around its own graph, which can be dropped and computed again.

The backward of :class:`Layer` asks the inner graph for gradients with ``torch.autograd.grad`` and hands them on only
when all of them are there. What a layer keeps is its inner graph; dropping it means letting go of that graph and
computing it again from the layer's input when its gradients are asked for, with the random numbers and the autocast
state of the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from fastplug.memory.oom import Room, retried
from fastplug.memory.policy import Policy
from fastplug.patching.sites import NotCovered

Compute = Callable[[torch.Tensor], Any]
Fetch = Callable[[], torch.Tensor]


class Record:
    """One forward of one layer that waits for its backward.

    Args:
        room: Where it can be dropped.
        policy: What the layer keeps.
        compute: The layer's forward, for when it is computed again.
        x: Its input; not held on to where the policy keeps that in host memory.
        held: Bytes that dropping it frees.
        index: The layer's place among the layers.
    """

    def __init__(
        self, room: Room, policy: Policy, compute: Compute, x: torch.Tensor, held: int, index: int = 0
    ) -> None:
        self.room, self.compute, self.held, self.policy, self.index = room, compute, held, policy, index
        self.x = None if policy.offloads else x.detach()
        self.fetch: Fetch | None = None  # gets the input from where an offloading policy has put it
        self.needs_dx = x.requires_grad
        self._replay = _Surroundings(x.device)
        self._edge: Any = None
        self._wanted: list[Any] = []
        self.out: torch.Tensor | None = None
        self.backward_marks: Callable[[bool], None] | None = None
        self._busy = False
        self.done = False  # its backward has run

    def set(self, out: torch.Tensor, entering: torch.Tensor, leaves: list[torch.Tensor]) -> None:
        """Take the inner graph: from ``entering`` and the layer's trained tensors to ``out``."""
        self._edge, self.out = get_gradient_edge(out), out
        self._wanted = [get_gradient_edge(entering), *leaves] if self.needs_dx else [*leaves]

    def drop(self) -> bool:
        """Let go of what the layer keeps, if it keeps more than its input; whether it did."""
        if self._busy or self._edge is None or self.x is None or self.policy is Policy.RESIDUAL:
            return False
        self._edge = None
        return True

    def gradients(self, g: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradient of the layer's input, if it needs one, and those of the leaves."""
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if self.done:
            raise RuntimeError(
                "fastplug: a second backward through a decoder layer, whose tensors the first one has freed; give "
                "retain_graph=True to the first"
            )
        self._busy = True
        try:
            found = retried(self.room, lambda: self._gradients(g, keep))
        finally:
            self._busy = False
        self.room.backwards += 1
        if not keep:  # the node lives as long as the loss does
            self.done, self._edge, self._wanted, self.x, self.fetch = True, None, [], None, None
            self.compute = _gone
        return found

    def _gradients(self, g: torch.Tensor, keep: bool) -> list[torch.Tensor | None]:
        if self._edge is None:
            self._compute_again()
        edge = self._edge
        if not keep:  # what a failure half-way has freed cannot be used again
            self._edge = None
        return list(torch.autograd.grad(edge, self._wanted, g, retain_graph=keep, allow_unused=True))

    def _compute_again(self) -> None:
        x = self.x
        if x is None:
            assert self.fetch is not None
            x = self.fetch()
        leaves = self._wanted[1:] if self.needs_dx else self._wanted
        x = x.detach().requires_grad_(self.needs_dx)
        with self._replay.again(), torch.enable_grad():
            entering = Entry.apply(x) if self.needs_dx else x
            out = self.compute(entering)
        if type(out) is NotCovered:
            raise RuntimeError(
                "fastplug: a decoder layer whose tensors were dropped when memory ran out cannot be computed again, "
                f"because the model was changed between forward and backward: {out.reason}"
            )
        self.set(out[0] if isinstance(out, tuple) else out, entering, leaves)
        self.out = None


def _gone(x: torch.Tensor) -> Any:
    raise AssertionError("the backward has run")


class Entry(torch.autograd.Function):
    """The input as the first node of a layer's graph: gradients are asked for here, whether or not it is a leaf."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class Layer(torch.autograd.Function):
    """A decoder layer as one node of its input and its trained tensors, which autograd adds their gradients to."""

    @staticmethod
    def forward(ctx: Any, record: Record, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.set_materialize_grads(False)
        out, record.out = record.out, None
        assert out is not None
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[Any, ...]:
        record: Record = ctx.record
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        if record.backward_marks is not None:
            record.backward_marks(True)
        found = record.gradients(g)
        if record.backward_marks is not None:
            record.backward_marks(False)
        return None, *([] if record.needs_dx else [None]), *found


def guarded(
    room: Room,
    policy: Policy,
    compute: Compute,
    again: Compute,
    x: torch.Tensor,
    held: int,
    index: int = 0,
    observe: Callable[[bool], None] | None = None,
    pack: Callable[[torch.Tensor], Fetch] | None = None,
) -> Any:
    """``compute(x)`` for a layer's input x [batch, length, hidden], such that running out of memory is handled.

    Args:
        room: Where the layer can be dropped.
        policy: What it keeps.
        compute: Its forward under that policy; may answer ``NotCovered``, before it changed anything.
        again: Its forward for when it was dropped: the same numbers.
        x: Its input.
        held: Bytes that dropping it frees.
        index: The layer's place among the layers.
        observe: Called with True before its backward and with False after it.
        pack: Under an offloading policy, a way to get back the input from the host's memory.
    """
    record = Record(room, policy, again, x, held, index)
    entering: torch.Tensor = x

    def work() -> Any:
        nonlocal entering
        entering = Entry.apply(x) if x.requires_grad else x
        with record._replay.first_or_again():
            return compute(entering)

    result = retried(room, work)
    out = result[0] if isinstance(result, tuple) and len(result) == 1 else result
    if not isinstance(out, torch.Tensor) or not out.requires_grad:
        return result
    leaves = leaves_of(out, entering)
    if any(leaf._backward_hooks for leaf in leaves):  # they would see each gradient twice
        return result
    record.set(out, entering, leaves)
    record.backward_marks = observe
    if record.x is None and pack is not None:
        record.fetch = pack(entering)
    room.add(record)
    out = Layer.apply(record, x, *leaves)
    return (out,) if isinstance(result, tuple) else out


def leaves_of(out: torch.Tensor, entering: torch.Tensor) -> list[torch.Tensor]:
    """The leaves that require a gradient in the graph between ``entering`` and ``out``, in a fixed order."""
    stop = entering.grad_fn
    found: dict[int, torch.Tensor] = {}
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node is stop or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the node that accumulates into a leaf
        if variable is not None:
            found[id(variable)] = variable
        stack.extend(next_node for next_node, _ in node.next_functions)
    return list(found.values())


class _Surroundings:
    """Random numbers and autocast as they are now, for a forward that is computed again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kinds = {"cpu", device.type}
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(self._kinds)
        }
        self._cache = torch.is_autocast_cache_enabled()
        self._first = True

    @contextmanager
    def first_or_again(self) -> Iterator[None]:
        """As it is the first time; put back, without a return to what came in between, when tried again."""
        if not self._first:
            self._restore()
        self._first = False
        yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was, until the end."""
        cpu = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state(self._device) if self._cuda is not None else None
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype, enabled, self._cache))
            self._restore()
            try:
                yield
            finally:
                torch.set_rng_state(cpu)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, self._device)

    def _restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


__all__ = ["Fetch", "Record", "guarded"]
