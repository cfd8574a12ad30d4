"""Names, ties and order as ``save_pretrained`` of the plain model would write them.

transformers 5 may hold a model in another layout than its checkpoints (experts stacked, prefixes changed) and converts
back when it saves, over the whole ``state_dict`` at once. Here the conversion first runs on meta tensors to learn which
saved tensor needs which of the model's, and then group by group on real ones.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastplug.exporters.api import ExportError
from fastplug.exporters.tensors import LazyTensor

Revert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def tied_patterns(model: nn.Module) -> list[str]:
    """Patterns of the names that ``model`` ties to others when it loads (``_tied_weights_keys`` of every part)."""
    patterns = []
    for name, module in model.named_modules():
        keys: Iterable[str] = getattr(module, "_tied_weights_keys", None) or ()  # a list, or since 5.0 a dict
        patterns += [f"{name}.{key}" if name else key for key in keys]
    return patterns


def drop_tied(tensors: list[LazyTensor], patterns: list[str]) -> list[LazyTensor]:
    """Keep one name of every shared tensor: the one that the model does not restore by tying.

    Names that share a tensor although the model does not tie them are all kept, each with its own copy.
    """
    groups: dict[Any, list[str]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.identity, []).append(tensor.name)
    dropped: set[str] = set()
    for names in groups.values():
        restored = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in patterns)]
        dropped.update(restored[: len(names) - 1])
    return [tensor for tensor in tensors if tensor.name not in dropped]


def untied_names(tensors: list[LazyTensor], patterns: list[str]) -> list[str]:
    """Names that the model would tie when it loads, but that hold values of their own (training untied them)."""
    count = Counter(tensor.identity for tensor in tensors)
    return [
        tensor.name
        for tensor in tensors
        if count[tensor.identity] == 1 and any(re.search(pattern, tensor.name) for pattern in patterns)
    ]


def saved_tensors(model: Any, tensors: list[LazyTensor]) -> list[LazyTensor]:
    """``tensors`` under the names and in the layout of a saved checkpoint.

    Raises:
        ExportError: transformers' conversion does not work on this model.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tensors = [tensor for tensor in tensors if tensor.name not in ignored]
    revert = _revert(model)
    if revert is None:
        return tensors
    sources = {tensor.name: tensor for tensor in tensors}
    empty = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors}
    trace = _Provenance(empty)
    try:
        with trace:
            saved = revert(dict(empty))
    except Exception as error:
        raise ExportError(
            f"fastplug: transformers cannot convert {type(model).__name__} back to its checkpoint layout "
            f"({type(error).__name__}: {error}); save it with save_pretrained after model.merge_and_unload()"
        ) from error
    needs = {name: trace.sources(tensor) for name, tensor in saved.items()}
    result = []
    groups: dict[str, _Group] = {}
    for members in _components(needs.values()):
        group = _Group(revert, [sources[name] for name in sources if name in members])
        groups.update(dict.fromkeys(members, group))
    for name, tensor in saved.items():
        first = sources[next(iter(needs[name]))]
        if tensor is empty[first.name]:  # renamed only
            result.append(replace(first, name=name))
        else:
            group = groups[first.name]
            changed = any(sources[source].adapters for source in needs[name])
            read = group.reader(name)
            result.append(LazyTensor(name, tuple(tensor.shape), tensor.dtype, read, (id(group), name), changed))
    return result


class _Group:
    """Tensors that are converted together; what was computed and not yet asked for waits here."""

    def __init__(self, revert: Revert, members: list[LazyTensor]) -> None:
        self._revert = revert
        self._members = members
        self._ready: dict[str, Tensor] = {}

    def reader(self, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if name not in self._ready:
                with torch.no_grad():
                    self._ready = self._revert({member.name: member.read() for member in self._members})
            return self._ready.pop(name)

        return read


class _Provenance(TorchDispatchMode):
    """Records which of the given tensors each computed tensor was made from."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        self._sources = {id(tensor): frozenset((name,)) for name, tensor in named.items()}
        self._alive: list[Tensor] = list(named.values())  # so that no id is used twice

    def sources(self, tensor: Tensor) -> frozenset[str]:
        return self._sources[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [self._sources.get(id(leaf), frozenset()) for leaf in tree_leaves((args, kwargs))]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._sources[id(leaf)] = frozenset(itertools.chain(self._sources.get(id(leaf), ()), *inputs))
                self._alive.append(leaf)
        return result


def _components(sets: Iterable[frozenset[str]]) -> Iterator[frozenset[str]]:
    """Unions of those sets that share members, directly or through others."""
    found: list[frozenset[str]] = []
    owner: dict[str, int] = {}
    for members in sets:
        touched = {owner[member] for member in members if member in owner}
        union = members.union(*(found[index] for index in touched))
        found.append(union)
        owner.update(dict.fromkeys(union, len(found) - 1))
    return (found[index] for index in sorted(set(owner.values())))


def _revert(model: Any) -> Revert | None:
    """transformers' conversion to the checkpoint layout (5.x), without the parts that undo a quantization."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return None
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        used = [item for item in used if not any(hasattr(o, "hf_quantizer") for o in getattr(item, "operations", ()))]
    view = _View(model, used)
    return lambda tensors: revert_weight_conversion(view, tensors)


class _View:
    """``model`` with another list of weight conversions."""

    def __init__(self, model: Any, conversions: list[Any] | None) -> None:
        self._model = model
        self._weight_conversions = conversions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
