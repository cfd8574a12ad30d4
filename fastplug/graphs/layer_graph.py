"""One decoder layer recorded for one shape: a forward graph, a backward graph, and the tensors around them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastplug.graphs.lengths import Length
from fastplug.graphs.recorder import Recorder
from fastplug.ops.recompute import Countdown, Handover

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]  # x, cos, sin, mask
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
Holders = Sequence[tuple[dict[str, "nn.Parameter | None"], str]]
Gradients = tuple["torch.Tensor | None", list["torch.Tensor | None"]]


class Exchange:
    """What is written just before a replay or read just after it, so that all layers share it: the gradient g of the
    output, the gradient dx of the input, and, where layers keep nothing, the output, each [batch, length, hidden]; and
    the gradients of parameters.
    """

    g: torch.Tensor
    dx: torch.Tensor
    out: torch.Tensor

    def __init__(self) -> None:
        self.filled = -1  # the sequence length up to which g is filled, beyond which there is padding
        self._gradients: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    @property
    def empty(self) -> bool:
        return not hasattr(self, "g")

    def fit(self, x: torch.Tensor, out: torch.Tensor, keeps: bool) -> None:
        """Make room for tensors like these, once; not for the output, if each layer ``keeps`` its own."""
        if self.empty:
            self.g, self.dx = torch.zeros_like(out), torch.zeros_like(x)
            if not keeps:
                self.out = torch.zeros_like(out)

    def take(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients of parameters, where those of all layers with parameters of these sizes lie."""
        sizes = tuple((gradient.shape, gradient.dtype) for gradient in gradients)
        if sizes not in self._gradients:
            self._gradients[sizes] = [torch.empty_like(gradient) for gradient in gradients]
        if gradients:
            torch._foreach_copy_(self._gradients[sizes], gradients)
        return self._gradients[sizes]

    @property
    def nbytes(self) -> int:
        """What it takes of the device's memory."""
        own = [tensor for tensor in vars(self).values() if isinstance(tensor, torch.Tensor)]
        return sum(tensor.nbytes for tensor in itertools.chain(own, *self._gradients.values()))

    def set_gradient(self, g: torch.Tensor) -> None:
        S = g.shape[1]
        if self.filled != S:
            self.g[:, S:].zero_()
            self.filled = S
        self.g[:, :S].copy_(g)


class Buffers:
    """What a recording reads: x [batch, length, hidden], cos and sin, and the mask.

    Args:
        given: Inputs like those that will come; only shapes (but the length), dtypes and devices count.
        length: The padded sequence length.
    """

    shared = False  # whether others write over x from one forward to the next

    def __init__(self, given: Given, length: int) -> None:
        x, cos, sin, mask = given
        self.length = length
        self.x = x.new_empty(x.shape[0], length, x.shape[2])
        self.cos, self.sin = (t.new_empty(t.shape[0], length, t.shape[2]) for t in (cos, sin))
        self.mask = None if mask is None else mask.new_empty(*mask.shape[:2], length, length)
        self.pad(0)

    @property
    def nbytes(self) -> int:
        """What they take of the device's memory."""
        return sum(tensor.nbytes for tensor in (self.x, self.cos, self.sin, self.mask) if tensor is not None)

    def set(self, given: Given) -> None:
        x, cos, sin, mask = given
        S = x.shape[1]
        if self.filled != S:
            self.pad(S)
        elif self.shared and self.length > S:
            self.x[:, S:].zero_()
        torch._foreach_copy_([self.x[:, :S], self.cos[:, :S], self.sin[:, :S]], [x, cos, sin])
        if self.mask is not None and mask is not None:
            self.mask[:, :, :S, :S].copy_(mask)

    def pad(self, S: int) -> None:
        """Make everything beyond S padding: zero inputs, seen by no one, seeing one position."""
        if self.length > S:
            for tensor in (self.x, self.cos, self.sin):
                tensor[:, S:].zero_()
        if self.mask is not None:
            hidden, seen = (False, True) if self.mask.dtype == torch.bool else (torch.finfo(self.mask.dtype).min, 0)
            self.mask.fill_(hidden)
            self.mask[:, :, :, 0] = seen
        self.filled = S  # the sequence length that is filled, beyond which there is padding

    def move(self) -> list[torch.Tensor]:
        """Have x lie where things are allocated now, with nothing in it."""
        self.x, self.filled, self.shared = torch.zeros_like(self.x), -1, True
        return [self.x]


