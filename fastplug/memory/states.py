"""What optimizers will keep for the parameters of a model, before they have stepped for the first time.

A first plan has to leave room for the optimizer's states, which come with its first step. No host hands its optimizer
over, but in every one it exists before the first forward, so it is looked for among all objects of the process. Where
none is found (a model that is tried out, DeepSpeed, which trains copies), the states of an AdamW are assumed, and no
budget is refused on their account.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastplug.memory.meter import local_bytes
from fastplug.optimizers import OptimizerInBackward

ADAMW = 2  # states for each number that is trained
STATES = {
    **dict.fromkeys(("adam", "adamw", "nadam", "radam", "adamax", "adadelta", "rprop", "lamb"), ADAMW),
    **dict.fromkeys(("lion", "adagrad", "asgd", "rmsprop"), 1),
    **dict.fromkeys(("sgd", "muon", "lars", "adafactor"), 0),  # Adafactor's rows and columns are next to nothing
    "ademamix": 3,
}
"""Name of an optimizer, without what follows in :data:`KINDS` -> states as large as the parameter."""
KINDS = ("paged", "fused", "8bit", "32bit", "4bit", "fp8")
MORE = ("amsgrad", "momentum", "centered", "beta1")  # settings of a group that add a state
EIGHT_BITS, FOUR_BITS = 1 + 4 / 256, 0.5 + 4 / 128  # bytes of a number, its share of an fp32 scale included
SMALLEST = 4096  # elements from which bitsandbytes quantizes states
PAGE = 100_000  # elements from which it keeps them in pages, which the host's memory has room for


@dataclass(frozen=True)
class States:
    """What optimizers keep.

    Attributes:
        missing: Bytes of states that are not there yet.
        certain: Whether these are those of an optimizer that was found, and not assumed.
        in_backward: Whether gradients are used within the backward that makes them, and do not pile up.
    """

    missing: int
    certain: bool
    in_backward: bool = False


class Optimizers:
    """The optimizers that train these parameters, as soon as there are any.

    Args:
        trained: The parameters.
        device: Where states count; those of parameters elsewhere (FSDP's on the CPU) do not.
    """

    def __init__(self, trained: Iterable[nn.Parameter], device: torch.device) -> None:
        self._trained = [weakref.ref(parameter) for parameter in trained]
        self._device = device.type
        self._found: list[weakref.ref[torch.optim.Optimizer]] = []

    def states(self) -> States:
        """What they keep. The first time, and while none is found, it looks at all objects: tenths of a second."""
        trained = [parameter for parameter in (reference() for reference in self._trained) if parameter is not None]
        alive = [optimizer for optimizer in (reference() for reference in self._found) if optimizer is not None]
        if not alive:
            alive = _optimizers_of(trained)
            self._found = [weakref.ref(optimizer) for optimizer in alive]
        if not alive:
            here = [parameter for parameter in trained if parameter.device.type == self._device]
            return States(ADAMW * sum(local_bytes(parameter) for parameter in here), certain=False)
        missing: dict[nn.Parameter, int] = {}
        certain = True
        for optimizer in alive:
            for parameter, size in _missing(_innermost(optimizer), self._device).items():
                certain &= size is not None and parameter not in missing  # of two, one may be of an earlier run
                size = ADAMW * local_bytes(parameter) if size is None else size
                missing[parameter] = max(size, missing.get(parameter, 0))
        return States(sum(missing.values()), certain, all(_in_backward(optimizer) for optimizer in alive))


def _optimizers_of(trained: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Those that have any of the parameters, without those that another one wraps."""
    wanted = set(map(id, trained))
    every = [found for found in gc.get_objects() if issubclass(type(found), torch.optim.Optimizer)]
    chosen = [
        optimizer
        for optimizer in every
        if any(id(parameter) in wanted for group in _groups(optimizer) for parameter in group["params"])
    ]
    wrapped = {id(inner) for inner in map(_inner, chosen) if inner is not None}
    return [optimizer for optimizer in chosen if id(optimizer) not in wrapped]


def _inner(optimizer: Any) -> torch.optim.Optimizer | None:
    """What Accelerate's, Lightning's or fastplug's optimizer wraps."""
    own = getattr(optimizer, "__dict__", {})
    found = own.get("optimizer", own.get("_optimizer"))
    return found if isinstance(found, torch.optim.Optimizer) else None


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    inner = _inner(optimizer)
    return optimizer if inner is None else _innermost(inner)


def _in_backward(optimizer: torch.optim.Optimizer) -> bool:
    if isinstance(optimizer, OptimizerInBackward):
        return optimizer.accumulation_steps == 1
    inner = _inner(optimizer)
    return inner is not None and _in_backward(inner)


def _groups(optimizer: Any) -> list[Mapping[str, Any]]:
    """Its parameter groups; an optimizer that is not made yet has none."""
    try:
        return list(optimizer.param_groups)
    except AttributeError:
        return []


def _missing(optimizer: Any, device: str) -> dict[nn.Parameter, int | None]:
    """Parameter -> bytes of its states that are still to come; None if the optimizer is not known."""
    return {
        parameter: 0 if optimizer.state.get(parameter) else _bytes(optimizer, group, parameter)
        for group in _groups(optimizer)
        for parameter in group["params"]
        if parameter.requires_grad and parameter.device.type == device
    }


def _bytes(optimizer: Any, group: Mapping[str, Any], parameter: nn.Parameter) -> int | None:
    kind, library = type(optimizer).__name__.lower(), type(optimizer).__module__.split(".")[0]
    name = kind
    for part in KINDS:
        name = name.replace(part, "")
    count = STATES.get(name)
    if count is None:
        return None
    count += sum(bool(group.get(setting)) for setting in MORE)
    elements = local_bytes(parameter) / parameter.element_size()
    size = float(parameter.element_size())
    if library == "bitsandbytes":
        bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
        size = EIGHT_BITS if bits == 8 and elements >= SMALLEST else 4.0
        if getattr(optimizer, "is_paged", False) and elements >= PAGE and parameter.device.type == "cuda":
            size = 0.0
    elif library == "torchao":
        size = FOUR_BITS if "4bit" in kind else EIGHT_BITS
    return int(elements * count * size)


__all__ = ["Optimizers", "States"]
