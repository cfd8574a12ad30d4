"""What stands between a module and its class's own forward: hooks, instance forwards, replaced class forwards."""

from __future__ import annotations

import inspect
import sys

from torch import nn
from torch.nn.modules import module as torch_module

from fastplug.patching.bind import MARK

CAPTURING = "transformers.utils.output_capturing"


def global_hooks() -> bool:
    """Whether hooks for all modules are registered (``torch.nn.modules.module.register_module_forward_hook``)."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def intercepted(module: nn.Module) -> str | None:
    """Why calling ``module`` differs from running its forward: a hook or an instance forward. None if it does not."""
    state = module.__dict__
    if state["_forward_hooks"] and not _only_idle_recorders(state["_forward_hooks"].values()):
        return "a forward hook"
    if state["_forward_pre_hooks"]:
        return "a forward pre-hook"
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return "a backward hook"
    if "forward" in state and getattr(state["forward"], "__func__", None) is not type(module).forward:
        return "a forward that was set on the instance"
    return None


def _only_idle_recorders(hooks: object) -> bool:
    """Whether all hooks are those by which transformers >= 5 records attentions, and nothing is being recorded.

    transformers leaves them installed after the first request.
    """
    for hook in hooks:  # type: ignore[attr-defined]
        if getattr(hook, "__module__", None) != CAPTURING:
            return False
    active = sys.modules[CAPTURING]._active_collector.get()
    return not active or set(active) <= {"hidden_states", "_hidden_states_layers"}


def replaced_forward(module: nn.Module) -> str | None:
    """Why a site's forward is not the one its family row describes.

    Liger, Unsloth, TRL, accelerate or the user put another in its place.
    """
    if getattr(module, "_hf_hook", None) is not None:
        return "accelerate's device hooks move its inputs or weights (it is dispatched over devices or offloaded)"
    if intercepted(module) == "a forward that was set on the instance":
        origin = getattr(module.__dict__["forward"], "__module__", None) or "someone"
        return f"its forward was replaced on the instance by {origin}"
    kind = type(module)
    base = kind.__dict__.get(MARK, kind)
    origin = inspect.unwrap(base.forward).__module__
    if origin != base.__module__:
        return f"its class's forward was replaced by {origin}"
    return None


def unwrap_saved(module: nn.Module) -> nn.Module | str:
    """The module that a PEFT ``ModulesToSaveWrapper`` calls at present; any other module itself.

    Returns a reason instead where the wrapper's state is not covered.
    """
    kind = type(module)
    if kind.__name__ != "ModulesToSaveWrapper" or not kind.__module__.startswith("peft."):
        return module
    wrapper_reason = intercepted(module)
    if wrapper_reason:
        return wrapper_reason
    if module.disable_adapters:
        return module.original_module  # type: ignore[return-value]
    active = [name for name in module.active_adapters if name in module.modules_to_save]  # type: ignore[operator, union-attr]
    if not active:
        return module.original_module  # type: ignore[return-value]
    if len(active) > 1:
        return "several trained copies of it are active"
    return module.modules_to_save[active[0]]  # type: ignore[index, return-value]
