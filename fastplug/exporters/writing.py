"""Weights into a folder: shards and index as ``save_pretrained`` names them, written tensor by tensor."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastplug.errors import MissingExtra, OptionError
from fastplug.exporters.api import ExportError
from fastplug.exporters.safetensors_stream import DTYPES, SafetensorsWriter, TensorSpec, file_order
from fastplug.exporters.tensors import LazyTensor

_SLACK = 64 << 20  # bytes for the small files and the file system's own


def write_weights(
    folder: Path, tensors: Sequence[LazyTensor], max_shard_size: int | str = "5GB", *, grouped: bool = False
) -> dict[str, str]:
    """Write the shards and their index.

    Args:
        folder: Where to.
        tensors: What to write.
        max_shard_size: Largest size of a file, in bytes or as in ``"5GB"``.
        grouped: Compute the tensors in the order of the list and not in that of the file, for those that are computed
            several at a time (a 4-bit weight and its scales).

    Returns:
        The SHA-256 of each shard, computed from what was written.

    Raises:
        OSError: The weights do not fit on the disk.
        ExportError: A tensor of a dtype that safetensors does not have.
        OptionError: Not a size.
    """
    try:
        from huggingface_hub import split_state_dict_into_shards_factory
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "writing a model folder") from error
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ExportError(f"fastplug: {tensor.name} is {tensor.dtype}, which safetensors does not hold")
    specs = {tensor.name: TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors}
    require_space(folder, sum(spec.nbytes for spec in specs.values()))
    try:
        split: Any = split_state_dict_into_shards_factory(
            specs,  # type: ignore[arg-type]
            get_storage_size=lambda spec: spec.nbytes,  # type: ignore[attr-defined]
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise OptionError(f'fastplug: max_shard_size is a size like "5GB", not {max_shard_size!r}') from error
    by_name = {tensor.name: tensor for tensor in tensors}
    digests = {}
    for file, names in split.filename_to_tensors.items():
        order = file_order([specs[name] for name in names])
        with SafetensorsWriter(folder / file, order, {"format": "pt"}, ordered=not grouped) as writer:
            for name in names if grouped else [spec.name for spec in order]:
                writer.write(name, by_name[name].read())
        digests[file] = writer.sha256
    if split.is_sharded:
        count = sum(torch.Size(tensor.shape).numel() for tensor in tensors if tensor.parameter)
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return digests


def require_space(folder: Path, size: int) -> None:
    """Raise ``OSError`` (``ENOSPC``) if ``size`` bytes do not fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if size + _SLACK > free:
        raise OSError(
            errno.ENOSPC,
            f"fastplug: the model takes {size / 2**30:.2f} GiB, but the disk of {folder.parent} has only "
            f"{free / 2**30:.2f} GiB left; free some space or export to another disk",
        )
