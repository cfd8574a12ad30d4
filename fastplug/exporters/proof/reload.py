"""A written folder, loaded afresh by transformers, as a runtime; and the proof that most exporters end with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastplug.exporters.api import ExportError
from fastplug.exporters.folder import digest_of
from fastplug.exporters.models import base_of, unwrap
from fastplug.exporters.proof.bounds import Bound
from fastplug.exporters.proof.compare import Proof, prove
from fastplug.exporters.proof.runtime import LiveRuntime, Runtime
from fastplug.exporters.proof.sample import PROMPTS, Sample, sample_for
from fastplug.patching.bind import MARK


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Read files back and compare their SHA-256 with what was computed while they were written.

    Raises:
        ExportError: A file differs, by one byte or more.
    """
    for name, digest in digests.items():
        if digest_of(folder / name) != digest:
            raise ExportError(
                f"fastplug: {name} does not read back as it was written: its SHA-256 differs. Nothing was kept; the "
                "disk or its connection may be failing, so export to another one"
            )


def reload(folder: Path, model: Any, **options: Any) -> Runtime:
    """What :func:`load_fresh` gives, as a runtime."""
    import transformers

    return LiveRuntime(load_fresh(folder, model, **options), name=f"transformers {transformers.__version__}")


def load_fresh(folder: Path, model: Any, **options: Any) -> Any:
    """The model in ``folder``, loaded by transformers into an unpatched model of the class of ``model``.

    Args:
        folder: A model folder.
        model: The live model, for its class and device.
        options: For ``from_pretrained``.

    Raises:
        ExportError: It does not load, or tensors are missing, unexpected or of another shape.
    """
    import transformers

    base = base_of(model)
    device = _device(base, folder)
    key = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    given = {key: "auto", "local_files_only": True, "use_safetensors": True, "output_loading_info": True, **options}
    if device.type != "cpu" or "quantization_config" in given:
        given["device_map"] = {"": device}
    try:
        loaded, info = original_class(base).from_pretrained(folder, **given)
    except Exception as error:
        raise ExportError(
            f"fastplug: what was written does not load in transformers {transformers.__version__} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}); "
            "verify=False (--no-verify) keeps it"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise ExportError(
                f"fastplug: what was written has {len(keys)} {kind.replace('_', ' ')} when it is loaded ({keys[0]})"
            )
    return loaded.eval()


def prove_folder(
    model: Any,
    folder: Path,
    candidate: Runtime,
    bound: Bound,
    *,
    adapters: Sequence[str] | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    notes: list[str] | None = None,
) -> Proof:
    """:func:`~fastplug.exporters.proof.compare.prove` with the live ``model`` and the tokenizer in ``folder``.

    Args:
        model: The live model.
        folder: The written folder; its tokenizer is loaded from there, so that it is proven too.
        candidate: The folder's weights in their runtime.
        bound: What the format may cost.
        adapters: Adapters of ``model`` to run with; None: the active ones.
        tokenizer: The live tokenizer; that of ``folder`` must give the same tokens.
        texts: Held-out text; default: a few short passages.
        notes: Where remarks are added.

    Raises:
        ProofError: Outside of the bound.
        ExportError: The written tokenizer differs from the live one.
    """
    base = base_of(model)
    sample = sample_of(base, written_tokenizer(folder, tokenizer, notes), texts)
    return prove(LiveRuntime(model, adapters), candidate, sample, bound)


def sample_of(base: Any, tokenizer: Any, texts: Sequence[str] | None = None) -> Sample:
    """The sample for a model: its vocabulary, no longer than its positions."""
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    rows = int(config.vocab_size)
    longest = int(getattr(config, "max_position_embeddings", None) or 256)
    return sample_for(tokenizer, rows, texts=texts, length=min(256, longest))


def written_tokenizer(folder: Path, live: Any = None, notes: list[str] | None = None) -> Any:
    """The tokenizer of a written folder, or None; it must give the tokens of ``live`` where that is a tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    import transformers

    try:
        found: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found("a")
    except Exception as error:
        if notes is not None:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            notes.append(f"The tokenizer does not load here ({reason[0]}); the proof ran on random tokens.")
        return None
    inner = getattr(live, "tokenizer", live)
    if callable(inner) and not isinstance(live, (str, os.PathLike)):
        added = inner.get_added_vocab() if hasattr(inner, "get_added_vocab") else {}
        for text in (*PROMPTS, *(f"a {token} b" for token in added)):
            if list(found(text)["input_ids"]) != list(inner(text)["input_ids"]):
                raise ExportError(f"fastplug: the written tokenizer reads {text!r} as other tokens than the live one")
    return found


def gives_logits(base: Any) -> bool:
    """Whether ``base`` has a head over its vocabulary, so that there is something to compare."""
    return getattr(base, "get_output_embeddings", lambda: None)() is not None


def original_class(model: Any) -> Any:
    """The class of ``model`` beneath what fastplug, FSDP and PEFT put on it."""
    cls: Any = type(unwrap(model))
    while MARK in vars(cls):
        cls = vars(cls)[MARK]
    return cls


def _device(base: Any, folder: Path) -> torch.device:
    """The device of ``base`` if the folder fits there twice over, else the CPU."""
    device: torch.device = next(base.parameters()).device
    if device.type != "cuda":
        return torch.device("cpu")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * size < free else torch.device("cpu")


__all__ = [
    "check_digests",
    "gives_logits",
    "load_fresh",
    "original_class",
    "prove_folder",
    "reload",
    "sample_of",
    "written_tokenizer",
]
