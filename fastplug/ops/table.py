"""Which implementation of each op runs on a device.

An implementation is a module (or object) that offers the op's functions on plain tensors; ``reference.py`` and
``kernel.py`` of an op are two such modules. The autograd Functions run on whatever the table holds.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastplug.devices import kernel_reason
from fastplug.errors import OptionError
from fastplug.manager import hookimpl

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("fastplug")


@dataclass(frozen=True)
class OpImplementation:
    """One way to compute an op.

    Attributes:
        op: The op's name: ``rms_norm``, ``rope``, ``glu``, ``nf4``, ``int_weights``, ``float_weights``, ``logprobs``.
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
    """The chosen implementation of every op, as attributes: ``table.rms_norm.forward(...)``.

    ``names`` says which it is, and what has given way to the reference since.
    """

    rms_norm: Any
    rope: Any
    glu: Any
    nf4: Any
    int_weights: Any
    float_weights: Any
    logprobs: Any
    fp8: Any
    low_rank: Any
    column_dots: Any
    scaling: Any
    adapted_glu: Any
    adapted_rope: Any
    adapter_matrices: Any
    adapter_gradients: Any

    def __init__(self, chosen: Iterable[OpImplementation]) -> None:
        self.names: dict[str, str] = {}
        for implementation in chosen:
            op, functions = implementation.op, implementation.load()
            self.names[op] = implementation.name
            if implementation.name != "reference" and op in TRITON_OPS:
                functions = Guarded(functions, importlib.import_module(f"fastplug.ops.{op}.reference"), op, self.names)
            setattr(self, op, functions)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpTable:
        return self  # holds modules only


class Guarded:
    """The functions of an implementation, each of which gives way to the reference's where it cannot serve.

    That is for fp64, which the kernels would compute in fp32, and from then on where the device is too small: Triton
    finds out when it launches a kernel that it needs more shared memory or registers than a GPU has; nothing has been
    written by then.
    """

    def __init__(self, functions: Any, reference: Any, op: str, names: dict[str, str]) -> None:
        self._functions = functions
        for name in dir(functions):
            function, fallback = getattr(functions, name), getattr(reference, name, None)
            if callable(function) and callable(fallback) and not name.startswith("_"):
                setattr(self, name, self._guarded(name, function, fallback, op, names))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_functions"], name)

    def _guarded(
        self, name: str, function: Callable[..., Any], fallback: Callable[..., Any], op: str, names: dict[str, str]
    ) -> Callable[..., Any]:
        import torch

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if args and getattr(args[0], "dtype", None) is torch.float64:
                return fallback(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # Triton's, in whichever of its modules it lives
                    raise
                reason = f"{name} runs the reference, the device is too small for the kernel ({error})"
            logger.warning("fastplug: %s.%s", op, reason)
            names[op] += f"; {reason}"
            setattr(self, name, fallback)
            return fallback(*args, **kwargs)

        return guarded


def choose(implementations: Sequence[OpImplementation], device: torch.device, kernels: str = "auto") -> OpTable:
    """The table for ``device``; ``kernels`` forces ``"triton"`` or ``"reference"`` among the built-ins.

    Raises:
        OptionError: Triton is asked for and cannot run there.
    """
    reason = kernel_reason(device) if kernels == "triton" else None
    if reason is not None:
        raise OptionError(f"fastplug: kernels='triton' is not possible on {device}: {reason}; leave kernels='auto'")
    best: dict[str, OpImplementation] = {}
    for implementation in implementations:
        if implementation.name in BUILTIN and implementation.name not in wanted(kernels, device):
            continue
        if implementation.refuse(device) is not None:
            continue
        current = best.get(implementation.op)
        if current is None or implementation.priority >= current.priority:
            best[implementation.op] = implementation
    return OpTable(best.values())


def wanted(kernels: str, device: torch.device) -> tuple[str, ...]:
    """Which built-in implementations ``Options.kernels`` means on a device.

    Triton's interpreter makes the kernels run on a CPU too, thousands of times slower: only on request.
    """
    if kernels != "auto":
        return (kernels,)
    if device.type == "cpu":
        return ("reference", "bitsandbytes")
    return ("reference",) if kernel_reason(device) else ("triton",)


BUILTIN = ("reference", "triton", "bitsandbytes")
TRITON_OPS = (
    "rms_norm",
    "rope",
    "glu",
    "nf4",
    "int_weights",
    "float_weights",
    "logprobs",
    "fp8",
    "low_rank",
    "column_dots",
    "scaling",
    "adapted_glu",
    "adapted_rope",
    "adapter_matrices",
    "adapter_gradients",
)


@hookimpl
def fastplug_ops() -> list[OpImplementation]:
    reference = [OpImplementation(op, "reference", f"fastplug.ops.{op}.reference") for op in TRITON_OPS]
    triton = [
        OpImplementation(op, "triton", f"fastplug.ops.{op}.kernel", refuse=kernel_reason, priority=10)
        for op in TRITON_OPS
    ]
    library = OpImplementation(
        "nf4", "bitsandbytes", "fastplug.ops.nf4.bitsandbytes_cpu", refuse=_no_library, priority=5
    )
    return [*reference, library, *triton]


def _no_library(device: torch.device) -> str | None:
    from fastplug.ops.nf4.bitsandbytes_cpu import reason

    return "bitsandbytes' decoding is used on a CPU only" if device.type != "cpu" else reason()


@functools.cache
def table_for(device: torch.device, kernels: str = "auto", plugins: bool = True) -> OpTable:
    """The op table of a device, cached."""
    from fastplug.manager import manager

    return choose(manager(plugins).collect("fastplug_ops"), device, kernels)
