"""Adapted projections of a module whose forward runs as it is: those that read one tensor are computed as one group.

For the time of a call, each projection's forward is stood in for. The first that is called on a tensor computes its
group; the others, called on the same tensor, take their parts. One that is called on another tensor is computed alone,
so a group that does not hold costs time and no right number.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastplug.ops.lora.linear import lora_linear
from fastplug.patching.bind import FEW_TOKENS
from fastplug.patching.forwards.blocks import read_group
from fastplug.patching.inspection import global_hooks
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site


class Shared:
    """One group of projections during one call of the module that holds them."""

    def __init__(self, module: nn.Module, names: Sequence[str], runtime: Runtime, fallbacks: Counter[str]) -> None:
        self.module, self.runtime, self.fallbacks = module, runtime, fallbacks
        self.children: dict[str, nn.Module] = {name: getattr(module, name) for name in names}
        self.x: torch.Tensor | None = None
        self.version = 0
        self.parts: dict[str, torch.Tensor] = {}

    def install(self) -> None:
        for name, child in self.children.items():
            child.__dict__["forward"] = self._stand_in(name)

    def remove(self) -> None:
        for child in self.children.values():
            child.__dict__.pop("forward", None)

    def _stand_in(self, name: str) -> Any:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            child = self.children[name]
            if args or kwargs or not isinstance(x, torch.Tensor) or not _worthwhile(x):
                return type(child).forward(child, x, *args, **kwargs)
            if self.x is x and self.version == x._version and name in self.parts:
                return self.parts.pop(name)
            names = tuple(self.children) if self.x is not x else (name,)
            if not self._compute(names, x) and (len(names) == 1 or not self._compute((name,), x)):
                return type(child).forward(child, x)
            return self.parts.pop(name)

        return forward

    def _compute(self, names: tuple[str, ...], x: torch.Tensor) -> bool:
        self.remove()  # what is read must look as it does between calls
        try:
            group = read_group(self.module, names, x, self.runtime)
        finally:
            self.install()
        if isinstance(group, str):
            if len(names) == 1:
                self.fallbacks[group] += 1
            return False
        out = lora_linear(group, x)
        widths = [projection.shape[0] for projection in group.projections]
        # Not views in autograd's eyes: the module may change one of them in place.
        parts = [out] if len(widths) == 1 else torch.unsafe_split_with_sizes(out, widths, -1)
        self.x, self.version = x, x._version
        self.parts.update(zip(names, parts, strict=True))
        return True


def _worthwhile(x: torch.Tensor) -> bool:
    """Not so for an empty tensor, nor for a step of a generation: see ``bind.py``."""
    if x.dim() < 2 or not x.numel() or x.is_inference():
        return False
    return torch.is_grad_enabled() or x.shape[-2] >= FEW_TOKENS


@contextlib.contextmanager
def standing_in(module: nn.Module, binding: Binding) -> Iterator[list[Shared]]:
    """The row's groups, whose projections are stood in for until the end of the context."""
    groups = []
    for names in binding.family.shared:
        own = [name for name in names if "forward" not in getattr(module, name).__dict__]
        groups.append(Shared(module, own, binding.runtime, binding.fallbacks))
    for group in groups:
        group.install()
    try:
        yield groups
    finally:
        for group in groups:
            group.remove()


def forward(module: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return NotCovered()  # the compiler traces the projections themselves
    if global_hooks():
        return NotCovered("hooks for all modules are registered")
    with standing_in(module, binding):
        return binding.base.forward(module, *args, **kwargs)


def refuse(site: Site, runtime: Runtime) -> str | None:
    return None if site.family.shared else "no adapted projection stands in it"


def left_alone(site: Site, runtime: Runtime) -> str | None:
    names = [name for names in site.family.shared for name in names]
    adapted = [name for name in names if hasattr(getattr(site.module, name), "lora_A")]
    return None if adapted else "its projections have no adapters"


IMPLEMENTATION = Implementation("linear", "fused projections", forward, refuse, left_alone)
