"""When a decoder layer is recorded, replayed, or run as it is."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fastplug.graphs.compiling import compile_ahead, possible, worthwhile
from fastplug.graphs.layer_graph import KeptGraph, LayerGraph
from fastplug.graphs.nodes import Checkpointed, Kept
from fastplug.graphs.recorder import recorder_for
from fastplug.graphs.recording import computing, record
from fastplug.graphs.state import Key, LayerState, Shared
from fastplug.ops.document_attention import DocumentMask
from fastplug.ops.recompute import checkpointing
from fastplug.patching import caches
from fastplug.patching.packed import attention_is_stock
from fastplug.patching.sites import Binding, FastForward

LENGTHS = 4  # recorded sequence lengths of a layer
TILE = 64  # positions: recorded lengths are multiples of it
# Where the matrix products of a layer alone take longer than Python needs to launch it, a graph gains nothing: 6 ms, at
# the 400 TFLOP/s that an H100 reaches in bf16. Slower GPUs hide the launches sooner.
FLOPS = 400e12 * 6e-3
# In FP8 products take half the time, and what quantizes adds launches: at 4 x 2048 tokens an H200 took 308 ms for a
# replayed step of Llama-3.1-8B, 316 to 382 for one that was launched. Where products of the forward are exact, so that
# Python is ahead when the backward begins, only computing it again is such a burden: 392 and 395 ms without. Exact
# layers of such a length gain nothing: replayed 602 to 626 ms, checkpointed, launched 600 to 663 on a slow host.
FP8 = 4
INPUTS = {"hidden_states", "position_embeddings", "attention_mask", "mlp_memory"}
HARMLESS = {"position_ids", "cache_position", "use_cache"}  # not read without a cache, under a mask of this kind


def replayed(fast: FastForward) -> FastForward:
    """A decoder layer's fast forward that replays its launches where they are proven to be the same ones."""

    @functools.wraps(fast)
    def forward(layer: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fast(layer, binding, *args, **kwargs)
        shared = _shared(binding)
        ahead = shared.ahead and type(layer) not in shared.compiled
        off = shared.recorder is None or shared.off is not None
        if off and not ahead:
            return fast(layer, binding, *args, **kwargs)
        kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
        size = _size(layer, kwargs)
        if ahead and size is not None and not _watched() and worthwhile(layer, binding, kwargs):
            shared.compiled.add(type(layer))
            compile_ahead(computing(layer, binding, kwargs, fast), layer, kwargs, shared)
        if off:
            return fast(layer, binding, **kwargs)
        key = _key(layer, binding, kwargs, shared.device)
        shared.steady.see(size)
        graph = None if key is None else _graph(layer, binding, shared, key, kwargs, fast)
        if graph is None:
            return fast(layer, binding, **kwargs)
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        given = (x.detach(), cos, sin, kwargs.get("attention_mask"))
        tensors = (x, *(state[name] for state, name in graph.holders))
        node = Kept if isinstance(graph, KeptGraph) else Checkpointed
        out = node.apply(graph, binding.graphs.fingerprint.pointers_hold, given, *tensors)
        return (out,) if "output_attentions" in binding.parameters else out

    return forward


def padded_length(length: int) -> int:
    """The next length of a coarse grid: at most an eighth (below 512, 64 positions) is padding."""
    step = max(TILE, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _shared(binding: Binding) -> Shared:
    runtime = binding.runtime
    if runtime.graphs is None:
        on = runtime.options.graphs != "off"
        device = torch.device(binding.report.device)
        runtime.graphs = Shared(recorder_for(device) if on else None, device, ahead=possible(device))
    return runtime.graphs  # type: ignore[no-any-return]


def _size(layer: nn.Module, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Rows of a call and tokens of a row, if it is trained on."""
    x = kwargs.get("hidden_states")
    if not layer.training or not torch.is_grad_enabled() or not isinstance(x, torch.Tensor) or x.dim() != 3:
        return None
    return x.shape[0], x.shape[1]


def _key(layer: nn.Module, binding: Binding, kwargs: dict[str, Any], device: torch.device) -> Key | None:
    """What a recording of this call would hold for, but the sequence length; None if it cannot be recorded."""
    x, positions = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
    mask = kwargs.get("attention_mask")
    saving = checkpointing()
    if not layer.training or not torch.is_grad_enabled() or saving == "hooks" or _watched():
        return None
    if binding.family.mixture or not isinstance(x, torch.Tensor) or x.dim() != 3 or not isinstance(positions, tuple):
        return None  # the work of a mixture of experts depends on where its router sends the tokens
    if binding.family.query_scale is not None:
        return None  # a function of anything
    if x.device != device or (device.type == "cuda" and device.index != torch.cuda.current_device()):
        return None  # a graph belongs to one device, and is replayed on the current one
    for name, value in kwargs.items():
        idle = value is None or value is False or (name in caches.NAMES and caches.stands_in(value))
        if not idle and name not in INPUTS and name not in HARMLESS:
            return None
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 4):
        return None
    if mask is not None and (type(mask) is DocumentMask or mask.shape[2:] != (x.shape[1], x.shape[1])):
        return None  # where documents begin differs from row to row, and launches depend on it
    attention: Any = getattr(layer, binding.family.attention_name)
    dropout: float = getattr(attention, "attention_dropout", 0.0)
    if dropout or not attention_is_stock(attention.config):
        return None  # another function may read what a recording does not see, such as the positions
    return (
        saving,
        x.shape[0],
        x.dtype,
        x.requires_grad,
        positions[0].shape[0],
        positions[0].dtype,
        None if mask is None else (mask.dtype, *mask.shape[:2]),
        torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type),
        torch.are_deterministic_algorithms_enabled(),
        kwargs.get("mlp_memory"),
    )


def _watched() -> bool:
    """Whether something watches or changes the ops as they run: a capture, modes, anomaly detection."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_anomaly_enabled()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _graph(
    layer: nn.Module, binding: Binding, shared: Shared, key: Key, kwargs: dict[str, Any], fast: FastForward
) -> LayerGraph | None:
    """The recording to replay for this call, made if its time has come."""
    state: LayerState | None = binding.graphs
    if state is None:
        state = binding.graphs = LayerState.of(layer)
    batch, length = kwargs["hidden_states"].shape[:2]
    operations = 4 * batch * length * state.weights
    limit = FLOPS * (FP8 if _fp8(binding, key[0] == "checkpointed") else 1)
    asked = binding.runtime.options.graphs == "on"
    steady = operations > FLOPS and key[0] != "checkpointed" and not asked
    if state.off or not (operations <= limit or asked) or (steady and shared.steady.off):
        return None
    if not state.fingerprint.holds(layer):
        state.renew(layer)
    if state.off or (state.dropout and key[0] == "checkpointed"):  # two replays draw two masks
        return None
    lengths = None
    if key[0] != "checkpointed":
        lengths = shared.lengths_of(layer, steady, lend=binding.memory is None)
        lengths.settle()
    known = state.graphs.setdefault(key, [])
    # Where the GPU is busy anyway, padding takes more time than a replay spares.
    padded = padded_length(length) if operations <= FLOPS else -(-length // TILE) * TILE
    longest = 2 * length if operations <= FLOPS and len(known) >= LENGTHS else padded
    graph = _fitting(known, length, longest)
    if graph is not None:
        return None if isinstance(graph, KeptGraph) and graph.busy else graph
    if not state.comes_again((key, padded), shared.steady.era if steady else None) or len(known) >= LENGTHS:
        return None
    among = None if lengths is None else lengths.open((batch, padded))
    if lengths is not None and among is None:
        return None
    graph = record(layer, binding, shared, (key, padded), kwargs, fast, steady, among)
    if graph is not None:
        known.append(graph)
        if among is not None and isinstance(graph, KeptGraph):
            among.add(state, graph)
        if steady:
            shared.steady.layers.append((state, key))
    elif not (steady and shared.steady.off):  # for want of memory short calls are recorded all the same
        state.off = True
    return graph


def _fp8(binding: Binding, again: bool) -> bool:
    """Whether products of the forward, computed once or ``again``, are in FP8, without a memory budget: plans count
    recordings of short steps only."""
    compute = binding.runtime.options.compute
    return (compute == "fp8" or (again and compute == "fp8_backward")) and binding.memory is None


def _fitting(known: list[LayerGraph], length: int, longest: int) -> LayerGraph | None:
    """The shortest recording that holds ``length``, if it is not longer than ``longest``."""
    fitting = min((graph for graph in known if graph.length >= length), key=lambda graph: graph.length, default=None)
    return fitting if fitting is not None and fitting.length <= longest else None


__all__ = ["replayed"]
