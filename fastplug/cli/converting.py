"""``fastplug convert-adapter``: DoRA to LoRA, and training checkpoints to adapters as PEFT reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer

from fastplug.cli.loading import one_sentence
from fastplug.errors import ModelError, OptionError
from fastplug.layers.dora_to_lora import dora_to_lora, read_config
from fastplug.layers.sharded_adapter import adapter_tensors

SHOWN = 5  # matrices whose error is printed


def run(
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    config: Path | None = None,
    alpha: float | None = None,
    name: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    with one_sentence(f"{source} cannot be converted"):
        if (source / "adapter_config.json").is_file() and (source / "adapter_model.safetensors").is_file():
            if config is not None or alpha is not None:
                raise OptionError("fastplug: --config and --alpha are for checkpoints; this folder has a config")
            _dora(source, out, base, rank, device, overwrite)
        else:
            if rank is not None:
                raise OptionError("fastplug: --rank is for DoRA adapters; a checkpoint's adapter keeps its rank")
            _checkpoint(source, out, base, config, alpha, name, overwrite)
    typer.echo(str(out))


def _dora(source: Path, out: Path, base: str | None, rank: int | None, device: str | None, overwrite: bool) -> None:
    errors = dora_to_lora(source, out, base=base, rank=rank, device=device, overwrite=overwrite)
    typer.echo(f"{len(errors)} matrices; what is lost of each change, and in parts of the weight it changes:")
    for error in errors[:SHOWN]:
        typer.echo(f"  {error.name}: {error.relative:.1%}, {error.of_weight:.2e}")
    if len(errors) > SHOWN:
        typer.echo(f"  {len(errors) - SHOWN} others: at most {errors[SHOWN].relative:.1%}")


def _checkpoint(
    source: Path,
    out: Path,
    base: str | None,
    config: Path | None,
    alpha: float | None,
    name: str | None,
    overwrite: bool,
) -> None:
    from safetensors.torch import save_file

    from fastplug.exporters.folder import atomic_folder

    tensors = adapter_tensors(source, name)
    made = _config(source, config, tensors, alpha, base)
    with atomic_folder(out, overwrite=overwrite) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(made, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    typer.echo(f"{len(tensors)} tensors of an adapter of rank {made['r']} with alpha {made['lora_alpha']:g}")


def _config(
    source: Path, config: Path | None, tensors: dict[str, torch.Tensor], alpha: float | None, base: str | None
) -> dict[str, Any]:
    """The adapter's config: the one beside the checkpoint, or made from what the tensors say."""
    ranks = _ranks(tensors)
    place = config.parent if config is not None and config.is_file() else config
    if place is None:
        around = (source, source.parent, source.parent.parent)
        place = next((folder for folder in around if (folder / "adapter_config.json").is_file()), None)
    if place is not None:
        found = read_config(place)
        if not (found.get("rank_pattern") or {}) and set(ranks.values()) != {found["r"]}:
            raise ModelError(
                f"fastplug: {place / 'adapter_config.json'} says rank {found['r']}, and the checkpoint's adapter has "
                f"{', '.join(map(str, sorted(set(ranks.values()))))}; they belong to different runs"
            )
        return {**found, "inference_mode": True, **({"base_model_name_or_path": base} if base else {})}
    if alpha is None:
        raise ModelError(
            f"fastplug: there is no adapter_config.json beside {source}; pass the one of the run with --config, or "
            "its lora_alpha with --alpha, which the tensors do not tell"
        )
    targets = sorted({module.rpartition(".")[2] for module in ranks})
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {module.removeprefix("base_model.model."): rank for module, rank in ranks.items() if rank != most}
    dora = any(".lora_magnitude_vector" in name for name in tensors)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": most, "lora_alpha": alpha, "target_modules": targets,
        "rank_pattern": pattern, "use_dora": dora, "bias": "none", "inference_mode": True,
        "base_model_name_or_path": base,
    }  # fmt: skip


def _ranks(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Module -> rank. Raises :class:`ModelError` for an A without its B, or of another rank."""
    ranks = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            other = tensors.get(f"{name.removesuffix('lora_A.weight')}lora_B.weight")
            if other is None or other.shape[1] != tensor.shape[0]:
                raise ModelError(f"fastplug: {name} has no lora_B of its rank in the checkpoint, which is not whole")
            ranks[name.removesuffix(".lora_A.weight")] = int(tensor.shape[0])
    if not ranks:
        raise ModelError("fastplug: the checkpoint's adapter has no lora_A of a linear layer")
    return ranks
