"""Block expansion from folder to folder, tensor by tensor: the model is never loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastplug.errors import ModelError
from fastplug.layers.expansion import OUTPUTS, check_rebuild, expand_blocks, find_blocks, rearrange, sources
from fastplug.layers.loading import load, model_config, model_folder
from fastplug.layers.reading import Reader, Stored, tensors_of
from fastplug.layers.saving import save
from fastplug.layers.skeleton import own_tensors, renamed, skeleton
from fastplug.layers.stored_4bit import StoredWeight4Bit
from fastplug.layers.stored_weights import stored_weights


def expand_folder(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    every: int | None = None,
    count: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write the expanded model of a folder as a folder of its own, with its tokenizer.

    A folder of plain weights is read and written tensor by tensor; one of 4-bit weights is loaded as it is, and its
    new blocks are written dense.

    Args:
        path: The folder of a model in safetensors files, or a model id whose files are in the local cache.
        out: The folder to make. It appears whole or not at all.
        every, count: See :func:`fastplug.layers.expand_blocks`.
        max_shard_size: Largest size of a file.
        overwrite: Replace an existing model folder.

    Returns:
        The folder that was made.

    Raises:
        OptionError: Numbers that the model's blocks do not allow.
        ModelError: Not a folder of a model, or one whose blocks cannot be expanded.
        OSError: ``out`` exists, cannot be written, or the disk is full.
    """
    from fastplug.exporters.folder import atomic_folder, write_manifest
    from fastplug.exporters.sidecar import write_config, write_generation_config, write_tokenizer
    from fastplug.exporters.tensors import LazyTensor
    from fastplug.exporters.writing import write_weights

    folder = model_folder(path)
    config = model_config(folder)
    given = tensors_of(folder)
    encoded = stored_weights(folder, config, given)
    if not all(isinstance(weight, StoredWeight4Bit) for weight in encoded.values()):
        raise ModelError(
            f"fastplug.layers: {folder} is quantized in a format that cannot be written again beside new blocks; load "
            "it with fastplug.layers.load() and call expand_blocks() on the model, or expand the 16-bit weights"
        )
    if encoded:
        model = expand_blocks(load(folder, None, device="cpu"), every=every, count=count)
        return save(model, out, tokenizer=_tokenizer(folder), max_shard_size=max_shard_size, overwrite=overwrite)
    dtype = next((stored.dtype for stored in given.values() if stored.dtype.is_floating_point), torch.float32)
    model = skeleton(config, dtype)
    names = renamed(model, given, own_tensors(model))
    blocks = find_blocks(model)
    source = sources(len(blocks.layers), every, count)
    listed: list[LazyTensor] = []
    with Reader(torch.device("cpu")) as reader:
        for name, stored in given.items():
            for target, zero in _targets(names[name], f"{blocks.name}.", source):
                read = _reader(reader, stored, zero)
                listed.append(LazyTensor(target, stored.shape, stored.dtype, read, (name, target)))
        if len(listed) == len(given):
            raise ModelError(f"fastplug.layers: the files of {folder} name no tensors under {blocks.name}")
        rearrange(blocks, source, copy.deepcopy)
        check_rebuild(model, blocks)
        with atomic_folder(out, overwrite=overwrite) as made:
            digests = write_weights(made, listed, max_shard_size)
            write_config(model, made, dtype)
            if (folder / "generation_config.json").is_file():
                write_generation_config(model, made)
            if _tokenizer(folder) is not None:
                write_tokenizer(str(folder), model, made, (), None)
            write_manifest(made, digests)
    return Path(os.path.abspath(os.path.expanduser(out)))


def _targets(name: str, prefix: str, source: list[int]) -> list[tuple[str, bool]]:
    """Where a stored tensor goes, and whether as zeros: a block's to each place that the block has now."""
    number, _, rest = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not number.isdigit():
        return [(name, False)]
    output = not OUTPUTS.isdisjoint(rest.split("."))
    places = [i for i, old in enumerate(source) if old == int(number)]
    return [(f"{prefix}{i}.{rest}", output and i > places[0]) for i in places]


def _reader(reader: Reader, stored: Stored, zero: bool) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        return torch.zeros(stored.shape, dtype=stored.dtype) if zero else reader.read(stored)

    return read


def _tokenizer(folder: Path) -> Any:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return str(folder) if any((folder / name).is_file() for name in names) else None
