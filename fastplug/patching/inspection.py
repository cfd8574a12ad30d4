"""What stands between a module and its class's own forward: hooks, instance forwards, replaced class forwards."""

from __future__ import annotations

import inspect
import sys

from torch import nn
from torch.nn.modules import module as torch_module

from fastplug.patching.bind import MARK, patched_class
from fastplug.sharding import own_class

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
    own = getattr(state.get("forward"), "__func__", None)
    if "forward" in state and own is not type(module).forward and not _only_rounds(own):
        return "a forward that was set on the instance"
    return None


def _only_rounds(function: object) -> bool:
    """Whether this is compressed-tensors' forward, which rounds and then calls that of the class.

    Of a compressed layer it rounds activations at most; the codec's note says that they are not rounded here.
    """
    return getattr(function, "__globals__", {}).get("__name__") == "compressed_tensors.quantization.lifecycle.forward"


def _only_idle_recorders(hooks: object) -> bool:
    """Whether all hooks are those by which transformers >= 5 records attentions, and nothing is being recorded.

    transformers leaves them installed after the first request.
    """
    for hook in hooks:  # type: ignore[attr-defined]
        if getattr(hook, "__module__", None) != CAPTURING:
            return False
    active = sys.modules[CAPTURING]._active_collector.get()
    return not active or set(active) <= {"hidden_states", "_hidden_states_layers"}


def replaced_forward(module: nn.Module, stood_in_for: bool = False) -> str | None:
    """Why a site's forward is not the one its family row describes.

    Liger, Unsloth, TRL, accelerate or the user put another in its place. One on the instance is no reason where an
    implementation stands in for it.
    """
    if getattr(module, "_hf_hook", None) is not None:
        return "accelerate's device hooks move its inputs or weights (it is dispatched over devices or offloaded)"
    own = None if stood_in_for else module.__dict__.get("forward")
    function = getattr(own, "__func__", own)
    if own is not None and function is not type(module).forward and not runs_ours(function):
        origin = getattr(function, "__globals__", {}).get("__name__")  # functools.wraps hides it in __module__
        return f"its forward was replaced on the instance by {origin or 'someone'}"
    kind = own_class(type(module))
    base = kind.__dict__.get(MARK, kind)
    origin = inspect.unwrap(base.forward).__module__
    if origin not in {parent.__module__ for parent in base.__mro__}:  # a class may inherit its forward
        return f"its class's forward was replaced by {origin}"
    return None


def runs_ours(function: object) -> bool:
    """Whether an instance's forward only wraps that of a patched class, as accelerate's autocast does.

    Then the fast path runs inside it whenever the module carries a binding. TRL's wrapper also names ours in
    ``__wrapped__``, but for calls with ``fused_lm_head=True`` runs another head.
    """
    while function is not None:
        origin = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if origin == patched_class.__module__:
            return True
        if origin.partition(".")[0] not in ("accelerate", "torch"):
            return False
        function = getattr(function, "__wrapped__", None)
    return False


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
