"""Merge into a plain fp32 model, trace it with ``torch.onnx.export``, run the file in onnxruntime."""

from __future__ import annotations

import copy
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastplug.errors import MissingExtra
from fastplug.exporters.api import NOT_VERIFIED, ExportError, ExportResult
from fastplug.exporters.assembly import load_source
from fastplug.exporters.folder import atomic_folder, list_files, write_manifest
from fastplug.exporters.models import active_adapters, base_of, check_quantization, chosen_adapters
from fastplug.exporters.naming import tied_patterns, untied_names
from fastplug.exporters.onnx.graph import Decoder
from fastplug.exporters.onnx.runtime import OnnxRuntime
from fastplug.exporters.proof import BOUNDS
from fastplug.exporters.proof.reload import original_class, prove_folder
from fastplug.exporters.sidecar import (
    ties_embeddings,
    write_config,
    write_generation_config,
    write_provenance,
    write_tokenizer,
)
from fastplug.exporters.tensors import merged_tensors
from fastplug.exporters.writing import require_space

FILE = "model.onnx"


def onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    kv_cache: bool = True,
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    quant: str | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write a causal language model with its adapter merged in as ``model.onnx`` and ``model.onnx.data``, in fp32.

    Inputs: ``input_ids``, ``attention_mask``, ``position_ids``, and with a cache ``past_key_values.<layer>.key`` and
    ``.value`` ``[batch, heads, past, width]`` (``past`` may be 0). Outputs: ``logits``, and with a cache
    ``present.<layer>.key`` and ``.value``. Batch, sequence and past are free.

    Args:
        model: As for :func:`~fastplug.exporters.merged.merged_16bit`. It is copied in fp32, on the CPU.
        path: The folder to make.
        kv_cache: Whether the graph takes and gives the cache, as generation wants it.
        adapter: As for ``merged_16bit``.
        quant: As for ``merged_16bit``.
        tokenizer: As for ``merged_16bit``.
        texts: As for ``merged_16bit``.
        overwrite: Replace an existing export.
        verify: Run the file in onnxruntime, the cache included, and compare with the live model.

    Raises:
        MissingExtra: onnx or onnxscript is not installed, or onnxruntime where ``verify`` needs it.
        ExportError: The model cannot be traced; or the file is not the live model (``ProofError``).
        OSError: As for ``merged_16bit``.
    """
    began = time.perf_counter()
    _require(verify)
    with atomic_folder(path, overwrite=overwrite) as folder:
        model, adapter, places, notes = load_source(model, adapter, quant)
        base = base_of(model)
        check_quantization(base)
        names = chosen_adapters(model, adapter)  # type: ignore[arg-type]
        merged, untied = merged_model(base, names)
        require_space(folder, 2 * sum(parameter.nbytes for parameter in merged.parameters()))
        _write_graph(Decoder(merged, kv_cache), folder / FILE)
        del merged
        write_config(base, folder, torch.float32, untie=untied)
        notes += write_generation_config(base, folder)
        places += [getattr(base, "name_or_path", "") or ""]
        notes += write_tokenizer(tokenizer, base, folder, places, None)
        proof = None
        if verify:
            runtime = OnnxRuntime(folder / FILE)
            proof = prove_folder(
                model, folder, runtime, BOUNDS["onnx"], adapters=names, tokenizer=tokenizer, texts=texts, notes=notes
            )
        else:
            notes.append(NOT_VERIFIED)
        chosen = active_adapters(model) if names is None else names
        write_provenance(
            model, base, folder, "onnx", [name for name in chosen if name in getattr(model, "peft_config", {})],
            kv_cache=kv_cache, proof=None if proof is None else proof.as_dict(), notes=notes,
        )  # fmt: skip
        write_manifest(folder)
        files = list_files(folder)
        size = sum((folder / name).stat().st_size for name in files)
    final = Path(os.path.abspath(os.path.expanduser(path)))
    return ExportResult("onnx", final, files, size, time.perf_counter() - began, tuple(notes), proof)


def merged_model(base: Any, adapters: Sequence[str] | None) -> tuple[nn.Module, bool]:
    """A plain fp32 copy of ``base`` on the CPU with ``adapters`` merged in, and whether its ties were undone."""
    merge = merged_tensors(base, adapters, torch.float32)
    ties = ties_embeddings(base.config)
    untied = bool(untied_names(merge.tensors, tied_patterns(base))) if ties else False
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = False
    plain: Any = original_class(base)._from_config(config, attn_implementation="sdpa").float().eval()
    own = plain.state_dict()
    with torch.no_grad():
        for tensor in merge.tensors:
            if tensor.name not in own:
                raise ExportError(f"fastplug: a plain {type(plain).__name__} has no {tensor.name} to merge into")
            own[tensor.name].copy_(tensor.read())
    plain.requires_grad_(False)
    return plain, untied


def _write_graph(decoder: Decoder, file: Path) -> None:
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                decoder,
                decoder.example(),
                dynamo=True,
                dynamic_shapes=decoder.dynamic_shapes(),
                input_names=decoder.input_names(),
                output_names=decoder.output_names(),
                verbose=False,
            )
            program.save(file, external_data=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise ExportError(
            f"fastplug: torch.onnx.export cannot trace {type(decoder.model).__name__} "
            f"({type(error).__name__}: {reason[0][:300]}); with kv_cache=False it may, else export merged_16bit"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _require(verify: bool) -> None:
    import importlib.util

    for name in ("onnx", "onnxscript", *(("onnxruntime",) if verify else ())):
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name, "onnx", "exporting to ONNX")
