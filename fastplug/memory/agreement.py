"""All ranks of a run plan from the same numbers.

A plan is a function of the shape of a micro-batch and of a few numbers (:class:`~fastplug.memory.calibration.Agreed`).
Ranks agree on the numbers and not on the plan: then ranks with equal shapes have equal plans, a rank whose batch has
another shape plans for it alone, and nothing has to be exchanged when it does.

Ranks agree at the beginning of their first, second, fourth, eighth ... forward of the model under DDP, FSDP or
DeepSpeed, counted on each. These exchange tensors for every micro-batch, or for every few of them whose number is the
same on all ranks. So all ranks come to the same count, or the run would stand still without fastplug as well. No other
event leads to an exchange: not a new shape, not a rank that ran out of memory (it lowers its own plan until the next
agreement, which is right, if slower for all), not an evaluation. Where DDP's ``join`` lets ranks end early, where
DeepSpeed splits layers or stages over ranks, and where models are trained side by side, each rank plans for itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from fastplug.sharding import own_class

LOCAL = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
"""Where torchrun and Accelerate, DeepSpeed, Open MPI, MPICH and Slurm say how many ranks a host runs."""


def due(forwards: int) -> bool:
    """Whether ranks agree at the beginning of this forward, counted from 1: at powers of two."""
    return forwards & (forwards - 1) == 0


def group_of(layer: nn.Module) -> Any:
    """The process group that trains the model of this layer in the forward that runs now; None for one rank alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    ddp: Any = nn.parallel.DistributedDataParallel._active_ddp_module  # type: ignore[attr-defined]
    if ddp is not None:
        return None if ddp._join_config.enable else ddp.process_group
    if getattr(layer, "_is_fsdp_managed_module", False) or own_class(type(layer)) is not type(layer):
        return dist.group.WORLD
    return dist.group.WORLD if _deepspeed_trains() else None


def _deepspeed_trains() -> bool:
    """Whether this is the forward of a DeepSpeed engine whose ranks all run the whole model.

    It leaves no mark on the model or its parameters, but its own forward is among the calling frames.
    """
    frame = sys._getframe() if "deepspeed" in sys.modules else None
    while frame is not None:
        engine = frame.f_locals.get("self")
        kinds = {kind.__name__ for kind in type(engine).__mro__}
        if "DeepSpeedEngine" in kinds:
            return "PipelineEngine" not in kinds and getattr(engine, "mpu", None) is None
        frame = frame.f_back
    return False


def ranks_here() -> int:
    """How many ranks of this run share the memory of this host."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return 1
    world = dist.get_world_size()
    for name in LOCAL:
        said = os.environ.get(name, "")
        if said.isdigit() and int(said) > 0:
            return min(int(said), world)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min(devices, world) if devices > 1 else world  # else all of them may be here


def highest(values: Sequence[float], device: torch.device, group: Any) -> list[float]:
    """The highest of each value over the ranks of a group; every rank must call this."""
    if group is None:
        return [float(value) for value in values]
    on = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=on)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return [float(value) for value in tensor.tolist()]


__all__ = ["due", "group_of", "highest", "ranks_here"]
