"""The kernels of a decoder layer, compiled side by side before its first step.

A layer has about fifteen, forward and backward, and Triton takes half a second for each, half of which it waits for an
assembler and, up to 3.6, a C compiler. So before the first layer of a kind runs, it runs once with launches that only
compile, in threads, forward and backward, on zeros of the batch's size: which kernels are launched depends on it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fastplug.graphs.layer_graph import Buffers, Compute, Exchange, KeptGraph, holders_of
from fastplug.graphs.state import Shared
from fastplug.ops import ahead
from fastplug.ops.recompute import Countdown, checkpointing
from fastplug.patching.sites import Binding
from fastplug.sharding import distributed

logger = logging.getLogger("fastplug")


def possible(device: torch.device) -> bool:
    """Whether layers on a device launch kernels that Triton is to compile in threads."""
    return device.type == "cuda" and ahead.possible()


def worthwhile(layer: nn.Module, binding: Binding, kwargs: dict[str, Any]) -> bool:
    """Whether a layer that is trained on may run once more, and take a little more memory: not under a budget, nor
    where weights are elsewhere until the layer runs, nor inside another backward."""
    x = kwargs["hidden_states"]
    if binding.memory is not None or binding.family.mixture or torch._C._current_graph_task_id() != -1:
        return False
    if not isinstance(kwargs.get("position_embeddings"), tuple) or checkpointing() == "hooks":
        return False
    if type(kwargs.get("attention_mask")) not in (type(None), torch.Tensor):
        return False  # a mask that is made when it is read
    if getattr(layer, "_is_fsdp_managed_module", False):
        return False
    return all(p.numel() and p.device == x.device and not distributed(p) for p in layer.parameters())


def compile_ahead(compute: Compute, layer: nn.Module, kwargs: dict[str, Any], shared: Shared) -> None:
    """Compile what ``compute`` of (x, cos, sin, mask) and its backward launch."""
    x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    devices = [x.device.index] if x.is_cuda else []
    shared.recording = True
    try:
        buffers = Buffers((x.detach(), cos, sin, kwargs.get("attention_mask")), x.shape[1])
        with torch.random.fork_rng(devices), Countdown(), ahead.compiling():
            KeptGraph(compute, buffers, Exchange(), True, holders_of(layer)).warm_up()
    except Exception as error:  # whatever it is, the step itself shows it, or does without
        logger.debug("fastplug: kernels were not compiled ahead: %s", error)
    finally:
        shared.recording = False
