"""When a decoder layer is recorded, replayed, or run as it is."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastplug.graphs.fingerprint import Fingerprint
from fastplug.graphs.layer_graph import Buffers, CheckpointedGraph, KeptGraph, LayerGraph
from fastplug.graphs.nodes import Checkpointed, Kept
from fastplug.graphs.recorder import Memory, Recorder, recorder_for
from fastplug.ops.document_attention import DocumentMask
from fastplug.ops.recompute import Countdown, checkpointing
from fastplug.patching import caches
from fastplug.patching.packed import attention_is_stock
from fastplug.patching.sites import Binding, FastForward, NotCovered

logger = logging.getLogger("fastplug")

EAGER_CALLS = 2  # calls of a shape before it is recorded: what does not come again is not worth it
LENGTHS = 4  # recorded sequence lengths of a layer
TILE = 64  # positions: recorded lengths are multiples of it
CHANGES = 8  # after so many changes between calls a layer is not static
SHARE = 0.25  # of the memory that is free when recording begins
# Where the matrix products of a layer alone take longer than Python needs to launch it, a graph gains nothing: 6 ms, at
# the 400 TFLOP/s that an H100 reaches in bf16. Slower GPUs hide the launches sooner.
FLOPS = 400e12 * 6e-3
# In FP8 products take half the time, and what quantizes adds launches; computing again what was not kept adds as many
# as the forward has. Keeping is another matter: the recordings of long steps would hold all activations for good. Exact
# checkpointed layers of that length gain nothing either: at 4 x 2048 tokens an H200 took 602 to 626 ms for a replayed
# step of Llama-3.1-8B, and 600 to 663 for one that a host launched which was slow for a while.
FP8_AGAIN = 4
INPUTS = {"hidden_states", "position_embeddings", "attention_mask", "mlp_memory"}
HARMLESS = {"position_ids", "cache_position", "use_cache"}  # not read without a cache, under a mask of this kind

Key = tuple[Any, ...]


@dataclass
class Shared:
    """What the layers of one ``apply`` share."""

    recorder: Recorder | None
    device: torch.device
    off: str | None = None  # why nothing is recorded any more
    recording: bool = False
    warmed: set[Any] = field(default_factory=set)
    buffers: dict[Any, Buffers] = field(default_factory=dict)  # of layers under gradient checkpointing


@dataclass
class LayerState:
    """What one layer has recorded. It hangs on the layer's binding, so that an undo frees it."""

    fingerprint: Fingerprint
    weights: int  # elements of the layer's matrices
    dropout: bool
    calls: Counter[Any] = field(default_factory=Counter)
    graphs: dict[Key, list[LayerGraph]] = field(default_factory=dict)
    changes: int = 0
    off: bool = False

    @classmethod
    def of(cls, layer: nn.Module) -> LayerState:
        sharded = getattr(layer, "_is_fsdp_managed_module", False)  # its weights lie elsewhere at every call
        return cls(Fingerprint(layer), _weights(layer), _drops(layer), off=sharded)

    def renew(self, layer: nn.Module) -> None:
        """Forget what was recorded: the layer is another now."""
        self.fingerprint, self.dropout = Fingerprint(layer), _drops(layer)
        self.calls.clear()
        self.graphs.clear()
        self.changes += 1
        self.off = self.changes > CHANGES


class Uncovered(Exception):
    """The fast forward left a call that was to be recorded to the original one."""


