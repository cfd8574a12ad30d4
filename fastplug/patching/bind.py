"""Bind a fast forward to one module instance by swapping its ``__class__``, and give it back.

The subclass keeps the original's name, module and signature, pickles as the original class, and deep-copies as what it
is. Nothing else of the class, and nothing of any other instance, changes. The forward is in the namespace when the
class is made because transformers wraps it there for gradient checkpointing.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fastplug.patching.sites import KEY, Binding, FastForward, NotCovered

MARK = "_fastplug_base"  # set on the subclasses only


@functools.cache
def patched_class(base: type[nn.Module], fast: FastForward) -> type[nn.Module]:
    """The subclass of ``base`` whose forward is ``fast``, made once."""
    original: Callable[..., Any] = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        binding: Binding | None = self.__dict__.get(KEY)
        if binding is None:  # undone while a wrapper (accelerate's autocast, FSDP2) still holds this function
            return original(self, *args, **kwargs)
        result = fast(self, binding, *args, **kwargs)
        if type(result) is NotCovered:
            if result.reason is not None:
                binding.fallbacks[result.reason] += 1
            return original(self, *args, **kwargs)
        return result

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        """Pickle as the original class, so that the file loads where fastplug is not installed."""
        reduced = list(super(cls, self).__reduce_ex__(protocol))  # type: ignore[misc]
        reduced[1] = tuple(base if argument is type(self) else argument for argument in reduced[1])
        if len(reduced) > 2 and isinstance(reduced[2], dict):
            reduced[2] = {key: value for key, value in reduced[2].items() if key != KEY}
        return tuple(reduced)

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> Any:
        """Copy patched: the default copy would go through __reduce_ex__ and come out unpatched."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin

    namespace = {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "__deepcopy__": __deepcopy__,
        MARK: base,
    }
    cls: type[nn.Module] = type(base.__name__, (base,), namespace)
    return cls


def bind(module: nn.Module, binding: Binding, fast: FastForward) -> None:
    """Patch one instance. Its ``__dict__`` gains one entry and its ``__class__`` changes; that is all."""
    module.__class__ = patched_class(type(module), fast)
    module.__dict__[KEY] = binding


def unbind(module: nn.Module) -> bool:
    """Give one instance back; whether it was patched. A class derived from ours (FSDP2's) stays but runs the original."""
    if module.__dict__.pop(KEY, None) is None:
        return False
    base = type(module).__dict__.get(MARK)
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is type(module).forward and base is not None:
        del module.__dict__["forward"]  # transformers 4.57 leaves a bound copy behind when it records outputs
    if base is not None:
        module.__class__ = base
    return True


def parameter_names(base: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of ``base.forward`` after self, by position, ``**kwargs`` left out."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
