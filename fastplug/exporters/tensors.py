"""The merged model as a lazy list of tensors.

:func:`merged_tensors` walks a live model in the order of its ``state_dict``, looks through PEFT's wrappers, and lists
what the plain model's ``state_dict`` would hold after a merge: name, shape, dtype and a function that computes the
values when they are needed. The walk reads shapes only; the model is neither merged, moved nor copied. Every exporter
of merged weights can start from this list.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastplug.exporters.api import ExportError
from fastplug.exporters.merging import TokenRows, Update, exact_fp32, expert_updates, lora_updates
from fastplug.exporters.weights import (
    decode,
    decode_weight,
    decoded_dtype,
    encoded_weight,
    is_4bit,
    logical_spec,
    refuse_unreadable,
    repacked_for_cpu,
    scale_names,
)
from fastplug.quant import EncodedWeight

# Wrappers that add a level of names and nothing else.
_TRANSPARENT = {"OptimizedModule": "_orig_mod", "CheckpointWrapper": "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of the merged model.

    Attributes:
        name: Its key in the plain model's ``state_dict``.
        shape: Its shape.
        dtype: The dtype it is written in.
        read: Computes it: the stored tensor itself where nothing changes (do not write into it), a new one otherwise.
        identity: Equal for names that share one tensor (tied weights).
        adapters: Whether an adapter changes it.
        parameter: Whether it is a parameter rather than a buffer.
        linear: The name of the linear layer whose weight it is, '' for others.
        head: Whether that layer is the head over the vocabulary.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    identity: Hashable
    adapters: bool = False
    parameter: bool = True
    linear: str = ""
    head: bool = False


@dataclass
class Merge:
    """The walk's result.

    Attributes:
        tensors: All tensors, tied ones under each of their names.
        merged: Names of the tensors that an adapter takes part in.
        unchanged: Those of them on which the adapter has no effect (B is zero).
        replaced: Names of the modules that ``modules_to_save`` replaces.
        scales: What each adapter's updates were scaled by, the distinct values.
        repacked: Names of the 4-bit weights whose scales bitsandbytes rounded when it evaluated on this CPU.
    """

    tensors: list[LazyTensor] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    scales: dict[str, set[float]] = field(default_factory=dict)
    repacked: list[str] = field(default_factory=list)


class Source(Protocol):
    """Where weights are taken from instead of decoding those of the model."""

    def take(self, name: str, decoded: Tensor) -> Tensor:
        """The weight ``name``; ``decoded`` is what the model holds."""


def merged_tensors(
    model: nn.Module,
    adapters: Sequence[str] | None,
    dtype: torch.dtype | None,
    keep_fp32: Sequence[str] = (),
    *,
    originals: Source | None = None,
    exact_linear: bool = False,
) -> Merge:
    """List the tensors of ``model`` with ``adapters`` merged in.

    Args:
        model: The base model, with PEFT's layers inside of it or without any.
        adapters: Names of the adapters to merge; None takes those that are active in each layer.
        dtype: What floating-point parameters are written in; None: each as it is stored. Buffers keep their dtype.
        keep_fp32: Patterns of parameters that stay fp32 where they are (transformers' ``_keep_in_fp32_modules``).
        originals: Where to take the weights from that ``model`` holds quantized.
        exact_linear: Give the weights of linear layers but the head in fp32, whatever ``dtype`` is.

    Raises:
        ExportError: A tensor that cannot be read, or an adapter state that cannot be merged, naming the module.
    """
    walk = _Walk(model, adapters, dtype, keep_fp32, originals, exact_linear)
    walk.visit(model, "")
    return walk.merge


class _Walk:
    def __init__(
        self,
        model: Any,
        adapters: Sequence[str] | None,
        dtype: torch.dtype | None,
        keep_fp32: Sequence[str],
        originals: Source | None,
        exact_linear: bool,
    ) -> None:
        self.merge = Merge()
        self._originals = originals
        self._exact_linear = exact_linear
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = set() if head is None else {id(module) for module in head.modules()}
        self._adapters = adapters
        self._dtype = dtype
        self._keep_fp32 = [re.compile(rf"(^|\.){pattern}(\.|$)") for pattern in keep_fp32]

    def visit(self, module: Any, prefix: str) -> None:
        name = prefix.removesuffix(".") or type(module).__name__
        inner = _TRANSPARENT.get(type(module).__name__)
        if inner in module._modules:
            self.visit(module._modules[inner], prefix)
        elif kind := peft_kind(module):
            self._visit_peft(kind, module, prefix, name)
        else:
            self._emit(module, prefix, {})

    def _visit_peft(self, kind: str, module: Any, prefix: str, name: str) -> None:
        if kind == "ModulesToSaveWrapper":
            self._visit_modules_to_save(module, prefix, name)
        elif kind == "TrainableTokensWrapper":
            self.visit(module.token_adapter, prefix)
        elif kind == "TrainableTokensLayer":
            adapters = self._select(module, name, module.trainable_tokens_delta)
            self._emit(module.get_base_layer(), prefix, _token_updates(module, adapters, name))
        elif kind in ("LoraLayer", "ParamWrapper"):
            updates: dict[str, Update] = {}
            while peft_kind(module):
                kind = peft_kind(module)
                held = {**module.lora_A, **module.lora_embedding_A}
                adapters = self._select(module, name, held)
                read = expert_updates if kind == "ParamWrapper" else lora_updates
                found = read(module, adapters, name)
                if twice := updates.keys() & found.keys():
                    raise ExportError(f"fastplug: {name}.{twice.pop()} is adapted by two PEFT layers at once")
                updates.update(found)
                for adapter in adapters:
                    self.merge.scales.setdefault(adapter, set()).add(float(module.scaling[adapter]))
                module = module.base_layer
            self._emit(module, prefix, updates)
        else:
            raise ExportError(
                f"fastplug: {name} is a {type(module).__name__} of PEFT, and only LoRA, DoRA, modules_to_save and "
                "trainable tokens can be merged here; if PEFT can (model.merge_and_unload()), export what it returns"
            )

    def _visit_modules_to_save(self, module: Any, prefix: str, name: str) -> None:
        adapters = self._select(module, name, module.modules_to_save)
        if len(adapters) > 1:
            raise ExportError(
                f"fastplug: {name} is replaced by several adapters at once ({', '.join(adapters)}); name one"
            )
        if adapters:
            self.merge.replaced.append(name)
        self.visit(module.modules_to_save[adapters[0]] if adapters else module.original_module, prefix)

    def _select(self, module: Any, name: str, held: Mapping[str, Any]) -> list[str]:
        """The adapters of this layer to merge; refuses states in which the base is not what it seems."""
        adapters = [a for a in (module.active_adapters if self._adapters is None else self._adapters) if a in held]
        if getattr(module, "disable_adapters", False):
            raise ExportError(
                f"fastplug: the adapters of {name} are disabled, so a merge would write the base weights; "
                "enable them (model.enable_adapter_layers()), or export model.unload() if the base is what you want"
            )
        if getattr(module, "merged_adapters", None):
            raise ExportError(
                f"fastplug: {name} has {', '.join(module.merged_adapters)} merged in place already; "
                "call model.unmerge_adapter() first, or export what model.merge_and_unload() returns"
            )
        return adapters

    def _emit(self, module: nn.Module, prefix: str, updates: Mapping[str, Update]) -> None:
        name = prefix.removesuffix(".") or type(module).__name__
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ExportError(
                f"fastplug: {name} ({type(module).__name__}) keeps extra state that safetensors cannot hold"
            )
        encoded = encoded_weight(module, name)
        own = {"weight", "bias"} if encoded is not None else module._parameters.keys()
        if missing := updates.keys() - own:
            raise ExportError(f"fastplug: {name} has no parameter {missing.pop()!r} of its own to merge into")
        if encoded is not None:  # all other tensors of the module belong to the encoding
            self._add_encoded(module, encoded, prefix, updates.get("weight"))
            bias: Any = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                self._add(module, "bias", bias, f"{prefix}bias", updates.get("bias"), True)
            return
        scales = scale_names(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and key not in scales:
                self._add(module, key, parameter, prefix + key, updates.get(key), True)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set and key not in scales:
                self._add(module, key, buffer, prefix + key, None, False)
        for key, child in module._modules.items():
            if child is not None:
                self.visit(child, f"{prefix}{key}.")

    def _add_encoded(self, module: nn.Module, encoded: EncodedWeight, prefix: str, update: Update | None) -> None:
        first = encoded.tensors[0]
        self._append(
            module, f"{prefix}weight", encoded.shape, decoded_dtype(module), lambda: decode(module, encoded), update,
            True, quantized=True, linear=not isinstance(module, nn.Embedding),
            storage=(first.device, first.data_ptr(), first.dtype, encoded.shape),
        )  # fmt: skip

    def _add(
        self, module: nn.Module, key: str, tensor: Tensor, name: str, update: Update | None, parameter: bool
    ) -> None:
        refuse_unreadable(tensor, name)
        shape, stored = logical_spec(tensor)
        if repacked_for_cpu(tensor):
            self.merge.repacked.append(name)
        own = key in module._parameters or key in module._buffers
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, shape, tensor.stride())

        def read() -> Tensor:
            return decode_weight(module, key) if own else tensor.detach()

        self._append(
            module, name, shape, stored, read, update, parameter, quantized=is_4bit(tensor),
            linear=isinstance(module, nn.Linear) and key == "weight",
            storage=place if tensor.numel() else name,
        )  # fmt: skip

    def _append(
        self,
        module: nn.Module,
        name: str,
        shape: tuple[int, ...],
        stored: torch.dtype,
        decoded: Callable[[], Tensor],
        update: Update | None,
        parameter: bool,
        *,
        quantized: bool,
        linear: bool,
        storage: Hashable,
    ) -> None:
        dtype = self._target(name, stored) if parameter else stored
        head = id(module) in self._head
        dtype = torch.float32 if linear and not head and self._exact_linear else dtype
        originals = self._originals if quantized else None
        if update is not None:
            self.merge.merged.append(name)
            if not update.changes():
                self.merge.unchanged.append(name)

        def read() -> Tensor:
            values = decoded()
            values = values if originals is None else originals.take(name, values)
            if update is None and dtype == values.dtype:
                return values
            with exact_fp32():
                values = values.to(dtype) if update is None else update.apply(values, dtype)
            if values.is_floating_point() and not _finite(values):
                raise ExportError(
                    f"fastplug: {name} has values that are not finite in {dtype}; either the training diverged or "
                    'they are too large for it (then try dtype="bfloat16")'
                )
            return values

        identity = (storage, None if update is None else update.identity)
        linear_name = name.removesuffix(".weight") if linear else ""
        self.merge.tensors.append(
            LazyTensor(name, shape, dtype, read, identity, update is not None, parameter, linear_name, head)
        )

    def _target(self, name: str, stored: torch.dtype) -> torch.dtype:
        if not stored.is_floating_point:
            return stored
        if stored == torch.float32 and any(pattern.search(name) for pattern in self._keep_fp32):
            return stored
        return stored if self._dtype is None else self._dtype


def _finite(values: Tensor) -> bool:
    """Whether all values are finite. A sum carries any inf or NaN along, in a fifth of the time that isfinite takes."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _token_updates(layer: Any, adapters: Sequence[str], name: str) -> dict[str, Update]:
    rows = [(tuple(layer.token_indices[adapter]), layer.trainable_tokens_delta[adapter]) for adapter in adapters]
    indices = [index for row, _ in rows for index in row]
    if len(set(indices)) < len(indices) and len(rows) > 1:
        raise ExportError(f"fastplug: several active adapters train the same token rows of {name}; name one of them")
    for adapter, (_, values) in zip(adapters, rows):
        refuse_unreadable(values, f"{name}.trainable_tokens_delta.{adapter}")
    return {"weight": TokenRows(tuple(rows))} if rows else {}


def peft_kind(module: Any) -> str:
    """Which of PEFT's classes ``module`` belongs to, most special first; empty if to none.

    By the classes of its MRO, so that a subclass that fastplug swapped in counts as what it was, and PEFT is not
    imported where it is not in use.
    """
    if "peft" not in sys.modules:
        return ""
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.partition(".")[0] == "peft"}
    known = ("ParamWrapper", "LoraLayer", "TrainableTokensLayer", "ModulesToSaveWrapper", "TrainableTokensWrapper")
    return next((name for name in (*known, "BaseTunerLayer", "AuxiliaryTrainingWrapper") if name in names), "")
