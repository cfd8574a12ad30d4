"""The host's gradient checkpointing becomes a permission where fastplug plans what the layers keep.

transformers switches checkpointing on and off by an attribute ``gradient_checkpointing``, on each decoder layer or (up
to 4.52) on the model around them, at any time: when the model is made, in ``Trainer.train``, again by PEFT or by the
user. So the attribute of a patched instance is a property: it stores whatever the host sets, where the host would have
stored it, and answers False while a plan decides. An undo gives back the class, and with it the value set last. Under
torch.compile no plan decides, so there it is an order as ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastplug.patching.sites import KEY, Binding, NotCovered

NAME = "gradient_checkpointing"
MISSING = object()


class HostCheckpointing:
    """The attribute ``gradient_checkpointing`` of a patched class; ``default`` is what its original class has."""

    def __init__(self, default: Any) -> None:
        self.default = default

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is not None and not torch.compiler.is_compiling():
            binding: Binding | None = module.__dict__.get(KEY)
            if binding is not None and binding.memory is not None and binding.memory.planner.off is None:
                return False
        value = permitted(module, self.default) if module is not None else self.default
        if value is MISSING:
            raise AttributeError(NAME)
        return value

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[NAME] = value

    def __delete__(self, module: nn.Module) -> None:
        if NAME not in module.__dict__:
            raise AttributeError(NAME)
        del module.__dict__[NAME]


def permitted(module: nn.Module, default: Any = False) -> Any:
    """What the host has set on a module."""
    return module.__dict__.get(NAME, default)


def switched_by(layers: Iterable[nn.Module], model: nn.Module) -> nn.Module | None:
    """The module that checkpoints the decoder layers from outside, by an attribute of its own; None if they do it."""
    wanted = {id(layer) for layer in layers if not hasattr(type(layer), NAME)}
    found = None
    for module in model.modules():
        if NAME in module.__dict__ and wanted and wanted <= {id(inner) for inner in module.modules()}:
            found = module  # modules come outside first, so the last one is the innermost
    return found


def pass_on(module: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> NotCovered:
    """A fast forward that leaves every call to the original one."""
    return NotCovered()


__all__ = ["MISSING", "NAME", "HostCheckpointing", "pass_on", "permitted", "switched_by"]
