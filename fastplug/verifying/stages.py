"""A decoder layer, or the head with its loss, as a function of the hidden states that enter it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastplug.patching.sites import Runtime
from fastplug.verifying.judge import cast, widened
from fastplug.verifying.restore import SEED

AutocastState = tuple[str, torch.dtype, bool]


@dataclass
class Call:
    """One call of a layer in the original run.

    Attributes:
        x: The hidden states that entered, [B, S, hidden].
        args, kwargs: The other arguments.
        autocast: Device type, dtype and whether autocast was on.
        upstream: The gradient of the loss with respect to the layer's output, or None if none arrived.
        output: What it returned.
    """

    x: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: AutocastState
    output: torch.Tensor
    upstream: torch.Tensor | None = None


@dataclass
class Outcome:
    """What a stage computed: its output, the gradient of its input, and that of each trainable parameter by name."""

    output: torch.Tensor
    input_gradient: torch.Tensor | None
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)


@dataclass
class Stage:
    """A part of the model that can run alone.

    Attributes:
        name: Its name in the model.
        parts: The modules it consists of, by name relative to the model.
        function: The output [B, S, hidden], or the loss, for hidden states and the modules to use, by name.
        autocast: The state under which the original ran.
    """

    name: str
    parts: dict[str, nn.Module]
    function: Callable[[torch.Tensor, Mapping[str, nn.Module]], torch.Tensor]
    autocast: AutocastState

    def parameters(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
        named = ((f"{part}.{name}", p) for part, module in parts.items() for name, p in module.named_parameters())
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def run(self, x: torch.Tensor, upstream: torch.Tensor) -> Outcome:
        """Forward and backward of the modules as they are bound now."""
        kind, dtype, enabled = self.autocast
        with torch.autocast(kind, dtype, enabled=enabled):
            return self._run(x, upstream, self.parts)

    def wide_parts(self, dtype: torch.dtype, runtime: Runtime) -> dict[str, nn.Module]:
        return {name: widened(part, dtype, runtime) for name, part in self.parts.items()}

    def run_wide(self, x: torch.Tensor, upstream: torch.Tensor, parts: Mapping[str, nn.Module]) -> Outcome:
        """Forward and backward of wide copies of the modules."""
        dtype = next(p.dtype for part in parts.values() for p in part.parameters())
        with torch.autocast(self.autocast[0], enabled=False):
            return self._run(x.to(dtype), upstream.to(dtype), parts)

    def forward_wide(self, x: torch.Tensor, parts: Mapping[str, nn.Module]) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(self.autocast[0], enabled=False):
            torch.manual_seed(SEED)
            return self.function(x, parts)

    def _run(self, x: torch.Tensor, upstream: torch.Tensor, parts: Mapping[str, nn.Module]) -> Outcome:
        parameters = self.parameters(parts)
        torch.manual_seed(SEED)
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            output = self.function(x, parts)
            dx, *grads = torch.autograd.grad(
                output, [x, *parameters.values()], upstream.to(output.dtype), allow_unused=True
            )
        return Outcome(output.detach(), dx, dict(zip(parameters, grads)))


def layer_stage(name: str, layer: nn.Module, call: Call) -> Stage:
    def function(x: torch.Tensor, parts: Mapping[str, nn.Module]) -> torch.Tensor:
        args, kwargs = (call.args, call.kwargs) if parts[name] is layer else cast((call.args, call.kwargs), x.dtype)
        return first(parts[name](x, *args, **kwargs))

    return Stage(name, {name: layer}, function, call.autocast)


def head_stage(
    name: str,
    causal: nn.Module,
    base_name: str,
    layers_name: str,
    batch: dict[str, Any],
    autocast: AutocastState,
) -> Stage:
    """Everything after the last decoder layer: the model's own forward, with its list of layers empty meanwhile."""
    base = getattr(causal, base_name)
    embeddings = base.get_input_embeddings()
    prefix = f"{name}." if name else ""
    owners = {f"{prefix}{base_name}.{key}": (base, key) for key in base._modules if key != layers_name}
    owners.update({f"{prefix}{key}": (causal, key) for key in causal._modules if key != base_name})
    parts = {
        part: owner._modules[key] for part, (owner, key) in owners.items() if owner._modules[key] is not embeddings
    }

    def function(x: torch.Tensor, used: Mapping[str, nn.Module]) -> torch.Tensor:
        swaps = [(base, layers_name, nn.ModuleList()), *((*owners[part], used[part]) for part in used)]
        with replaced(swaps):
            return causal(inputs_embeds=x, **batch).loss  # type: ignore[no-any-return]

    return Stage(name or type(causal).__name__, parts, function, autocast)  # type: ignore[arg-type]


@contextlib.contextmanager
def replaced(swaps: list[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Other children in place of a module's own; the order of the children stays."""
    before: list[tuple[nn.Module, str, nn.Module | None]] = [
        (owner, name, owner._modules[name]) for owner, name, _ in swaps
    ]
    try:
        for owner, name, child in swaps:
            owner._modules[name] = child
        yield
    finally:
        for owner, name, own in before:
            owner._modules[name] = own


@contextlib.contextmanager
def captured(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Record the first call of every layer, and the gradient that arrives at its output."""
    calls: dict[str, Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            output = first(output)
            if name not in calls:
                rest = dict(kwargs)
                x = args[0] if args else rest.pop("hidden_states")
                calls[name] = Call(x.detach(), args[1:], rest, autocast_state(x.device), output.detach())
            if output.requires_grad:  # also the second call, of a recomputation
                output.register_hook(lambda gradient: setattr(calls[name], "upstream", gradient.detach()))

        return hook

    handles = [layer.register_forward_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def autocast_state(device: torch.device) -> AutocastState:
    return device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)


def first(output: Any) -> torch.Tensor:
    """The hidden states of a layer's output, which is a tuple up to transformers 4.55."""
    return output[0] if isinstance(output, tuple) else output
