"""A replayed layer as one autograd node of x and the layer's trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastplug.graphs.layer_graph import CheckpointedGraph, Given, KeptGraph


class _Owner:
    """Lives as long as the node of one forward."""


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graph: KeptGraph, pointers_hold: Callable[[], bool], given: Given, *tensors: torch.Tensor
    ) -> torch.Tensor:
        owner = _Owner()
        out = graph.forward(given, owner)
        ctx.graph, ctx.run, ctx.owner, ctx.pointers_hold = graph, graph.run, owner, pointers_hold
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        graph: KeptGraph = ctx.graph
        if ctx.run != graph.run:
            raise RuntimeError(
                "fastplug: a second backward through a decoder layer came after its activations had been written over; "
                "apply fastplug with graphs='off' where one forward is differentiated twice"
            )
        dx, grads = graph.backward(g, ctx.pointers_hold())
        ctx.owner = None  # before the next forward, which may be of another length
        return None, None, None, dx, *grads


class Checkpointed(torch.autograd.Function):
    """Saves nothing that ``torch.utils.checkpoint`` would see, so that it has nothing to compute again."""

    @staticmethod
    def forward(
        ctx: Any, graph: CheckpointedGraph, pointers_hold: Callable[[], bool], given: Given, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.graph, ctx.given, ctx.pointers_hold = graph, given, pointers_hold
        out, ctx.handed = graph.forward(given)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        graph: CheckpointedGraph = ctx.graph
        if ctx.pointers_hold():
            dx, grads = graph.backward(ctx.given, ctx.handed, g)
        else:
            dx, grads = graph.eagerly(ctx.given, g)
        return None, None, None, dx, *grads
