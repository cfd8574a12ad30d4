"""Which implementation of each op runs on a device.

An implementation is a module (or object) that offers the op's functions on plain tensors; ``reference.py`` and
``kernel.py`` of an op are two such modules. The autograd Functions run on whatever the table holds.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastplug.devices import kernel_reason
from fastplug.manager import hookimpl

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OpImplementation:
    """One way to compute an op.

    Attributes:
        op: The op's name: ``rms_norm``, ``rope``, ``glu``, ``nf4``, ``logprobs``.
        name: The implementation's own name, as the report shows it.
        functions: The object that offers the op's functions, or the name of the module that does.
        refuse: Given a device, the reason why this implementation cannot run there, or None.
        priority: The highest priority that does not refuse wins. The built-ins have 0 (reference) and 10 (Triton).
    """

    op: str
    name: str
    functions: Any
    refuse: Callable[[torch.device], str | None] = lambda device: None
    priority: int = 0

    def load(self) -> Any:
        return importlib.import_module(self.functions) if isinstance(self.functions, str) else self.functions


class OpTable:
    """The chosen implementation of every op, as attributes: ``table.rms_norm.forward(...)``."""

    rms_norm: Any
    rope: Any
    glu: Any
    nf4: Any
    logprobs: Any

    def __init__(self, chosen: Iterable[OpImplementation]) -> None:
        self.names: dict[str, str] = {}
        for implementation in chosen:
            self.names[implementation.op] = implementation.name
            setattr(self, implementation.op, implementation.load())

    def __deepcopy__(self, memo: dict[int, Any]) -> OpTable:
        return self  # holds modules only


def choose(implementations: Sequence[OpImplementation], device: torch.device, kernels: str = "auto") -> OpTable:
    """The table for ``device``; ``kernels`` forces ``"triton"`` or ``"reference"`` among the built-ins."""
    best: dict[str, OpImplementation] = {}
    for implementation in implementations:
        if implementation.name in ("triton", "reference") and implementation.name != wanted(kernels, device):
            continue
        if implementation.refuse(device) is not None:
            continue
        current = best.get(implementation.op)
        if current is None or implementation.priority >= current.priority:
            best[implementation.op] = implementation
    return OpTable(best.values())


def wanted(kernels: str, device: torch.device) -> str:
    """Which built-in implementation ``Options.kernels`` means on a device.

    Triton's interpreter makes the kernels run on a CPU too, thousands of times slower: only on request.
    """
    if kernels == "auto":
        return "reference" if device.type == "cpu" or kernel_reason(device) else "triton"
    return kernels


TRITON_OPS = ("rms_norm", "rope", "glu", "nf4", "logprobs")


@hookimpl
def fastplug_ops() -> list[OpImplementation]:
    reference = [OpImplementation(op, "reference", f"fastplug.ops.{op}.reference") for op in TRITON_OPS]
    triton = [
        OpImplementation(op, "triton", f"fastplug.ops.{op}.kernel", refuse=kernel_reason, priority=10)
        for op in TRITON_OPS
    ]
    return reference + triton


@functools.cache
def table_for(device: torch.device, kernels: str = "auto", plugins: bool = True) -> OpTable:
    """The op table of a device, cached."""
    from fastplug.manager import manager

    return choose(manager(plugins).collect("fastplug_ops"), device, kernels)
