"""Load a model from its folder with its linear layers quantized on the way, tensor by tensor.

Memory never holds more than the quantized model and one tensor of the checkpoint, on the device, and a few read buffers
on the host.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.layers.encoding import Encoder, encoder
from fastplug.layers.linear import QuantLinear
from fastplug.layers.quantizing import plan
from fastplug.layers.reading import Reader, Stored, tensors_of
from fastplug.layers.skeleton import own_tensors, renamed, replace, skeleton
from fastplug.layers.stored_4bit import StoredWeight, stored_4bit

logger = logging.getLogger("fastplug")


def load(
    path: str | os.PathLike[str],
    quant: str | None = "nf4",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    skip: Iterable[str] | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    **options: Any,
) -> Any:
    """A transformers model from its folder, its linear layers quantized as they are read.

    The weights are cast to ``dtype`` and then quantized, as transformers does with bitsandbytes: the quantized bits are
    the same.

    Args:
        path: The folder of a model in safetensors files, in 16 or 32 bits or in bitsandbytes' 4 bits, or a model id
            whose files are in the local cache.
        quant: ``nf4``, ``fp4``, ``hqq``, or None to load the weights as they are.
        device: Where to. Default: the first GPU, else the CPU.
        dtype: Of what is not quantized, and of the computation. ``auto``: the one in the config.
        skip: Linear layers to leave in ``dtype``; see :func:`fastplug.layers.quantize_`. Default: the output
            embeddings, and what a 4-bit folder says.
        blocksize: Values that share a scale.
        double_quant: Whether the scales of NF4 and FP4 are quantized too.
        options: For the model's constructor: ``attn_implementation``.

    Returns:
        The model, in evaluation mode, with its generation config.

    Raises:
        ModelError: Not a folder of a model, files that are truncated, that do not fit the config, or that need a
            conversion which joins or splits tensors.
        OptionError: An unknown format, dtype or block size; a name in ``skip`` that no layer has.
        MissingExtra: transformers is not installed.
    """
    folder = model_folder(path)
    config = model_config(folder)
    encode = None if quant is None else encoder(quant, blocksize, double_quant)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = _dtype(dtype, config)
    given = tensors_of(folder)
    quantized = stored_4bit(folder, config, given)
    if quantized and skip is not None:
        raise OptionError("fastplug.layers: the folder holds 4-bit weights, so skip= can no longer leave layers out")
    model = skeleton(config, chosen, **options)
    with torch.no_grad():
        _fill(model, folder, given, quantized, where, chosen, encode, skip)
    model.name_or_path = config.name_or_path = os.fspath(path)
    _generation_config(model, folder)
    return model


def _fill(
    model: Any,
    folder: Path,
    given: dict[str, Stored],
    quantized: dict[str, StoredWeight],
    device: torch.device,
    dtype: torch.dtype,
    encode: Encoder | None,
    skip: Iterable[str] | None,
) -> None:
    places = own_tensors(model)
    parts = {part for weight in quantized.values() for part in weight.parts.values()}
    names = renamed(model, (name for name in given if name not in parts), places)
    to_quantize = set() if encode is None or quantized else {f"{place.name}.weight" for place in plan(model, skip)}
    keep_fp32 = _keep_fp32(model, dtype)
    left: dict[str, str] = {}
    filled: set[str] = set()
    with Reader(device) as reader:
        for name, stored in given.items():
            if name in parts:
                continue
            target = names[name]
            if target not in places:
                left[name] = target
                continue
            module, attribute = places[target]
            if name in quantized:
                encoded = quantized[name].read(reader, given)
                _replace(model, target, QuantLinear(encoded, None, dtype))
            else:
                _check_shape(folder, name, stored, module, attribute)
                values = reader.read(stored)
                if values.is_floating_point() and attribute in module._parameters:
                    values = values.to(torch.float32 if any(p.search(target) for p in keep_fp32) else dtype)
                if target in to_quantize:
                    assert encode is not None
                    _replace(model, target, QuantLinear(encode(values), None, dtype))
                else:
                    _place(model, target, values)
                del values
            filled.add(target)
    model.tie_weights()
    _move_buffers(model, device)
    _check_filled(model, folder, left)


def _replace(model: nn.Module, target: str, layer: QuantLinear) -> None:
    """Put ``layer`` in the place of the linear layer whose weight is called ``target``, with that one's bias."""
    parent_name, _, child = target.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(parent_name)
    old: Any = getattr(parent, child)
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


def _check_shape(folder: Path, name: str, stored: Stored, module: nn.Module, attribute: str) -> None:
    own: Any = getattr(module, attribute)
    if tuple(own.shape) != stored.shape:
        raise ModelError(
            f"fastplug.layers: {name} in {folder} has shape {stored.shape}, and by the config it is "
            f"{tuple(own.shape)}; the files and the config belong to different models"
        )


def _check_filled(model: Any, folder: Path, left: dict[str, str]) -> None:
    empty = [name for name, tensor in _all_tensors(model) if tensor.device.type == "meta"]
    if empty:
        other = f"; the files hold {min(left)} instead" if left else ""
        raise ModelError(
            f"fastplug.layers: {len(empty)} tensors of {type(model).__name__} are not in the files of {folder} under "
            f"the names that the model has (first: {empty[0]}{other}). Where transformers joins or splits stored "
            "tensors, load the model with from_pretrained and call fastplug.layers.quantize_() on it"
        )
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unused = [name for name in left if not any(p.search(name) for p in ignored) and "rotary_emb.inv_freq" not in name]
    if unused:
        logger.warning("fastplug: %d tensors of %s are not part of the model: %s", len(unused), folder, min(unused))


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


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder ``path``, or that of a model id in the local cache. Raises :class:`ModelError` where there is none."""
    if os.path.isdir(path):
        return Path(path)
    from fastplug.exporters.models import local_folder

    found = local_folder(os.fspath(path))
    if found is None:
        raise ModelError(
            f"fastplug.layers: {os.fspath(path)!r} is neither a folder nor a model in the local cache; fetch it first "
            "(huggingface-cli download, or huggingface_hub.snapshot_download)"
        )
    return found


def model_config(folder: Path) -> Any:
    """The config in a folder. Raises :class:`ModelError` where there is none that transformers reads."""
    from fastplug.errors import MissingExtra

    if not (folder / "config.json").is_file():
        raise ModelError(f"fastplug.layers: {folder} has no config.json, so it is not the folder of a model")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "loading a model") from error
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"fastplug.layers: the config of {folder} cannot be read: {error}") from error


def _dtype(dtype: str | torch.dtype, config: Any) -> torch.dtype:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise OptionError(f"fastplug.layers: dtype is bfloat16, float16, float32 or auto, not {dtype!r}")
    return found


def _generation_config(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
