"""Whether an adapter in a folder was made for the base that it is put on: the shapes of two bases may be the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastplug.exporters.api import ExportError
from fastplug.exporters.models import local_folder

ROWS, MOST = 8, 16  # rows of a matrix that are looked at, and norms
EMBEDDING = "embed_tokens.weight"  # which quantization leaves alone, as it does norms
CLOSE = 0.02  # relative: the same values in another floating point dtype


def check_base(adapter: Path, base: str) -> None:
    """Raise :class:`ExportError` if the base that the adapter's config names is here and holds other values.

    Folders move, and a quantized base has another name than the one it was made of; so what counts is what is in both:
    norms and the first embeddings. Where the named base is not to be found, nothing can be said.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    named = local_folder(config.get("base_model_name_or_path") or "")
    if named is None or os.path.realpath(named) == os.path.realpath(base):
        return
    mine = dict(_samples(Path(base)))
    for name, theirs in _samples(named):
        if name in mine and not _same(mine[name], theirs):
            raise ExportError(
                f"fastplug: the adapter in {adapter} was trained on {named}, and {base} is another model: {name} "
                "differs. Put it on the base that its config names, or change base_model_name_or_path there"
            )


def _samples(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Small tensors of a model folder that no quantization changes."""
    from safetensors import safe_open

    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in sorted(stream.keys()):
                part: Any = stream.get_slice(name)
                norm = len(part.get_shape()) == 1 and "norm" in name and name.endswith(".weight")
                if name.endswith(EMBEDDING):
                    yield name, part[:ROWS]
                elif norm and count < MOST:
                    count += 1
                    yield name, part[:]


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    if not (mine.is_floating_point() and theirs.is_floating_point()):
        return True  # quantized after all
    if mine.shape != theirs.shape:
        return False
    mine, theirs = mine.float(), theirs.float()
    return float((mine - theirs).abs().max()) <= CLOSE * float(theirs.abs().max())
