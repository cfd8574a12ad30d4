"""The quantized weights of a model folder, in whatever format, read without the library that wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastplug.errors import ModelError
from fastplug.layers.reading import Reader, Stored, metadata_of
from fastplug.layers.stored_4bit import stored_4bit
from fastplug.quant.codec import EncodedWeight
from fastplug.quant.formats import encoded_from_tensors, quantized_weights


class StoredWeight(Protocol):
    """The weight of a linear layer as files hold it."""

    @property
    def name(self) -> str:
        """What the weight would be called if it were stored as a matrix: ``model.layers.0.mlp.up_proj.weight``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it is made of, in the order in which they are read."""

    def read(self, reader: Reader, given: Mapping[str, Stored]) -> EncodedWeight:
        """The weight on the reader's device. Raises :class:`ModelError` where its parts do not fit together."""


@dataclass(frozen=True, eq=False)
class WeightOfFormat:
    """A weight of the layer ``layer`` in a format of :mod:`fastplug.quant.formats`."""

    layer: str
    names: tuple[str, ...]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.layer}.weight"

    def read(self, reader: Reader, given: Mapping[str, Stored]) -> EncodedWeight:
        tensors = {name: reader.read(given[name]) for name in self.names}
        return encoded_from_tensors(self.layer, tensors, self.config, self.metadata)


def stored_weights(folder: Path, config: Any, given: Mapping[str, Stored]) -> dict[str, StoredWeight]:
    """The quantized weights of a folder by their names, none if it is not quantized.

    Takes the quantization out of ``config``: what is made of it are fastplug's own layers.

    Args:
        folder: The folder of a model.
        config: Its transformers config.
        given: Its tensors.

    Raises:
        ModelError: A format whose layout is not known here, or one of which the files hold nothing.
    """
    described = _described(folder, config)
    if described is None:
        return {}
    method = described.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes" and not described.get("load_in_8bit"):
        return dict(stored_4bit(given))
    weights = quantized_weights(given, described)
    if not weights:
        raise ModelError(
            f"fastplug.layers: the config of {folder} says that it is quantized with {method}, and no tensor of its "
            "files is; if the weights are plain, take quantization_config out of config.json"
        )
    metadata: dict[str, str] = {}
    for file in {given[name].file for names in weights.values() for name in names}:
        metadata.update(metadata_of(file))
    found = (WeightOfFormat(layer, tuple(names), described, metadata) for layer, names in weights.items())
    return {weight.name: weight for weight in found}


def _described(folder: Path, config: Any) -> dict[str, Any] | None:
    """``quantization_config``, taken out of the config, or what ModelOpt writes in a file of its own."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
        return dict(quantization if isinstance(quantization, dict) else quantization.to_dict())
    file = folder / "hf_quant_config.json"
    if not file.is_file():
        return None
    try:
        return {"quant_method": "modelopt", **json.loads(file.read_text(encoding="utf-8"))["quantization"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"fastplug.layers: {file} does not say how the folder is quantized: {error}") from error
