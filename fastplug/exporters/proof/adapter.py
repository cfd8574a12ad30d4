"""The proof of a written adapter: its tensors bit for bit, and its base loaded afresh with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastplug.exporters.api import ExportError
from fastplug.exporters.models import base_of, local_folder, quantizes_activations
from fastplug.exporters.proof.bounds import BOUNDS
from fastplug.exporters.proof.compare import Proof
from fastplug.exporters.proof.reload import load_fresh, prove_folder
from fastplug.exporters.proof.runtime import LiveRuntime
from fastplug.exporters.weights import repacked_for_cpu


def read_back(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Compare ``adapter_model.safetensors`` with the live tensors, bit for bit.

    Raises:
        ExportError: A tensor is missing or differs.
    """
    from safetensors.torch import load_file

    found = load_file(folder / "adapter_model.safetensors")
    for name, tensor in state.items():
        live = tensor.detach().cpu().contiguous()
        same = name in found and found[name].dtype == live.dtype and found[name].shape == live.shape
        if not same or not torch.equal(found[name].view(torch.uint8), live.view(torch.uint8)):
            raise ExportError(f"fastplug: {name} does not read back as it was written; the disk may be failing")


def prove_adapter(
    model: Any,
    folder: Path,
    name: str,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    notes: list[str] | None = None,
) -> list[Proof]:
    """Load the base of ``model`` from this disk, put the adapter in ``folder`` on it, compare with the live model.

    Returns:
        The proof; nothing where the base does not lie on this disk, which is noted.

    Raises:
        ProofError: Outside of the bound.
        ExportError: The adapter does not load.
    """
    import peft

    base = base_of(model)
    source = local_folder(getattr(base, "name_or_path", "") or "")
    if source is None or not (source / "config.json").is_file():
        if notes is not None:
            notes.append("The base is not on this disk: the adapter's tensors were compared, its logits were not.")
        return []
    quantization = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    options = {} if quantization is None else {"quantization_config": quantization}
    fresh = load_fresh(source, model, **options)
    rows = base.get_input_embeddings().weight.shape[0]
    if fresh.get_input_embeddings().weight.shape[0] != rows:
        fresh.resize_token_embeddings(rows, mean_resizing=False)
    try:
        wrapped = peft.PeftModel.from_pretrained(fresh, str(folder))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"fastplug: the written adapter does not load on {source}: {reason[0]}") from error
    bound = BOUNDS["lora"]
    if any(repacked_for_cpu(parameter) for parameter in base.parameters()):
        bound = bound.widened(BOUNDS["repacked 4-bit scales"])
    if quantizes_activations(base):
        bound = bound.widened(BOUNDS["8-bit activations"])
    candidate = LiveRuntime(wrapped.eval(), name=f"PEFT {peft.__version__}")
    written = folder if (folder / "tokenizer_config.json").is_file() else source
    proof = prove_folder(
        model, written, candidate, bound, adapters=[name], tokenizer=tokenizer, texts=texts, notes=notes
    )  # fmt: skip
    return [proof]


__all__ = ["prove_adapter", "read_back"]
