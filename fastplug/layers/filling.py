"""Fill a model without weights from a folder, tensor by tensor, and quantize on the way."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.layers.encoding import Encoder
from fastplug.layers.linear import QuantLinear
from fastplug.layers.quantizing import FLOATS, plan
from fastplug.layers.reading import Reader, Stored
from fastplug.layers.skeleton import own_tensors, renamed, replace
from fastplug.layers.stored_weights import StoredWeight

logger = logging.getLogger("fastplug")


@dataclass(frozen=True)
class Source:
    """A folder: its tensors, and those that make up quantized weights, by the names of the weights."""

    folder: Path
    given: Mapping[str, Stored]
    encoded: Mapping[str, StoredWeight]


def fill(
    model: Any,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    encode: Encoder | None,
    skip: Iterable[str] | None,
) -> None:
    """Give every parameter and buffer of ``model`` its values, and its quantized layers their weights.

    Args:
        model: What :func:`fastplug.layers.skeleton.skeleton` made.
        source: Where the weights lie.
        device: Where they go.
        dtype: Of what is not quantized.
        encode: What quantizes the weights of linear layers; not used where the folder holds quantized ones.
        skip: Layers to leave in ``dtype``; see :func:`fastplug.layers.quantize_`.

    Raises:
        ModelError: Tensors that are missing, or are not those of the model.
    """
    places = own_tensors(model)
    given, encoded = source.given, source.encoded
    weight_of = {part: weight for weight in encoded.values() for part in weight.names}
    names = renamed(model, [*(name for name in given if name not in weight_of), *encoded], places)
    chosen = set() if encode is None or encoded else {f"{place.name}.weight" for place in plan(model, skip)}
    keep_fp32 = _keep_fp32(model, dtype)
    # In the order of the files, each quantized weight where its first tensor lies.
    items = {weight_of.get(name, name): None for name in given}
    named = [(item, item if isinstance(item, str) else item.name) for item in items]
    left = {name: names[name] for _, name in named if names[name] not in places}
    todo = [(item, names[name]) for item, name in named if name not in left]
    order = [given[part] for item, _ in todo for part in ([item] if isinstance(item, str) else item.names)]
    with Reader(device, order) as reader:
        for item, target in todo:
            if not isinstance(item, str):
                _replace(model, target, QuantLinear(item.read(reader, given), None, dtype))
                continue
            module, attribute = places[target]
            _check(source.folder, item, given[item], module, attribute)
            values = reader.read(given[item])
            if values.is_floating_point() and attribute in module._parameters:
                values = values.to(torch.float32 if any(p.search(target) for p in keep_fp32) else dtype)
            if target in chosen:
                assert encode is not None
                _replace(model, target, QuantLinear(encode(values), None, dtype))
            else:
                _place(model, target, values)
            del values
        _drop_empty_biases(source, left, reader)
    model.tie_weights()
    _move_buffers(model, device)
    _check_filled(model, source, left)


def _replace(model: nn.Module, target: str, layer: QuantLinear) -> None:
    """Put ``layer`` in the place of the linear layer whose weight is called ``target``, with that one's bias."""
    parent_name, _, child = target.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(parent_name)
    old: Any = getattr(parent, child)
    if not isinstance(old, nn.Linear):
        raise ModelError(
            f"fastplug.layers: {target} is stored as {layer.codec.name} and belongs to a {type(old).__name__}; only "
            "linear layers can be quantized here: load the model with from_pretrained and the library that wrote it"
        )
    if layer.weight.device.type != "meta" and (layer.out_features, layer.in_features) != tuple(old.weight.shape):
        raise ModelError(
            f"fastplug.layers: {target} is {layer.out_features}x{layer.in_features} in the files and "
            f"{'x'.join(map(str, old.weight.shape))} by the config; they belong to different models"
        )
    layer.bias = old.bias
    setattr(parent, child, layer.train(old.training))


def _place(model: nn.Module, target: str, values: torch.Tensor) -> None:
    owner_name, _, attribute = target.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = owner._parameters.get(attribute)
    if old is None:
        owner._buffers[attribute] = values
        return
    replace(model, old, nn.Parameter(values, requires_grad=old.requires_grad and values.is_floating_point()))


def _check(folder: Path, name: str, stored: Stored, module: nn.Module, attribute: str) -> None:
    own: Any = getattr(module, attribute)
    if tuple(own.shape) != stored.shape:
        raise ModelError(
            f"fastplug.layers: {name} in {folder} has shape {stored.shape}, and by the config it is "
            f"{tuple(own.shape)}; the files and the config belong to different models"
        )
    plain = stored.dtype in (*FLOATS, torch.float64)
    if own.is_floating_point() and attribute in module._parameters and not plain:
        raise ModelError(
            f"fastplug.layers: {name} in {folder} is {stored.dtype}, which is a quantized weight, and the files hold "
            "no scales for it: copy them again, or see that config.json has the quantization_config they came with"
        )


def _drop_empty_biases(source: Source, left: dict[str, str], reader: Reader) -> None:
    """Forget biases of zeros, which AutoGPTQ writes beside quantized weights whose layers have none."""
    for name in list(left):
        stem, _, last = name.rpartition(".")
        if last != "bias" or f"{stem}.weight" not in source.encoded or f"{stem}.weight" in left:
            continue
        if bool(reader.read(source.given[name]).any()):
            raise ModelError(
                f"fastplug.layers: {source.folder} holds a bias {name}, and by the config the layer has none; the "
                "files and the config belong to different models"
            )
        del left[name]


def _check_filled(model: Any, source: Source, left: Mapping[str, str]) -> None:
    empty = [name for name, tensor in _all_tensors(model) if tensor.device.type == "meta"]
    if empty:
        other = f"; the files hold {min(left)} instead" if left else ""
        way_out = "and call fastplug.layers.quantize_() on it"
        if source.encoded:
            way_out = "and the library that wrote it"
        raise ModelError(
            f"fastplug.layers: {len(empty)} tensors of {type(model).__name__} are not in the files of {source.folder} "
            f"under the names that the model has (first: {empty[0]}{other}). Where transformers joins or splits stored "
            f"tensors, load the model with from_pretrained {way_out}"
        )
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unused = [name for name in left if not any(p.search(name) for p in ignored) and "rotary_emb.inv_freq" not in name]
    if unused:
        logger.warning(
            "fastplug: %d tensors of %s are not part of the model: %s", len(unused), source.folder, min(unused)
        )


def _all_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


def _keep_fp32(model: Any, dtype: torch.dtype) -> list[re.Pattern[str]]:
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [re.compile(rf"(^|\.){re.escape(name)}($|\.)") for name in names]
