"""The original 16-bit base of a quantized model: where ``base=`` takes its weights from."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastplug.exporters.api import ExportError
from fastplug.exporters.models import load

# Relative error of a weight's quantization: NF4 0.09, FP4 0.13, LLM.int8() 0.01, FP8 0.03. Unrelated weights give 1.4.
_RELATED = 0.5


class Originals:
    """Weights of a model folder under the names of the live model.

    Args:
        folder: A folder with plain 16- or 32-bit weights.

    Raises:
        ExportError: Not a model folder, or its weights are quantized too.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        model = load(folder, None)
        if getattr(model, "hf_quantizer", None) is not None:
            raise ExportError(f"fastplug: {self.folder} is quantized itself; base= is the folder of the 16-bit weights")
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._difference = self._total = 0.0
        self._used: list[str] = []

    def take(self, name: str, decoded: Tensor) -> Tensor:
        """The original of the weight ``name``, whose decoded values are given.

        Raises:
            ExportError: There is none, it has another shape, or it is not what was quantized.
        """
        original = self._tensors.get(name)
        wrong = f"fastplug: {self.folder} is not the base that was quantized: {name}"
        if original is None:
            raise ExportError(f"{wrong} is missing there")
        if original.shape != decoded.shape:
            raise ExportError(f"{wrong} has shape {tuple(original.shape)} there and {tuple(decoded.shape)} here")
        original = original.detach().to(decoded.device)
        difference = _squares(original.float().sub_(decoded))
        total = _squares(original)
        if difference > total * _RELATED**2:
            raise ExportError(f"{wrong} differs by {(difference / max(total, 1e-30)) ** 0.5:.0%} from the decoded one")
        self._difference += difference
        self._total += total
        self._used.append(name)
        return original

    def notes(self) -> list[str]:
        if not self._used:
            return [f"No weight of the model is quantized, so nothing was taken from {self.folder}."]
        relative = (self._difference / max(self._total, 1e-30)) ** 0.5
        return [
            f"Merged onto the original base: {len(self._used)} weights from {self.folder}, from which the decoded "
            f"ones that the adapter was trained on differ by {relative:.2%}."
        ]


def _squares(values: Tensor) -> float:
    norm: Any = torch.linalg.vector_norm(values, dtype=torch.float32)
    return float(norm) ** 2
