"""``merged_16bit``: the model with its adapter merged in, as a folder that any host loads.

Every weight is ``base + scale * B @ A`` in fp32, rounded once to bf16 or fp16. The tensors are computed, written and
forgotten one by one, so the export needs memory for the largest tensor and not for a second model, and the trained
model is only read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fastplug.errors import MissingExtra, OptionError
from fastplug.exporters.api import ExportError, ExportResult
from fastplug.exporters.folder import atomic_folder, list_files, write_manifest
from fastplug.exporters.models import (
    active_adapters,
    adapter_configs,
    base_of,
    check_quantization,
    chosen_adapters,
    load,
    sixteen_bit,
)
from fastplug.exporters.naming import drop_tied, saved_tensors, tied_patterns, untied_names
from fastplug.exporters.safetensors_stream import DTYPES, SafetensorsWriter, TensorSpec, file_order
from fastplug.exporters.sidecar import (
    ties_embeddings,
    write_config,
    write_generation_config,
    write_provenance,
    write_tokenizer,
)
from fastplug.exporters.tensors import LazyTensor, Merge, merged_tensors

_SLACK = 64 << 20  # bytes for the small files and the file system's own


def merged_16bit(
    model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    dtype: Literal["bfloat16", "float16"] | torch.dtype | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write a model with its adapter merged in, as 16-bit safetensors.

    Args:
        model: A PeftModel, a transformers model with or without adapters of its own, patched by fastplug or not; or
            the folder of a model or of an adapter.
        path: The folder to make. It appears when it is complete.
        adapter: For a live model, the names of the adapters to merge (default: the active ones, in their order). For
            a folder, the adapter's folder.
        dtype: ``"bfloat16"`` or ``"float16"``; default is the base's own 16-bit dtype, bf16 if it has none.
        tokenizer: A tokenizer or processor, or its folder. Default: the files beside the adapter or the base.
        max_shard_size: Largest size of a file, in bytes or as in ``"5GB"``.
        overwrite: Replace an existing export.
        verify: Read the headers of the finished files back with the safetensors library.

    Returns:
        What was written. ``notes`` says what to look at.

    Raises:
        ExportError: A weight that cannot be decoded or an adapter state that cannot be merged, naming the module.
        OptionError: An impossible ``dtype`` or an unknown adapter.
        OSError: ``path`` exists, cannot be written, or the disk is full. Nothing is left under ``path``.
    """
    began = time.perf_counter()
    target = _dtype(dtype)
    with atomic_folder(path, overwrite=overwrite) as folder:
        places: list[str] = []
        if isinstance(model, (str, os.PathLike)):
            if adapter is not None and not isinstance(adapter, (str, os.PathLike)):
                raise OptionError("fastplug: with a model folder, adapter= is the folder of one adapter")
            places = [os.fspath(place) for place in (adapter, model) if isinstance(place, (str, os.PathLike))]
            model, adapter = load(model, adapter), None
        base = base_of(model)
        check_quantization(base)
        target = target or sixteen_bit(base)
        names = chosen_adapters(model, adapter)  # type: ignore[arg-type]
        merge = merged_tensors(base, names, target, _keep_fp32(base))
        chosen = active_adapters(model) if names is None else names
        notes = _check_adapters(model, merge, chosen)

        patterns = tied_patterns(base) if ties_embeddings(base.config) else []  # else nothing is tied when it loads
        untie = bool(untied_names(merge.tensors, patterns))
        if untie:
            notes.append("Training untied weights that the base ties; both are written and tie_word_embeddings is off.")
        tensors = saved_tensors(base, merge.tensors if untie else drop_tied(merge.tensors, patterns))
        digests = _write_weights(folder, tensors, max_shard_size, verify)

        write_config(base, folder, target, untie=untie)
        notes += write_generation_config(base, folder)
        places += [getattr(base, "name_or_path", "") or ""]
        notes += write_tokenizer(tokenizer, base, folder, places, _embedding_rows(base))
        write_provenance(
            model, base, folder, "merged_16bit", [name for name in chosen if name in adapter_configs(model)],
            dtype=str(target).removeprefix("torch."), merged_tensors=len(merge.merged), replaced_modules=merge.replaced,
            scales={name: sorted(values) for name, values in merge.scales.items()}, notes=notes,
        )  # fmt: skip
        write_manifest(folder, digests)
        files = list_files(folder)
        size = sum((folder / name).stat().st_size for name in files)
    final = Path(os.path.abspath(os.path.expanduser(path)))
    return ExportResult("merged_16bit", final, files, size, time.perf_counter() - began, tuple(notes))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.bfloat16, torch.float16):
        raise OptionError(f"fastplug: merged_16bit writes bfloat16 or float16, not {dtype!r}")
    return found


def _keep_fp32(base: Any) -> list[str]:
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return [pattern for name in names for pattern in getattr(base, name, None) or ()]


def _embedding_rows(base: Any) -> int | None:
    embedding = base.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows) if rows is not None else None


def _check_adapters(model: Any, merge: Merge, chosen: Sequence[str]) -> list[str]:
    """Notes about adapters that do nothing; an adapter that no layer holds is an error, not a copy of the base."""
    notes = []
    if adapter_configs(model) and not merge.merged and not merge.replaced:
        raise ExportError(
            f"fastplug: no layer holds an active adapter ({', '.join(chosen) or 'none is active'}), so a merge "
            "would write the base weights; activate one with model.set_adapter(name), or name it with adapter="
        )
    if merge.merged and len(merge.unchanged) == len(merge.merged) and not merge.replaced:
        notes.append("The adapter changes nothing (B is zero everywhere): these are the base weights. Was it trained?")
    if merge.repacked:
        notes.append(
            f"bitsandbytes repacked {len(merge.repacked)} 4-bit weights when the model was evaluated on this CPU, "
            "which rounds their scales to bf16; the merge starts from those. Export before evaluating to avoid it."
        )
    return notes


def _write_weights(folder: Path, tensors: list[LazyTensor], max_shard_size: int | str, verify: bool) -> dict[str, str]:
    """Write the shards and their index; returns the SHA-256 of each shard."""
    try:
        from huggingface_hub import split_state_dict_into_shards_factory
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "merged_16bit") from error
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ExportError(f"fastplug: {tensor.name} is {tensor.dtype}, which merged_16bit does not write")
    specs = {tensor.name: TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors}
    total, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(folder).free
    if total + _SLACK > free:
        raise OSError(
            errno.ENOSPC,
            f"fastplug: the merged model takes {total / 2**30:.2f} GiB, but the disk of {folder.parent} has only "
            f"{free / 2**30:.2f} GiB left; free some space or export to another disk",
        )
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
        with SafetensorsWriter(folder / file, order, {"format": "pt"}) as writer:
            for spec in order:
                writer.write(spec.name, by_name[spec.name].read())
        digests[file] = writer.sha256
        if verify:
            _read_back(folder / file, order)
    if split.is_sharded:
        count = sum(torch.Size(tensor.shape).numel() for tensor in tensors if tensor.parameter)
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return digests


def _read_back(file: Path, specs: Sequence[TensorSpec]) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118, not a mapping
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    planned = {spec.name: (spec.shape, DTYPES[spec.dtype]) for spec in specs}
    if found != planned:
        raise ExportError(f"fastplug: {file.name} does not read back as it was written; the disk may be failing")
