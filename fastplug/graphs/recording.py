"""How a decoder layer is recorded: with what, into which memory, and what happens where that fails."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fastplug.graphs.layer_graph import (
    Buffers,
    CheckpointedGraph,
    Compute,
    Exchange,
    KeptGraph,
    LayerGraph,
    holders_of,
)
from fastplug.graphs.lengths import Length
from fastplug.graphs.recorder import Memory, Recorder
from fastplug.graphs.state import Key, Shared
from fastplug.ops.recompute import Countdown
from fastplug.patching.sites import Binding, FastForward, NotCovered

logger = logging.getLogger("fastplug")

SHARE = 0.25  # of the memory that is free when recording begins


class Uncovered(Exception):
    """The fast forward left a call that was to be recorded to the original one."""


def computing(layer: nn.Module, binding: Binding, kwargs: dict[str, Any], fast: FastForward) -> Compute:
    """The layer's output as a function of x, cos, sin and the mask.

    It raises :class:`Uncovered` where the fast forward leaves such a call to the original one.
    """

    def compute(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        result = fast(layer, binding, hidden_states=x, position_embeddings=(cos, sin), attention_mask=mask, **told)
        if type(result) is NotCovered:
            raise Uncovered(result.reason)
        return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]

    told = {name: kwargs[name] for name in ("mlp_memory",) if name in kwargs}
    return compute


def record(
    layer: nn.Module,
    binding: Binding,
    shared: Shared,
    shape: tuple[Key, int],
    kwargs: dict[str, Any],
    fast: FastForward,
    steady: bool,
    among: Length | None,
) -> LayerGraph | None:
    """Record a layer for a shape: ``steady``, until another one comes, and, where activations stay, ``among`` the other
    layers. None if that fails."""
    compute = computing(layer, binding, kwargs, fast)
    recorder, exchange = _place(shared, shape, among)
    x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    holders = holders_of(layer)
    first = (type(layer), shape) not in shared.warmed or exchange.empty
    shared.recording = True
    try:
        with recorder.ready(), Countdown():  # in place of the hooks of torch.utils.checkpoint
            before, common = recorder.memory(), exchange.nbytes
            given = (x, cos, sin, kwargs.get("attention_mask"))
            graph: KeptGraph | CheckpointedGraph
            if among is None:
                if shape not in shared.buffers:
                    shared.buffers[shape] = Buffers(given, shape[1])
                    common -= shared.buffers[shape].nbytes
                graph = CheckpointedGraph(compute, shared.buffers[shape], exchange, x.requires_grad, holders)
            else:
                graph = KeptGraph(compute, Buffers(given, shape[1]), exchange, x.requires_grad, holders)
                graph.among = among
            if first:
                with torch.random.fork_rng(recorder.devices):
                    graph.warm_up()
                recorder.trim()
            graph.record(recorder)
            if first:
                _check_memory(before, recorder.memory(), exchange.nbytes - common, binding)
            shared.warmed.add((type(layer), shape))
    except Uncovered:
        return None
    except (RuntimeError, MemoryError) as error:  # the step goes on as it would without graphs
        _give_up(binding, shared, error, steady)
        return None
    finally:
        shared.recording = False
    return graph


def _place(shared: Shared, shape: tuple[Key, int], among: Length | None) -> tuple[Recorder, Exchange]:
    """What to record with, and what the layers of a shape share."""
    assert shared.recorder is not None
    (saving, batch, dtype, *_, autocast, _deterministic, _tiles), length = shape
    recorder, exchanges = shared.recorder, shared.exchanges
    if among is not None:
        recorder, exchanges = among.pool.recorder, among.exchanges
    return recorder, exchanges.setdefault((saving, batch, dtype, autocast, length), Exchange())


def _give_up(binding: Binding, shared: Shared, error: Exception, steady: bool) -> None:
    """Record no more, or, where only the memory is too little for long steps, none of those."""
    why = str(error).splitlines()[0]
    if steady:
        shared.steady.let_go()
    if steady and isinstance(error, MemoryError):
        shared.steady.off = True
        binding.report.notes.append(f"long steps are launched layer by layer, not replayed as CUDA graphs: {why}")
        return
    shared.off = f"CUDA graphs are off: recording {binding.site_name} failed: {why}"
    binding.report.notes.append(shared.off)
    logger.warning("fastplug: %s", shared.off)


def _check_memory(before: Memory, after: Memory, common: int, binding: Binding) -> None:
    """Raise ``MemoryError`` if recordings of all layers would take too much of what is free: what each holds, and what
    all share, of which ``common`` bytes were made in between."""
    layers = sum(decision.role == "decoder_layer" for decision in binding.report.decisions)
    own = after.allocated - before.allocated - common
    needed = layers * own + max(0, after.reserved - before.reserved - own)
    if needed > SHARE * before.free:
        free = before.free / 2**30
        raise MemoryError(f"it would take {needed / 2**30:.1f} GiB of the {free:.1f} GiB that are free")