def replayed(fast: FastForward) -> FastForward:
    """A decoder layer's fast forward that replays its launches where they are proven to be the same ones."""

    @functools.wraps(fast)
    def forward(layer: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
        shared = _shared(binding)
        if shared.recorder is None or shared.off is not None:
            return fast(layer, binding, *args, **kwargs)
        kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
        key = _key(layer, binding, kwargs, shared.device)
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
        runtime.graphs = Shared(recorder_for(device) if on else None, device)
    return runtime.graphs  # type: ignore[no-any-return]


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
        idle = value is None or value is False or (name in caches.NAMES and type(value).__name__ == "StepCache")
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
    """Whether something watches or changes the ops as they run: tracing, a capture, modes, anomaly detection."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
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
    limit = FLOPS * (FP8_AGAIN if key[0] == "checkpointed" and _fp8(binding) else 1)
    short = operations <= limit or binding.runtime.options.graphs == "on"
    if state.off or not short:
        return None
    if not state.fingerprint.holds(layer):
        state.renew(layer)
    if state.off or (state.dropout and key[0] == "checkpointed"):  # two replays draw two masks
        return None
    known = state.graphs.setdefault(key, [])
    # Where the GPU is busy anyway, padding takes more time than a replay spares.
    padded = padded_length(length) if operations <= FLOPS else -(-length // TILE) * TILE
    longest = 2 * length if operations <= FLOPS and len(known) >= LENGTHS else padded
    graph = _fitting(known, length, longest)
    if graph is not None:
        return None if isinstance(graph, KeptGraph) and graph.busy else graph
    state.calls[key, padded] += 1
    if state.calls[key, padded] <= EAGER_CALLS or len(known) >= LENGTHS:
        return None
    graph = _record(layer, binding, shared, (key, padded), kwargs, fast)
    if graph is None:
        state.off = True
    else:
        known.append(graph)
    return graph


def _fp8(binding: Binding) -> bool:
    """Whether products are in FP8, without a memory budget: plans count recordings of short steps only."""
    return binding.runtime.options.compute != "exact" and binding.memory is None


def _fitting(known: list[LayerGraph], length: int, longest: int) -> LayerGraph | None:
    """The shortest recording that holds ``length``, if it is not longer than ``longest``."""
    fitting = min((graph for graph in known if graph.length >= length), key=lambda graph: graph.length, default=None)
    return fitting if fitting is not None and fitting.length <= longest else None


def _record(
    layer: nn.Module, binding: Binding, shared: Shared, shape: Any, kwargs: dict[str, Any], fast: FastForward
) -> LayerGraph | None:
    def compute(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        result = fast(layer, binding, hidden_states=x, position_embeddings=(cos, sin), attention_mask=mask, **told)
        if type(result) is NotCovered:
            raise Uncovered(result.reason)
        return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]

    told = {name: kwargs[name] for name in ("mlp_memory",) if name in kwargs}
    recorder = shared.recorder
    assert recorder is not None
    x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    holders = [
        (module._parameters, name)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    shared.recording = True
    try:
        with recorder.ready(), Countdown():  # in place of the hooks of torch.utils.checkpoint
            before = recorder.memory()
            given = (x, cos, sin, kwargs.get("attention_mask"))
            graph: KeptGraph | CheckpointedGraph
            if shape[0][0] == "checkpointed":
                if shape not in shared.buffers:
                    shared.buffers[shape] = Buffers(given, shape[1])
                graph = CheckpointedGraph(compute, shared.buffers[shape], x.requires_grad, holders)
            else:
                graph = KeptGraph(compute, Buffers(given, shape[1]), x.requires_grad, holders)
            if (type(layer), shape) not in shared.warmed:
                with torch.random.fork_rng(recorder.devices):
                    graph.warm_up()
                recorder.trim()
            graph.record(recorder)
            if (type(layer), shape) not in shared.warmed:
                _check_memory(before, recorder.memory(), binding)
            shared.warmed.add((type(layer), shape))
    except Uncovered:
        return None
    except (RuntimeError, MemoryError) as error:  # the step goes on as it would without graphs
        shared.off = f"CUDA graphs are off: recording {binding.site_name} failed: {str(error).splitlines()[0]}"
        binding.report.notes.append(shared.off)
        logger.warning("fastplug: %s", shared.off)
        return None
    finally:
        shared.recording = False
    return graph


def _check_memory(before: Memory, after: Memory, binding: Binding) -> None:
    """Raise ``MemoryError`` if recordings of all layers would take too much of what is free: what each holds, and what
    all share."""
    layers = sum(decision.role == "decoder_layer" for decision in binding.report.decisions)
    own = after.allocated - before.allocated
    needed = layers * own + max(0, after.reserved - before.reserved - own)
    if needed > SHARE * before.free:
        free = before.free / 2**30
        raise MemoryError(f"it would take {needed / 2**30:.1f} GiB of the {free:.1f} GiB that are free")


def _weights(layer: nn.Module) -> int:
    """Elements of the layer's matrices, 4-bit ones counted as decoded, adapters left out."""
    return sum(
        module.in_features * module.out_features
        for module in layer.modules()
        if isinstance(module, nn.Linear) and min(module.in_features, module.out_features) > 256
    )


def _drops(layer: nn.Module) -> bool:
    """Whether anything in it may draw random numbers: a dropout module, or a probability for a function."""
    for module in layer.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return True
        if any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            return True
    return False


__all__ = ["Shared", "replayed"]
