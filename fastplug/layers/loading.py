"""Load a model from its folder with its linear layers quantized on the way, tensor by tensor.

Memory never holds more than the quantized model and one tensor of the checkpoint, on the device, and a few read buffers
on the host.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastplug.errors import ModelError, OptionError
from fastplug.layers.encoding import encoder
from fastplug.layers.filling import Source, fill
from fastplug.layers.own_save import guard
from fastplug.layers.reading import tensors_of
from fastplug.layers.skeleton import skeleton
from fastplug.layers.stored_weights import stored_weights


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
        path: The folder of a model in safetensors files, or a model id whose files are in the local cache. Weights
            that it holds quantized, in one of the formats of :mod:`fastplug.quant.formats` or bitsandbytes' 4 bits,
            are read as they are, without the library that wrote them.
        quant: What weights of 16 or 32 bits are quantized to: ``nf4``, ``fp4``, ``hqq``, or None to leave them.
        device: Where to. Default: the first GPU, else the CPU.
        dtype: Of what is not quantized, and of the computation. ``auto``: the one in the config.
        skip: Linear layers to leave in ``dtype``; see :func:`fastplug.layers.quantize_`. Default: the output
            embeddings. A folder of quantized weights has chosen already.
        blocksize: Values that share a scale.
        double_quant: Whether the scales of NF4 and FP4 are quantized too.
        options: For the model's constructor: ``attn_implementation``.

    Returns:
        The model, in evaluation mode, with its generation config.

    Raises:
        ModelError: Not a folder of a model, files that are truncated, that do not fit the config, that need a
            conversion which joins or splits tensors, or are quantized in a way that is not known.
        OptionError: An unknown format, dtype or block size; a name in ``skip`` that no layer has.
        MissingExtra: transformers is not installed.
    """
    folder = model_folder(path)
    config = model_config(folder)
    encode = None if quant is None else encoder(quant, blocksize, double_quant)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = _dtype(dtype, config)
    given = tensors_of(folder)
    source = Source(folder, given, stored_weights(folder, config, given))
    if source.encoded and skip is not None:
        raise OptionError("fastplug.layers: the folder holds quantized weights: skip= can no longer leave layers out")
    model = skeleton(config, chosen, **options)
    with torch.no_grad():
        fill(model, source, where, chosen, encode, skip)
    model.name_or_path = config.name_or_path = os.fspath(path)
    _generation_config(model, folder)
    if encode is not None or source.encoded:
        guard(model)
    return model


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
