"""What every merged format does: load, merge, encode, write, prove, describe, in a folder that appears whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastplug.errors import OptionError
from fastplug.exporters.api import NOT_VERIFIED, ExportError, ExportResult
from fastplug.exporters.folder import atomic_folder, list_files, write_manifest
from fastplug.exporters.models import (
    active_adapters,
    adapter_configs,
    base_of,
    check_quantization,
    chosen_adapters,
    load,
    named_base,
    quantizes_activations,
    sixteen_bit,
)
from fastplug.exporters.naming import drop_tied, saved_tensors, tied_patterns, untied_names
from fastplug.exporters.originals import Originals
from fastplug.exporters.proof import BOUNDS, Bound, Proof
from fastplug.exporters.proof.reload import check_digests, gives_logits, prove_folder, reload
from fastplug.exporters.sidecar import (
    ties_embeddings,
    write_config,
    write_generation_config,
    write_provenance,
    write_tokenizer,
)
from fastplug.exporters.tensors import LazyTensor, Merge, merged_tensors
from fastplug.exporters.writing import write_weights


@dataclass(frozen=True)
class Encoded:
    """Merged tensors in the form in which a format stores them.

    Attributes:
        tensors: What is written.
        quantization_config: For ``config.json``; None for plain weights.
        notes: What to look at.
        reload: Options for ``from_pretrained`` in the proof.
    """

    tensors: list[LazyTensor]
    quantization_config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    reload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """A format of merged weights.

    Attributes:
        name: As in ``format=``.
        dtype: What plain weights are written in; None: the base's own 16-bit dtype.
        encode: Turns the merged tensors (those of linear layers in fp32), the dtype of the rest and the names of the
            heads into stored ones; None: they are stored plain.
    """

    name: str
    dtype: torch.dtype | None = None
    encode: Callable[[Sequence[LazyTensor], torch.dtype, Sequence[str]], Encoded] | None = None

    def bound(self, base: Any, original: bool) -> Bound:
        """What the proof allows: the format's own bound, widened by what the live model computes otherwise."""
        bound = BOUNDS[self.name]
        if original:
            bound = bound.widened(BOUNDS["onto the original base"])
        if quantizes_activations(base):
            bound = bound.widened(BOUNDS["8-bit activations"])
        return bound


def write_merged(
    model: Any,
    path: str | os.PathLike[str],
    form: Merged,
    *,
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quant: str | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
    finish: Callable[[Path, Proof | None], list[str]] | None = None,
) -> ExportResult:
    """Write ``model`` in ``form``. The arguments are those of :func:`~fastplug.exporters.merged.merged_16bit`.

    ``finish`` may add files to the folder before the checksums are taken, and returns notes.
    """
    began = time.perf_counter()
    with atomic_folder(path, overwrite=overwrite) as folder:
        model, adapter, places, notes = load_source(model, adapter, quant)
        plain = base_of(model)
        check_quantization(plain)
        target = form.dtype or sixteen_bit(plain)
        names = chosen_adapters(model, adapter)  # type: ignore[arg-type]
        originals = None if base is None else Originals(base)
        exact = form.encode is not None
        merge = merged_tensors(plain, names, target, _keep_fp32(plain), originals=originals, exact_linear=exact)
        chosen = active_adapters(model) if names is None else names
        notes += _check_adapters(model, merge, chosen)

        patterns = tied_patterns(plain) if ties_embeddings(plain.config) else []  # else nothing is tied when it loads
        untie = bool(untied_names(merge.tensors, patterns))
        if untie:
            notes.append("Training untied weights that the base ties; both are written and tie_word_embeddings is off.")
        tensors = saved_tensors(plain, merge.tensors if untie else drop_tied(merge.tensors, patterns))
        heads = [tensor.linear for tensor in merge.tensors if tensor.head and tensor.linear]
        encoded = Encoded(tensors) if form.encode is None else form.encode(tensors, target, heads)
        notes += encoded.notes
        digests = write_weights(folder, encoded.tensors, max_shard_size, grouped=form.encode is not None)
        if originals is not None:
            notes += originals.notes()

        write_config(plain, folder, target, untie=untie, quantization=encoded.quantization_config)
        notes += write_generation_config(plain, folder)
        places += [getattr(plain, "name_or_path", "") or ""]
        notes += write_tokenizer(tokenizer, plain, folder, places, _embedding_rows(plain))
        proof = None
        if verify:
            check_digests(folder, digests)
            candidate = reload(folder, model, **encoded.reload)
            if gives_logits(plain):
                proof = prove_folder(
                    model, folder, candidate, form.bound(plain, originals is not None),
                    adapters=names, tokenizer=tokenizer, texts=texts, notes=notes,
                )  # fmt: skip
            else:
                notes.append("Reloaded, but not compared: the model gives no logits for each token.")
        else:
            notes.append(NOT_VERIFIED)
        write_provenance(
            model, plain, folder, form.name, [name for name in chosen if name in adapter_configs(model)],
            dtype=str(target).removeprefix("torch."), merged_tensors=len(merge.merged), replaced_modules=merge.replaced,
            scales={name: sorted(values) for name, values in merge.scales.items()},
            merged_onto="original base" if originals is not None else "base as loaded",
            proof=None if proof is None else proof.as_dict(), notes=notes,
        )  # fmt: skip
        if finish is not None:
            notes += finish(folder, proof)
        write_manifest(folder, digests)
        files = list_files(folder)
        size = sum((folder / name).stat().st_size for name in files)
    final = Path(os.path.abspath(os.path.expanduser(path)))
    return ExportResult(form.name, final, files, size, time.perf_counter() - began, tuple(notes), proof)


def load_source(model: Any, adapter: Any, quant: str | None = None) -> tuple[Any, Any, list[str], list[str]]:
    """The model if ``model`` is a folder, with its adapter: (model, adapter names, tokenizer places, notes)."""
    if not isinstance(model, (str, os.PathLike)):
        if quant is not None:
            raise OptionError("fastplug: quant= says how a folder is loaded; a live model is as it is")
        return model, adapter, [], []
    if adapter is not None and not isinstance(adapter, (str, os.PathLike)):
        raise OptionError("fastplug: with a model folder, adapter= is the folder of one adapter")
    places = [os.fspath(place) for place in (adapter, model) if place is not None]
    loaded = load(model, adapter, quant)
    notes = []
    named = named_base(loaded)
    where = getattr(base_of(loaded), "name_or_path", "")
    if named and where and os.path.basename(named.rstrip("/")) != os.path.basename(os.fspath(where).rstrip("/")):
        notes.append(f"The adapter was trained on {named!r} and is merged onto {where!r}; make sure they are the same.")
    return loaded, None, places, notes


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


__all__ = ["Encoded", "Merged", "load_source", "write_merged"]
