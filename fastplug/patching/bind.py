"""Bind a fast forward to one module instance by swapping its ``__class__``, and give it back.

The subclass keeps the original's name, module and signature, pickles as the original class, and deep-copies as what it
is. Nothing else of the class, and nothing of any other instance, changes. The forward is in the namespace when the
class is made because transformers wraps it there for gradient checkpointing.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastplug.memory.takeover import MISSING, NAME, HostCheckpointing
from fastplug.patching.sites import KEY, Binding, FastForward, NotCovered

MARK = "_fastplug_base"  # set on the subclasses only


class _Patched(type):
    """The metaclass of patched classes, of which every instance of the original class counts as an instance.

    FSDP's wrap policies look for a class by name, take the first they find and wrap its instances: where that is the
    patched class, a layer that fastplug left as it was must not go unwrapped.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, vars(cls)[MARK]) if MARK in vars(cls) else type.__instancecheck__(cls, instance)


class _Class:
    """A class that deep-copies as the patched one and pickles as the original.

    Both go through ``__reduce_ex__``. A ``__deepcopy__`` method cannot tell them apart: PEFT's models forward unknown
    attributes to the model inside, so copying the outer one would find it and copy the inner one.
    """

    def __init__(self, base: type, patched: type) -> None:
        self.base, self.patched = base, patched

    def __deepcopy__(self, memo: dict[int, Any]) -> type:
        return self.patched

    def __reduce__(self) -> Any:
        return copy.copy, (self.base,)  # a class copies as itself: this loads where fastplug is not installed


class _State(dict[str, Any]):
    """An instance's state that deep-copies whole and pickles without the binding."""

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, ({key: value for key, value in self.items() if key != KEY},)


FEW_TOKENS = 64
REMEMBERED: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""What a fast forward remembers of a patched module from call to call. On its binding, which the module holds, it would
make a cycle if it holds anything of the module's."""


def _few_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward without gradients is a step of a generation.

    Its time goes into launching kernels, and libraries have kernels of their own for it (bitsandbytes' 4-bit matrix
    times vector): the original forward is left to it, at the price of this question.
    """
    x = args[0] if args else kwargs.get("hidden_states")
    return isinstance(x, torch.Tensor) and x.dim() > 2 and x.shape[-2] < FEW_TOKENS


@functools.cache
def patched_class(base: type[nn.Module], fast: FastForward) -> type[nn.Module]:
    """The subclass of ``base`` whose forward is ``fast``, made once."""
    original: Callable[..., Any] = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        binding: Binding | None = self.__dict__.get(KEY)
        if binding is None:  # undone while a wrapper (accelerate's autocast, FSDP2) still holds this function
            return original(self, *args, **kwargs)
        if not torch.is_grad_enabled() and _few_tokens(args, kwargs):
            binding.runtime.spare()
            return original(self, *args, **kwargs)
        result = fast(self, binding, *args, **kwargs)
        if type(result) is NotCovered:
            if result.reason is not None:
                binding.fallbacks[result.reason] += 1
            # What it stands in for may itself hold the forward of an earlier binding of ours: that runs the original.
            if binding.stands_in_for is not None and type(self).forward is forward:
                return binding.stands_in_for(*args, **kwargs)
            return original(self, *args, **kwargs)
        return result

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        state: Any = super(cls, self).__reduce_ex__(protocol)[2]  # type: ignore[misc]
        rebuild: Any = copyreg._reconstructor  # type: ignore[attr-defined]
        return rebuild, (_Class(base, type(self)), object, None), _State(state)

    def __copy__(self: nn.Module) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    namespace = {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "__copy__": __copy__,
        MARK: base,
    }
    if hasattr(base, NAME) or hasattr(base, "supports_gradient_checkpointing"):
        namespace[NAME] = HostCheckpointing(getattr(base, NAME, MISSING))
    metaclass: Any = _Patched if type(base) is type else type(base)
    cls: type[nn.Module] = metaclass(base.__name__, (base,), namespace)
    return cls


def bind(module: nn.Module, binding: Binding, fast: FastForward, stands_in: bool = False) -> None:
    """Patch one instance. Its ``__dict__`` gains one entry and its ``__class__`` changes; that is all.

    A forward on the instance would hide the fast one, so it is put aside until unbind: a bound copy of the class's own,
    or somebody else's where the fast one ``stands_in`` for it.
    """
    own = module.__dict__.get("forward")
    if stands_in:
        binding.stands_in_for = module.__dict__.pop("forward")
    elif getattr(own, "__func__", None) is type(module).forward:
        binding.own_forward = module.__dict__.pop("forward")
    kinds: tuple[Any, ...] = type(module).__mro__
    if not any(MARK in vars(kind) and kind is patched_class(vars(kind)[MARK], fast) for kind in kinds):
        module.__class__ = patched_class(kinds[0], fast)
    module.__dict__[KEY] = binding  # after an undo, a class of FSDP2's may still rest on the patched one


def unbind(module: nn.Module) -> bool:
    """Give one instance back and say whether it was patched.

    A class derived from ours (FSDP2's) stays: its forward then runs the original.
    """
    binding: Binding | None = module.__dict__.pop(KEY, None)
    if binding is None:
        return False
    REMEMBERED.pop(module, None)
    binding.graphs = None  # recordings hold the binding too: a cycle, which would keep the layer's activations
    base = type(module).__dict__.get(MARK)
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is type(module).forward and base is not None:
        del module.__dict__["forward"]  # transformers 4.57 leaves a bound copy behind when it records outputs
    if base is not None:
        module.__class__ = base
    aside = binding.own_forward or binding.stands_in_for
    if aside is not None and "forward" not in module.__dict__:
        module.__dict__["forward"] = aside
    return True


def parameter_names(base: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of ``base.forward`` after self, by position, ``**kwargs`` left out."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