def holders_of(layer: nn.Module) -> Holders:
    """(module ``_parameters``, name) of every parameter in a layer that gets a gradient."""
    return [
        (module._parameters, name)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


class LayerGraph:
    """What both ways of recording have in common.

    Args:
        compute: The layer's fast forward of (x, cos, sin, mask).
        buffers: What it reads.
        exchange: What it gives, and g; :meth:`warm_up` of the first layer makes room there.
        needs_dx: Whether x gets a gradient.
        holders: See :func:`holders_of`.
    """

    def __init__(
        self, compute: Compute, buffers: Buffers, exchange: Exchange, needs_dx: bool, holders: Holders
    ) -> None:
        self.compute, self.buffers, self.exchange = compute, buffers, exchange
        self.needs_dx, self.holders = needs_dx, holders
        self.length = buffers.length

    def warm_up(self) -> None:
        """Once eagerly: kernels are compiled and libraries choose theirs outside of a recording."""
        aliases = self._aliases()
        x = self.buffers.x.detach().requires_grad_(self.needs_dx)
        out = self._compute(x, aliases)
        self.exchange.fit(x, out, isinstance(self, KeptGraph))
        torch.autograd.grad(out, self._wanted(x, aliases), torch.zeros_like(out), allow_unused=True)

    def eagerly(self, given: Given, g: torch.Tensor) -> Gradients:
        """The gradients without the recording."""
        x, cos, sin, mask = given
        x = x.detach().requires_grad_(self.needs_dx)
        parameters = [p for p in (state[name] for state, name in self.holders) if p is not None]
        with torch.enable_grad():
            out = self.compute(x, cos, sin, mask)
        found: list[torch.Tensor | None] = list(
            torch.autograd.grad(out, self._wanted(x, parameters), g, allow_unused=True)
        )
        return (found.pop(0) if self.needs_dx else None), found

    def _aliases(self) -> list[nn.Parameter]:
        """Parameters of the same memory that are leaves of this recording alone.

        A parameter's own accumulation node belongs to another stream, and DDP hangs its hooks there.
        """
        parameters = (state[name] for state, name in self.holders)
        return [nn.Parameter(parameter.detach()) for parameter in parameters if parameter is not None]

    def _compute(self, x: torch.Tensor, aliases: list[nn.Parameter]) -> torch.Tensor:
        """The layer's output while its modules hold the aliases."""
        originals = [state[name] for state, name in self.holders]
        try:
            for (state, name), alias in zip(self.holders, aliases):
                state[name] = alias
            return self.compute(x, self.buffers.cos, self.buffers.sin, self.buffers.mask)
        finally:
            for (state, name), original in zip(self.holders, originals):
                state[name] = original

    def _wanted(self, x: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        return [x, *parameters] if self.needs_dx else [*parameters]

    def _keep(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Note which gradients there are, and return those, where all layers have them."""
        self._used = [grad is not None for grad in grads]
        found = [grad for grad in grads if grad is not None]
        dx = [self.exchange.dx.copy_(found.pop(0))] if self.needs_dx and self._used[0] else []
        return dx + self.exchange.take(found)

    def _sort(self, grads: list[torch.Tensor]) -> None:
        """The recorded gradients as dx and one or None per parameter."""
        remaining = iter(grad.detach() for grad in grads)
        every = [next(remaining) if used else None for used in self._used]
        self.dx = every.pop(0) if self.needs_dx else None
        self.grads = every

    def _copies(self, S: int) -> Gradients:
        """Gradients in tensors of their own: autograd may keep what it is given as ``.grad``."""
        dense = [grad for grad in self.grads if grad is not None]
        copies = iter(torch._foreach_mul(dense, 1) if dense else ())
        dx = None if self.dx is None else self.dx[:, :S].clone()
        return dx, [None if grad is None else next(copies) for grad in self.grads]


class KeptGraph(LayerGraph):
    """Activations stay where the forward left them until the backward: one place, so one forward at a time.

    Attributes:
        among: The recordings of all layers for this length.
        order: How many were recorded in the same memory before, this one included.
        run: Which forward the activations belong to; another number once they are used up.
    """

    among: Length
    order: int
    run = 0
    _owner: weakref.ref[object] | None = None
    _out: torch.Tensor | None = None

    def record(self, recorder: Recorder) -> None:
        """The autograd graph between the two is kept: it holds the activations."""
        aliases, exchange = self._aliases(), self.exchange
        if self.among.lengths.lend:  # x is lent with the activations; nothing of this is replayed
            _, self._moved = recorder.record(self.buffers.move)
        x = self.buffers.x.detach().requires_grad_(self.needs_dx)

        def forward() -> list[torch.Tensor]:
            out = self._out = self._compute(x, aliases)
            return [out]

        def backward() -> list[torch.Tensor]:
            wanted = self._wanted(x, aliases)
            assert self._out is not None
            return self._keep(torch.autograd.grad(self._out, wanted, exchange.g, retain_graph=True, allow_unused=True))

        (out,), self._forward = recorder.record(forward)
        self.out = out.detach()
        grads, self._backward = recorder.record(backward)
        self._sort(grads)
        self.order = self.among.pool.recorded()

    def lend(self, recorder: Recorder) -> None:
        """Let others be recorded where this lies: nothing is held any more, it is only known where it is."""
        self._out = None
        self.out, self.buffers.x = recorder.view(self.out), recorder.view(self.buffers.x)

    @property
    def waits(self) -> bool:
        """Whether the activations wait for a backward."""
        return self._owner is not None and self._owner() is not None

    @property
    def busy(self) -> bool:
        """Whether this cannot be replayed now: it waits for a backward itself, or would write over what does."""
        return self.among.lengths.bars(self)

    def forward(self, given: Given, owner: object) -> torch.Tensor:
        """The layer's output for x [batch, S, hidden] with S <= length; ``owner`` lives until its backward is done."""
        self.among.pool.wait(self.order, self.among, owner)
        self.buffers.set(given)
        self._forward()
        self.run += 1
        self._owner = weakref.ref(owner)
        return self.out[:, : given[0].shape[1]].clone()

    def backward(self, g: torch.Tensor, pointers_hold: bool) -> Gradients:
        """Gradients of x and of the parameters, once for each forward: others may write over the activations then.

        Eagerly where weights were moved after the forward, so that a replay would read freed memory, and where it would
        write over what waits for its own backward.
        """
        latest = self.among.pool.latest()
        if pointers_hold and (latest is None or latest.order <= self.order):
            self.exchange.set_gradient(g)
            self._backward()
            found = self._copies(g.shape[1])
        else:
            found = self.eagerly(self.given(g.shape[1]), g)
        self._owner = None
        self.run += 1
        return found

    def given(self, S: int) -> Given:
        """The inputs of the last forward."""
        b = self.buffers
        return b.x[:, :S], b.cos[:, :S], b.sin[:, :S], None if b.mask is None else b.mask[:, :, :S, :S]


class CheckpointedGraph(LayerGraph):
    """Nothing stays but what the first pass hands over: the backward graph begins with the layer's forward, without its
    last product.

    All layers share the buffers, and through the recorder's pool all activations.
    """

    def record(self, recorder: Recorder) -> None:
        aliases, exchange = self._aliases(), self.exchange
        x = self.buffers.x.detach().requires_grad_(self.needs_dx)
        saved, handover = Countdown(), Handover()
        with saved, handover.first():  # how many tensors the layer saves, to know the last one when recording
            self._compute(x, aliases)

        def forward() -> list[torch.Tensor]:
            with torch.no_grad(), handover.first():
                exchange.out.copy_(self._compute(x, aliases))
            return list(handover.tensors)

        def backward() -> list[torch.Tensor]:
            handover.tensors[:] = self._handed
            with Countdown(saved.count), handover.second():
                out = self._compute(x, aliases)
            return self._keep(torch.autograd.grad(out, self._wanted(x, aliases), exchange.g, allow_unused=True))

        self._handed, self._forward = recorder.record(forward)
        grads, self._backward = recorder.record(backward)
        self._sort(grads)

    def forward(self, given: Given) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The layer's output for x [batch, S, hidden] with S <= length, and what its backward wants to have back."""
        self.buffers.set(given)
        self._forward()
        return self.exchange.out[:, : given[0].shape[1]].clone(), [tensor.clone() for tensor in self._handed]

    def backward(self, given: Given, handed: list[torch.Tensor], g: torch.Tensor) -> Gradients:
        """Gradients of x and of the parameters, for the inputs of some forward and what it handed over."""
        self.buffers.set(given)
        self.exchange.set_gradient(g)
        if handed:
            torch._foreach_copy_(self._handed, handed)
        self._backward()
        return self._copies(g.shape[1])
