"""``lora``: the adapter alone, in PEFT's layout, in a folder that appears whole or not at all."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastplug.errors import MissingExtra
from fastplug.exporters.api import NOT_VERIFIED, ExportError, ExportResult
from fastplug.exporters.folder import atomic_folder, list_files, write_manifest
from fastplug.exporters.models import active_adapters, adapter_configs, base_of, chosen_adapters, local_folder, unwrap
from fastplug.exporters.proof import Proof
from fastplug.exporters.proof.adapter import prove_adapter, read_back
from fastplug.exporters.proof.reload import gives_logits
from fastplug.exporters.sidecar import write_provenance, write_tokenizer
from fastplug.exporters.weights import refuse_sharded


def lora(
    model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    save_embedding_layers: bool | None = None,
    texts: Sequence[str] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    extra: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write the adapter of a live model, as ``PeftModel.from_pretrained`` and inference servers read it.

    Args:
        model: A PeftModel, or a transformers model with adapters of its own, patched by fastplug or not.
        path: The folder to make. One adapter lies in it directly, whatever its name; several lie in folders of their
            names, as PEFT writes them.
        adapter: Names of the adapters; default: the active ones.
        tokenizer: A tokenizer or its folder to write beside it (for added tokens); default: none.
        save_embedding_layers: Whether the embeddings are written too; default: where PEFT would (they are targeted,
            or the vocabulary was resized), decided without asking the network.
        texts: Held-out texts for the proof; default: a few built-in passages.
        overwrite: Replace an existing export.
        verify: Compare the written tensors with the live ones; and where the base lies on this disk, load it afresh,
            put the written adapter on it and compare it with the live model.
        extra: Further text files, by name.

    Raises:
        ExportError: The model has no adapter, or its tensors are sharded; or the written files are not the live
            adapter (``ProofError``).
        OptionError: An unknown adapter.
        OSError: ``path`` exists, cannot be written, or the disk is full. Nothing is left under ``path``.
    """
    began = time.perf_counter()
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtra("peft", "hf", "exporting an adapter") from error
    with atomic_folder(path, overwrite=overwrite) as folder:
        base = base_of(model)
        configs = adapter_configs(model)
        names = chosen_adapters(model, adapter)
        names = tuple(name for name in active_adapters(model) if name in configs) if names is None else names
        if not names:
            raise ExportError(
                f"fastplug: {type(base).__name__} has no {'active ' if configs else ''}adapter to write; "
                + ("name one with adapter=" if configs else 'format="merged_16bit" writes the whole model')
            )
        tensors = _tensors(unwrap(model))
        written: dict[Path, dict[str, Tensor]] = {}
        for name in names:
            target = folder if len(names) == 1 else folder / name
            embeddings: bool | str | None = save_embedding_layers
            if embeddings is None:
                embeddings = _embeddings_changed(base, configs[name])
            written[target] = _write_adapter(unwrap(model), base, target, name, configs[name], tensors, embeddings)
        if tokenizer is not None:
            write_tokenizer(tokenizer, base, folder, (), None)
        notes: list[str] = []
        proofs: list[Proof] = []
        if verify:
            for (target, state), name in zip(written.items(), names):
                read_back(target, state)
                if gives_logits(base):
                    proofs += prove_adapter(model, target, name, tokenizer=tokenizer, texts=texts, notes=notes)
        else:
            notes.append(NOT_VERIFIED)
        proof = max(proofs, key=lambda one: one.kl, default=None)
        write_provenance(
            model, base, folder, "lora", names, proof=None if proof is None else proof.as_dict(), notes=notes
        )
        for name, text in (extra or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        write_manifest(folder)
        files = list_files(folder)
        size = sum((folder / name).stat().st_size for name in files)
    final = Path(os.path.abspath(os.path.expanduser(path)))
    return ExportResult("lora", final, files, size, time.perf_counter() - began, tuple(notes), proof)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name. Not ``state_dict()``: bitsandbytes repacks its weights there, in place."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        if getattr(tensor, "requires_grad", False) or "lora_" in name:
            refuse_sharded(tensor, name)
    return tensors


def _write_adapter(
    model: Any, base: Any, folder: Path, name: str, config: Any, tensors: Mapping[str, Tensor], embeddings: bool | str
) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(
        model, state_dict=dict(tensors), adapter_name=name, save_embedding_layers=embeddings
    )
    if not hasattr(model, "get_base_model"):  # adapters added by transformers lack the prefix of a PeftModel
        state = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    if not state:
        raise ExportError(f"fastplug: adapter {name!r} has no tensors; was the model unloaded?")
    folder.mkdir(exist_ok=True)
    copies = {key: tensor.detach().contiguous().clone() for key, tensor in state.items()}
    save_file(copies, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    mapping = None
    if config.task_type is None:  # what PEFT's AutoPeftModel needs to find the class again
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(folder, auto_mapping_dict=mapping)
    return state


def _embeddings_changed(base: Any, config: Any) -> bool | str:
    """PEFT's rule for ``save_embedding_layers="auto"``, with the base's config from the disk alone."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    token_rows = getattr(config, "trainable_token_indices", None) is not None or "TRAINABLE_TOKENS" in str(
        config.peft_type
    )
    targets = getattr(config, "target_modules", None) or ()
    if not token_rows and not isinstance(targets, str) and any(name in targets for name in EMBEDDING_LAYER_NAMES):
        return "auto"  # PEFT then writes the targeted ones, and does not ask the network
    folder = local_folder(config.base_model_name_or_path or "")
    if folder is None or not (folder / "config.json").is_file():
        return False
    stored = type(base.config).from_pretrained(folder, local_files_only=True)
    return getattr(stored, "vocab_size", None) != getattr(base.config, "vocab_size", None)
