"""Write a model with ``QuantLinear`` layers as a folder that transformers reads without fastplug.

Either with the bits it holds, where bitsandbytes has the format, or as a plain model of the values they stand for.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastplug.errors import ModelError
from fastplug.layers.linear import QuantLinear
from fastplug.layers.quantizing import plan
from fastplug.layers.stored_4bit import kind_of, tensors


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write ``model`` with the bits it holds: nothing is decoded or quantized again, unless you ask for that.

    Args:
        model: A transformers model that ``load`` or ``quantize_`` made, without adapters.
        path: The folder to make. It appears whole or not at all.
        dequantize: Write plain weights instead, those that the layers decode to, each in the dtype it was trained in:
            the one way for formats that bitsandbytes does not have (HQQ). They are decoded one by one.
        tokenizer: A tokenizer or its folder, written beside the weights.
        max_shard_size: Largest size of a file.
        overwrite: Replace an existing model folder.

    Returns:
        The folder.

    Raises:
        ModelError: Not a transformers model, one with adapters, or, without ``dequantize``, one whose layers
            bitsandbytes has no format for.
        OSError: The folder exists or cannot be written.
    """
    from fastplug.exporters.folder import atomic_folder, write_manifest
    from fastplug.exporters.naming import drop_tied, saved_tensors, tied_patterns
    from fastplug.exporters.sidecar import ties_embeddings, write_config, write_generation_config, write_tokenizer
    from fastplug.exporters.tensors import LazyTensor
    from fastplug.exporters.writing import write_weights

    layers = _quantized_layers(model)
    if not dequantize:
        _check_format(layers)
    listed: list[LazyTensor] = []
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, tensor, parameter in _plain_tensors(model):
        shape, read = tuple(tensor.shape), partial(torch.Tensor.detach, tensor)
        listed.append(LazyTensor(name, shape, tensor.dtype, read, id(tensor), parameter=parameter))
    patterns = tied_patterns(model) if ties_embeddings(model.config) else []
    listed = drop_tied(listed, patterns)
    for name, layer in layers.items():
        dtype = layer.dtype
        if dequantize:
            weight, shape = f"{name}.weight", (layer.out_features, layer.in_features)
            listed.append(LazyTensor(weight, shape, dtype, layer.dequantize, (name, weight)))
            continue
        for part, tensor in tensors(layer, f"{name}.weight").items():
            shape, read = tuple(tensor.shape), partial(torch.Tensor.detach, tensor)
            listed.append(LazyTensor(part, shape, tensor.dtype, read, (name, part)))
    if dequantize:
        listed = saved_tensors(model, listed)
    with atomic_folder(path, overwrite=overwrite) as folder:
        digests = write_weights(folder, listed, max_shard_size)
        write_config(model, folder, dtype, quantization=None if dequantize else _quantization(model, layers, dtype))
        write_generation_config(model, folder)
        if tokenizer is not None:
            write_tokenizer(tokenizer, model, folder, (), None)
        write_manifest(folder, digests)
    return Path(os.path.abspath(os.path.expanduser(path)))


def _quantized_layers(model: Any) -> dict[str, QuantLinear]:
    if not (hasattr(model, "config") and hasattr(model, "save_pretrained")) or hasattr(model, "get_base_model"):
        raise ModelError(
            f"fastplug.layers: save() writes a transformers model, not a {type(model).__name__}; write an adapter with "
            'fastplug.export(model, path, format="lora"), and its base from the model under it'
        )
    layers: dict[str, QuantLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            layers[name] = module
        elif type(module).__module__.startswith("peft.tuners."):
            raise ModelError(f"fastplug.layers: {name} carries an adapter; save() writes a base without one")
    if not layers:
        raise ModelError("fastplug.layers: the model has no QuantLinear; its own save_pretrained writes it")
    return layers


def _check_format(layers: dict[str, QuantLinear]) -> None:
    """Whether transformers reads these layers back, all in one of bitsandbytes' 4-bit formats."""
    kinds = {(kind_of(layer), layer.layout) for layer in layers.values()}
    if None in {kind for kind, _ in kinds}:
        name = next(name for name, layer in layers.items() if kind_of(layer) is None)
        raise ModelError(
            f"fastplug.layers: {name} is stored as {layers[name].codec.name}, which bitsandbytes does not have; "
            "save(model, path, dequantize=True) writes a plain model of the values it stands for"
        )
    if len(kinds) > 1:
        raise ModelError("fastplug.layers: the layers are quantized in different ways; transformers reads only one")


def _plain_tensors(model: Any) -> list[tuple[str, torch.Tensor, bool]]:
    """Names and tensors of everything that is no encoded weight."""
    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        place = f"{prefix}." if prefix else ""
        encoded = module.parts if isinstance(module, QuantLinear) else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in encoded:
                found.append((place + name, parameter, True))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.append((place + name, buffer, False))
    return found


def _quantization(model: Any, layers: dict[str, QuantLinear], dtype: torch.dtype) -> dict[str, Any]:
    layer = next(iter(layers.values()))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    skipped = [place.name for place in plan(model, skip=())]
    skipped += [name for name, module in model.named_modules() if module is head and name not in skipped]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind_of(layer),
        "bnb_4bit_use_double_quant": len(layer.layout) > 1,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    }
