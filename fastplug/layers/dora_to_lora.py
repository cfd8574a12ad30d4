"""A DoRA adapter as a LoRA adapter of a given rank, for servers that know LoRA only.

DoRA's change of a weight is D = c · (W + s B A) - W with c = m / ||W + s B A||, row by row. Its best approximation of
rank r is its truncated singular value decomposition (Eckart and Young 1936): D ~ (U √S) (√S Vᵀ). The magnitudes make D
a matrix of full rank, so something is lost; how much is told for each matrix.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastplug.errors import ModelError, OptionError
from fastplug.layers.loading import model_config, model_folder
from fastplug.layers.reading import Reader, Stored, header_of, tensors_of
from fastplug.layers.stored_weights import stored_weights
from fastplug.ops.table import table_for

EXACT = 1024  # the smaller side up to which the whole decomposition is computed
OVERSAMPLING, ITERATIONS = 32, 6  # of the randomized one (Halko et al. 2011, arXiv:0909.4061)
PREFIX = "base_model.model."


@dataclass(frozen=True)
class MatrixError:
    """What was lost of one matrix.

    Attributes:
        name: The module.
        relative: ||D - B A|| / ||D||, in the Frobenius norm.
        of_weight: The same error over the norm of the base weight.
    """

    name: str
    relative: float
    of_weight: float


def dora_to_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> list[MatrixError]:
    """Write the LoRA adapter that is next to a DoRA adapter.

    Args:
        adapter: The folder of a DoRA adapter in PEFT's layout.
        out: The folder to make.
        base: The folder of the base model it was trained on, in any format that :func:`fastplug.layers.load` reads.
            Default: the one that its config names.
        rank: Of the LoRA adapter. Default: twice that of the DoRA adapter.
        device: Where the decompositions are computed. Default: the first GPU, else the CPU.
        overwrite: Replace an existing adapter folder.

    Returns:
        The error of each matrix, the largest first.

    Raises:
        ModelError: Not a DoRA adapter, or the base does not have the matrices it was trained on.
        OptionError: A rank that is not positive or larger than a matrix.
    """
    from fastplug.exporters.folder import atomic_folder

    folder = Path(adapter)
    config = read_config(folder)
    if not config.get("use_dora"):
        raise ModelError(f"fastplug: {folder} is no DoRA adapter (use_dora is off), so there is nothing to convert")
    source = base if base is not None else config.get("base_model_name_or_path")
    if not source:
        raise ModelError(f"fastplug: {folder} does not say which base it was trained on; pass its folder with base=")
    weights = _Base(model_folder(source))
    given = header_of(folder / "adapter_model.safetensors")
    rank = rank if rank is not None else 2 * int(config["r"])
    if rank < 1:
        raise OptionError(f"fastplug: rank {rank} is impossible")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tensors: dict[str, torch.Tensor] = {}
    errors: list[MatrixError] = []
    with torch.no_grad(), Reader(where) as reader:
        for name, stored in given.items():
            if ".lora_" not in name:
                tensors[name] = reader.read(stored).cpu()
            elif name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                a, b, error = _convert(module, given, reader, weights, config, rank)
                tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a.cpu(), b.cpu()
                errors.append(error)
    made = {**config, "use_dora": False, "use_rslora": False, "r": rank, "lora_alpha": rank, "rank_pattern": {},
            "alpha_pattern": {}, "init_lora_weights": True}  # fmt: skip
    with atomic_folder(out, overwrite=overwrite) as target:
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / "adapter_config.json").write_text(json.dumps(made, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted(errors, key=lambda error: -error.relative)


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder. Raises :class:`ModelError` where it is no LoRA adapter's."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"fastplug: {folder} has no readable adapter_config.json: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"fastplug: {folder} is a {config.get('peft_type')} adapter, not LORA")
    return config


def scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's factor on the update of ``module``: alpha, which a pattern may name, over the rank or its root."""
    patterns = config.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = config["lora_alpha"] if key is None else patterns[key]
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _convert(
    module: str,
    given: dict[str, Stored],
    reader: Reader,
    weights: _Base,
    config: dict[str, Any],
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, MatrixError]:
    def part(*names: str) -> torch.Tensor:
        found = next((f"{module}.{name}" for name in names if f"{module}.{name}" in given), None)
        if found is None:
            raise ModelError(f"fastplug: the adapter has no {module}.{names[0]}; it is not a whole DoRA adapter")
        return reader.read(given[found])

    a, b = part("lora_A.weight"), part("lora_B.weight")
    magnitude = part("lora_magnitude_vector", "lora_magnitude_vector.weight")
    name = module.removeprefix(PREFIX)
    weight = weights.read(f"{name}.weight", reader)
    if weight.shape != (len(b), a.shape[1]) or magnitude.numel() != len(b):
        raise ModelError(
            f"fastplug: {name} is {tuple(weight.shape)} in {weights.folder}, and the adapter changes a matrix of "
            f"{(len(b), a.shape[1])}: it was trained on another base"
        )
    if rank > min(weight.shape):
        raise OptionError(f"fastplug: rank {rank} is larger than {name}, which is {tuple(weight.shape)}")
    updated = weight + scaling(config, name, len(a)) * (b.float() @ a.float())
    norm = torch.linalg.vector_norm(updated, dim=1)
    change = updated * (magnitude.float().view(-1) / norm)[:, None] - weight
    u, s, v = truncated(change, rank)
    root = s.sqrt()
    down, up = (v * root).t().contiguous(), (u * root).contiguous()
    lost, size = float((change - up @ down).norm()), float(change.norm())
    error = MatrixError(name, lost / size if size else 0.0, lost / max(float(weight.norm()), 1e-30))
    return down.to(a.dtype), up.to(b.dtype), error


def truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [N, rank], S [rank], V [K, rank] of the largest singular values of an fp32 matrix [N, K]."""
    if min(matrix.shape) <= EXACT:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank].t()
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(rank + OVERSAMPLING, *matrix.shape), ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank]


class _Base:
    """The weights of a base model's folder, decoded, in fp32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._given = tensors_of(folder)
        self._encoded = stored_weights(folder, model_config(folder), self._given)

    def read(self, name: str, reader: Reader) -> torch.Tensor:
        if name not in self._given and name not in self._encoded:
            raise ModelError(
                f"fastplug: {self.folder} has no {name}, which the adapter changes; pass the folder of the base that "
                "it was trained on with --base"
            )
        if name not in self._encoded:
            return reader.read(self._given[name]).float()
        encoded = self._encoded[name].read(reader, self._given)
        out = torch.empty(encoded.shape, dtype=torch.float32, device=reader.device)
        encoded.decode(out, table_for(reader.device))
        return out
