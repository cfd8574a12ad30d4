"""``gguf_lora``: the adapter alone, as a file that llama.cpp puts on a GGUF of the base (``--lora``)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastplug.errors import OptionError
from fastplug.exporters.api import NOT_VERIFIED, ExportError, ExportResult
from fastplug.exporters.assembly import _embedding_rows
from fastplug.exporters.folder import atomic_folder, digest_of, list_files, write_manifest
from fastplug.exporters.gguf import converter
from fastplug.exporters.gguf.export import file_name, sequence_length, write_gguf
from fastplug.exporters.gguf.types import TYPES
from fastplug.exporters.gguf.verify import prove_files
from fastplug.exporters.libllama import LibLlama
from fastplug.exporters.merging import lora_terms
from fastplug.exporters.models import active_adapters, adapter_configs, base_of, chosen_adapters
from fastplug.exporters.naming import drop_tied, saved_tensors, tied_patterns
from fastplug.exporters.proof.reload import check_digests, written_tokenizer
from fastplug.exporters.sidecar import write_config, write_provenance, write_tokenizer
from fastplug.exporters.tensors import merged_tensors, peft_kind

_WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module")


def gguf_lora(
    model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | Sequence[str] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    libllama: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write the adapter of a live model as a GGUF-LoRA file.

    Several active adapters become one of their ranks together; rsLoRA and the patterns of ranks and alphas are in the
    factors, so the file is used at scale 1.

    Args:
        model: A PeftModel, or a transformers model with adapters of its own, patched by fastplug or not.
        path: The folder to make, with one file ``<name>-lora-<TYPE>.gguf``.
        adapter: Names of the adapters; default: the active ones.
        dtype: ``"float32"`` or ``"float16"``.
        tokenizer, texts, name, pre_tokenizer, llama_cpp, libllama, threads, overwrite: As for ``gguf``.
        verify: Write the base as a GGUF file too, for a while, and compare it with the adapter on it with the live
            model.

    Raises:
        ExportError: The adapter has parts that a GGUF-LoRA file cannot hold (DoRA, ``modules_to_save``, trainable
            tokens, biases, expert stacks): then ``gguf`` merges them; or the file is outside of its bound.
        OptionError, MissingConverter, MissingLibLlama, OSError: As for ``gguf``.
    """
    began = time.perf_counter()
    if dtype not in ("float32", "float16"):
        raise OptionError(f'fastplug: gguf_lora writes "float32" or "float16", not {dtype!r}')
    row = TYPES["F32" if dtype == "float32" else "F16"]
    root = converter.find(llama_cpp)
    with atomic_folder(path, overwrite=overwrite) as folder:
        plain = base_of(model)
        names = chosen_adapters(model, adapter)
        names = tuple(active_adapters(model)) if names is None else names
        factors = lora_factors(plain, names)
        work = folder / ".work"
        work.mkdir()
        write_config(plain, work, torch.float32)
        name = name or os.path.basename(str(getattr(plain, "name_or_path", "")).rstrip("/")) or "model"
        stem = file_name(name)
        file = folder / f"{stem}-lora-{row.name}.gguf"
        converter.convert_lora(root, work, file, factors, ftype=row.ftype, name=f"{name} adapter")
        digests, proof = {file.name: digest_of(file)}, None
        notes: list[str] = []
        if verify:
            places = [str(getattr(plain, "name_or_path", "") or "")]
            if write_tokenizer(tokenizer, plain, work, places, _embedding_rows(plain)):
                raise ExportError("fastplug: the proof needs the base's tokenizer; pass tokenizer= or verify=False")
            merge = merged_tensors(plain, (), None, exact_linear=True)
            tensors = saved_tensors(plain, drop_tied(merge.tensors, tied_patterns(plain)))
            write_gguf(root, work, work / "base.gguf", tensors, TYPES["F16"], name, pre_tokenizer)
            with LibLlama(libllama, quantizer=False, threads=threads) as llama:
                proofs = prove_files(
                    llama, model, {TYPES["F16"]: work / "base.gguf"}, written_tokenizer(work, tokenizer, notes),
                    adapters=names, texts=texts, length=sequence_length(plain), lora=file,
                )  # fmt: skip
            (proof,) = proofs.values()
            notes.append(f"{file.name} on {proof}")
            check_digests(folder, digests)
        else:
            notes.append(NOT_VERIFIED)
        shutil.rmtree(work)
        write_provenance(
            model, plain, folder, "gguf_lora", [item for item in names if item in adapter_configs(model)],
            proof=None if proof is None else proof.as_dict(), notes=notes,
        )  # fmt: skip
        write_manifest(folder, digests)
        listed = list_files(folder)
        size = sum((folder / item).stat().st_size for item in listed)
    final = Path(os.path.abspath(os.path.expanduser(path)))
    return ExportResult("gguf_lora", final, listed, size, time.perf_counter() - began, tuple(notes), proof)


def lora_factors(base: Any, adapters: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """``A: [rank, in]`` and ``scale * B: [out, rank]`` in fp32 by the name of the weight; adapters side by side.

    Raises:
        ExportError: A part of the adapter that is not a product of two factors, or no adapter at all.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in base.named_modules():
        kind = peft_kind(module)
        name = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        if kind == "LoraLayer":
            terms = lora_terms(module, adapters, name)
            if not terms:
                continue
            if any(term.magnitude is not None for term in terms):
                raise _unfit(f"DoRA on {name}")
            ups = (module.lora_B[term.adapter] for term in terms if term.adapter in module.lora_B)
            if any(up.bias is not None for up in ups):
                raise _unfit(f"a bias of the adapter on {name}")
            down = torch.cat([term.A.detach().float().cpu() for term in terms])
            up = torch.cat([term.B.detach().float().cpu() * term.scale for term in terms], dim=1)
            if getattr(module, "fan_in_fan_out", False) and not isinstance(module.get_base_layer(), nn.Embedding):
                down, up = up.T, down.T  # the weight is stored as [in, out], and so the converter expects it
            found[f"{name}.weight"] = (down.contiguous(), up.contiguous())
        elif kind and any(item in getattr(module, "active_adapters", ()) for item in adapters):
            what = {"ModulesToSaveWrapper": "modules_to_save", "ParamWrapper": "LoRA on the expert stack"}
            raise _unfit(f"{what.get(kind, 'trained tokens')} ({name})")
    if not found:
        raise ExportError(
            f'fastplug: {type(base).__name__} has no LoRA adapter to write; format="gguf" writes the model'
        )
    return found


def _unfit(what: str) -> ExportError:
    return ExportError(f'fastplug: a GGUF-LoRA file cannot hold {what}; format="gguf" merges it into the model')


__all__ = ["gguf_lora", "lora_factors"]
