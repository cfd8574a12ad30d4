"""What the engine talks about: sites, the implementations that can serve them, and the runtime they share."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from fastplug.families import Family
from fastplug.ops.table import OpTable
from fastplug.options import Options

if TYPE_CHECKING:
    from fastplug.ops.lora.fp8_base import Fp8
    from fastplug.ops.lora.kept_weights import KeptWeights
    from fastplug.patching.report import Report
    from fastplug.quant import Codec

KEY = "_fastplug"  # the one attribute that a patched instance carries


@dataclass(frozen=True)
class Site:
    """One module that could be patched: its role, its name in the model, and the row that describes it."""

    role: str
    name: str
    module: nn.Module
    family: Family


@dataclass
class Runtime:
    """What all bindings of one ``apply`` share."""

    options: Options
    ops: OpTable
    codecs: Sequence[Codec]
    codec_of: dict[Any, Any] = field(default_factory=dict)
    graphs: Any = None  # fastplug.graphs.state.Shared, once a layer was asked
    offload: Any = None  # fastplug.memory.offload.Offloader, once a layer's input was offloaded
    memory: Any = None  # fastplug.memory.runtime.Planner, where the options ask for a plan
    fp8: Fp8 | None = None  # where base products are computed in FP8
    weights: KeptWeights | None = None  # decoded ones, where the options ask for them to be kept
    exact: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)  # linear modules that are left out

    def codec(self, linear: nn.Module) -> Codec | None:
        """The codec responsible for a linear module; the last one registered wins.

        Decided once per class of module and of weight: torchao leaves a layer's class and gives its weight another,
        compressed-tensors changes the weight's dtype.
        """
        weight = linear._parameters.get("weight")
        kind: Any = type(linear) if weight is None else (type(linear), type(weight), weight.dtype)
        if kind not in self.codec_of:
            matching = [codec for codec in self.codecs if codec.matches(linear)]
            self.codec_of[kind] = matching[-1] if matching else None
        return self.codec_of[kind]  # type: ignore[no-any-return]

    def spare(self) -> None:
        """Let go of what is held only for training steps to be faster: another call finds the memory."""
        if self.graphs is not None:
            self.graphs.steady.see(None)
        if self.memory is not None:
            self.memory.spare()
        if self.weights is not None:
            self.weights.let_go()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        return self  # holds no state of the model


@dataclass(frozen=True)
class NotCovered:
    """What a fast forward answers when it leaves a call to the original one.

    ``reason`` is None where that is the plan and not a loss (a single-token step of a generation, say).
    """

    reason: str | None = None


@dataclass
class Binding:
    """What a patched module carries: its original class and what its forward needs."""

    base: type[nn.Module]
    site_name: str
    family: Family
    runtime: Runtime
    implementation: str
    report: Report
    parameters: tuple[str, ...]  # the names of the original forward's parameters, self left out
    fallbacks: Counter[str] = field(default_factory=Counter)
    own_forward: Any = None  # a bound copy of the class's forward that the instance carried before
    stands_in_for: Any = None  # somebody else's forward of the instance, which runs where ours does not
    graphs: Any = None  # fastplug.graphs.state.LayerState: what was recorded of the layer; no copy takes it along
    memory: Any = None  # fastplug.memory.runtime.State: a decoder layer's place in the plan; no copy takes it along

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        from copy import deepcopy

        return Binding(
            self.base,
            self.site_name,
            self.family,
            self.runtime,
            self.implementation,
            deepcopy(self.report, memo),
            self.parameters,
            Counter(self.fallbacks),
            stands_in_for=deepcopy(self.stands_in_for, memo),
        )


FastForward = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """A forward that can replace that of a module with ``role``.

    Attributes:
        role: The role it serves.
        name: Its name in the report.
        forward: ``forward(module, binding, *args, **kwargs)``: the module's result, or :class:`NotCovered`, in which
            case the module's original forward runs on the same arguments.
        refuse: Given a site and the runtime, the reason why it cannot serve the site, or None.
        left_alone: Given a site and the runtime, why patching it would gain nothing there, or None.
        stands_in: Given a module, whether it takes the place of a forward that somebody else has put on it. That one
            runs where ``forward`` answers :class:`NotCovered`, and is back after ``undo``. Where there is none, such
            an implementation is not asked. None: it stands in for nobody's.
        priority: The highest that neither refuses nor leaves alone wins; the built-ins have 0.
    """

    role: str
    name: str
    forward: FastForward
    refuse: Callable[[Site, Runtime], str | None] = lambda site, runtime: None
    left_alone: Callable[[Site, Runtime], str | None] = lambda site, runtime: None
    stands_in: Callable[[nn.Module], bool] | None = None
    priority: int = 0

    def takes_over(self, module: nn.Module) -> bool:
        """Whether it stands in for a forward that is on this module now."""
        return self.stands_in is not None and self.stands_in(module)

    def concerns(self, module: nn.Module) -> bool:
        """Whether to ask it: one that stands in, only where it takes over or did so before."""
        bound: Binding | None = module.__dict__.get(KEY)
        return (
            self.stands_in is None
            or self.takes_over(module)
            or (bound is not None and bound.implementation == self.name)
        )


@dataclass(frozen=True)
class Choice:
    """What one implementation answered for one site: ``status`` is patched, refused or left alone."""

    implementation: Implementation
    status: str
    reason: str | None = None
