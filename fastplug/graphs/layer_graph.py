"""One decoder layer recorded for one shape: a forward graph, a backward graph, and the tensors between them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


class Recorder(Protocol):
    """Records a function's launches. CUDA graphs, or in tests a stand-in that calls the function again."""

    devices: list[int]  # whose random number generators a warm-up must leave alone

    def record(self, function: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """The function's results, and a call that computes them again in the same tensors."""

    def ready(self) -> AbstractContextManager[None]:
        """Where everything that belongs to a recording runs."""

    def memory(self) -> tuple[int, int]:
        """(bytes allocated, bytes free)."""


class CUDARecorder:
    """CUDA graphs on a stream of their own that share one memory pool.

    They may share it because nothing but tensors that stay referenced lives from one replay to another.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.devices = [device.index or 0]
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            results = function()
        finally:
            graph.capture_end()
        return results, graph.replay

    def memory(self) -> tuple[int, int]:
        allocated = torch.cuda.memory_allocated(self.device)
        unused = torch.cuda.memory_reserved(self.device) - allocated
        return allocated, torch.cuda.mem_get_info(self.device)[0] + unused

    @contextmanager
    def ready(self) -> Iterator[None]:
        """On the recording stream, after everything that is queued."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


class LayerGraph:
    """The graphs of one layer for inputs [batch, length, hidden], ``length`` being a padded sequence length.

    Args:
        compute: The layer's fast forward of (x, cos, sin, mask).
        x, cos, sin, mask: Inputs like those it will get; only shapes (but the length), dtypes and devices count.
        length: The padded length.
        holders: (module ``_parameters``, name) of every parameter that gets a gradient.
    """

    def __init__(
        self,
        compute: Compute,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        length: int,
        holders: Sequence[tuple[dict[str, nn.Parameter | None], str]],
    ) -> None:
        self.compute = compute
        self.length = length
        self.x = x.new_zeros(x.shape[0], length, x.shape[2])
        self.cos, self.sin = (t.new_zeros(t.shape[0], length, t.shape[2]) for t in (cos, sin))
        self.mask = None if mask is None else mask.new_empty(*mask.shape[:2], length, length)
        self.x.requires_grad_(x.requires_grad)
        self.holders = holders
        self.filled = -1  # the sequence length that the inputs hold, beyond which they are padding
        self.run = 0  # which forward the activations belong to
        self._owner: weakref.ref[Any] | None = None

    # --- recording ------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Once eagerly: kernels are compiled and libraries choose theirs outside of a recording."""
        self._fill(self.length)
        parameters = self._aliases()
        out = self._compute(parameters)
        torch.autograd.grad(out, self._inputs(parameters), torch.zeros_like(out), allow_unused=True)

    def record(self, recorder: Recorder) -> None:
        """Record both graphs. The autograd graph in between is kept: it holds the activations."""
        self._fill(self.length)
        parameters = self._aliases()

        def forward() -> list[torch.Tensor]:
            self._out = self._compute(parameters)
            return [self._out]

        def backward() -> list[torch.Tensor]:
            inputs = self._inputs(parameters)
            found = torch.autograd.grad(self._out, inputs, self.g, retain_graph=True, allow_unused=True)
            self._used = [grad is not None for grad in found]
            return [grad for grad in found if grad is not None]

        (out,), self._forward = recorder.record(forward)
        self.out = out.detach()
        self.g = torch.zeros_like(self.out)
        grads, self._backward = recorder.record(backward)
        found = iter(grad.detach() for grad in grads)
        every = [next(found) if used else None for used in self._used]
        self.dx = every.pop(0) if self.x.requires_grad else None
        self.grads = every
        self.filled = -1

    def _aliases(self) -> list[nn.Parameter]:
        """Parameters of the same memory that are leaves of this recording alone.

        A parameter's own accumulation node belongs to another stream, and DDP hangs its hooks there.
        """
        parameters = (state[name] for state, name in self.holders)
        return [nn.Parameter(parameter.detach()) for parameter in parameters if parameter is not None]

    def _compute(self, aliases: list[nn.Parameter]) -> torch.Tensor:
        """The layer's output while its modules hold the aliases."""
        originals = [state[name] for state, name in self.holders]
        try:
            for (state, name), alias in zip(self.holders, aliases):
                state[name] = alias
            return self.compute(self.x, self.cos, self.sin, self.mask)
        finally:
            for (state, name), original in zip(self.holders, originals):
                state[name] = original

    def _inputs(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        return [self.x, *parameters] if self.x.requires_grad else [*parameters]

    # --- replaying ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether the activations still wait for a backward."""
        return self._owner is not None and self._owner() is not None

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None, owner: object
    ) -> torch.Tensor:
        """The layer's output for x [batch, S, hidden] with S <= length; ``owner`` lives until its backward is done."""
        S = x.shape[1]
        if self.filled != S:
            self._fill(S)
        targets, sources = [self.x.detach()[:, :S], self.cos[:, :S], self.sin[:, :S]], [x, cos, sin]
        torch._foreach_copy_(targets, sources)
        if self.mask is not None and mask is not None:
            self.mask[:, :, :S, :S].copy_(mask)
        self._forward()
        self.run += 1
        self._owner = weakref.ref(owner)
        return self.out[:, :S].clone()

    def backward(self, g: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of x and of the parameters, in tensors of their own."""
        S = g.shape[1]
        self.g[:, :S].copy_(g)
        self._backward()
        self._owner = None
        dense = [grad for grad in self.grads if grad is not None]
        copies = iter(torch._foreach_mul(dense, 1) if dense else ())
        dx = None if self.dx is None else self.dx[:, :S].clone()
        return dx, [None if grad is None else next(copies) for grad in self.grads]

    def _fill(self, S: int) -> None:
        """Make everything beyond S padding: zero inputs and gradients, seen by no one, seeing one position."""
        if self.length > S:
            self.x.detach()[:, S:].zero_()
            if hasattr(self, "g"):
                self.g[:, S:].zero_()
        if self.mask is not None:
            hidden, seen = (False, True) if self.mask.dtype == torch.bool else (torch.finfo(self.mask.dtype).min, 0)
            self.mask.fill_(hidden)
            self.mask[:, :, :, 0] = seen
        self.filled = S


class _Owner:
    """Lives as long as the autograd node of one forward."""


class Replay(torch.autograd.Function):
    """A replayed layer as one autograd node of x and the layer's trained parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        graph: LayerGraph,
        pointers_hold: Callable[[], bool],
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        owner = _Owner()
        out = graph.forward(x.detach(), cos, sin, mask, owner)
        ctx.graph, ctx.run, ctx.owner, ctx.pointers_hold = graph, graph.run, owner, pointers_hold
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        graph: LayerGraph = ctx.graph
        if ctx.run != graph.run:
            raise RuntimeError(
                "fastplug: a second backward through a decoder layer came after another forward of it had reused its "
                "activations; apply fastplug with graphs='off' where one forward is differentiated twice"
            )
        if ctx.pointers_hold():
            dx, grads = graph.backward(g)
        else:  # weights were moved after the forward: what was recorded would read freed memory
            dx, grads = _eagerly(graph, g)
        ctx.owner = None
        return None, None, dx, None, None, None, *grads


def _eagerly(graph: LayerGraph, g: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    S = g.shape[1]
    x = graph.x.detach()[:, :S].requires_grad_(graph.x.requires_grad)
    mask = None if graph.mask is None else graph.mask[:, :, :S, :S]
    parameters = [p for p in (state[name] for state, name in graph.holders) if p is not None]
    with torch.enable_grad():
        out = graph.compute(x, graph.cos[:, :S], graph.sin[:, :S], mask)
    inputs = [x, *parameters] if x.requires_grad else parameters
    found = list(torch.autograd.grad(out, inputs, g, allow_unused=True))
    return (found.pop(0) if x.requires_grad else None), found
