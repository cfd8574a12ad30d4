"""``merged_16bit`` and ``merged_32bit``: the model with its adapter merged in, as a folder that any host loads.

Every weight is ``base + scale * B @ A`` in fp32, rounded once. The tensors are computed, written and forgotten one by
one, so the export needs memory for the largest tensor and not for a second model, and the trained model is only read.

An adapter that was trained on a quantized base can be merged in two ways. Onto the base as it was decoded in training
(the default): the file behaves like the model that was trained. Or, with ``base=``, onto the original 16-bit weights:
their quantization error is gone, but the adapter was trained to live with it. Each prints how far it is from the live
model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch

from fastplug.errors import OptionError
from fastplug.exporters.api import ExportResult
from fastplug.exporters.assembly import Merged, write_merged


def merged_16bit(
    model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quant: Literal["nf4", "fp4", "int8"] | None = None,
    dtype: Literal["bfloat16", "float16"] | torch.dtype | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
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
        base: The folder of the original 16-bit base. Weights that the model holds quantized are taken from there.
        quant: For a folder: load it in bitsandbytes' ``"nf4"``, ``"fp4"`` or ``"int8"``, as a QLoRA training did, so
            that the merge starts from the same decoded weights.
        dtype: ``"bfloat16"`` or ``"float16"``; default is the base's own 16-bit dtype, bf16 if it has none.
        tokenizer: A tokenizer or processor, or its folder. Default: the files beside the adapter or the base.
        texts: Held-out texts for the proof; default: a few built-in passages.
        max_shard_size: Largest size of a file, in bytes or as in ``"5GB"``.
        overwrite: Replace an existing export.
        verify: Read the files back, reload them in transformers and compare with the live model.

    Returns:
        What was written. ``notes`` says what to look at, ``proof`` how far it is from the live model.

    Raises:
        ExportError: A weight that cannot be decoded or an adapter state that cannot be merged, naming the module; or
            the written files are not the live model (``ProofError``).
        OptionError: An impossible ``dtype`` or an unknown adapter.
        OSError: ``path`` exists, cannot be written, or the disk is full. Nothing is left under ``path``.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (None, torch.bfloat16, torch.float16) or (dtype is not None and found is None):
        raise OptionError(f"fastplug: merged_16bit writes bfloat16 or float16, not {dtype!r}")
    return write_merged(
        model, path, Merged("merged_16bit", found), adapter=adapter, base=base, quant=quant, tokenizer=tokenizer,
        texts=texts, max_shard_size=max_shard_size, overwrite=overwrite, verify=verify,
    )  # fmt: skip


def merged_32bit(
    model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quant: Literal["nf4", "fp4", "int8"] | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write a model with its adapter merged in, as fp32 safetensors: nothing is rounded, at twice the size.

    The arguments, results and errors are those of :func:`merged_16bit`.
    """
    return write_merged(
        model, path, Merged("merged_32bit", torch.float32), adapter=adapter, base=base, quant=quant,
        tokenizer=tokenizer, texts=texts, max_shard_size=max_shard_size, overwrite=overwrite, verify=verify,
    )  # fmt: skip
