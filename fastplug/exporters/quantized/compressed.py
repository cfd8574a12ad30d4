"""FP8, INT8 and W4A16 in the layout of compressed-tensors, which vLLM serves without being told anything.

The arithmetic and the packing are the library's own (``calculate_qparams``, the compressor of each format); here only
the scales' granularity is chosen: one per output row for FP8 and INT8 (with activations quantized per token when it
runs), one per group of a row for W4A16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastplug.errors import MissingExtra
from fastplug.exporters.api import ExportError
from fastplug.exporters.assembly import Encoded
from fastplug.exporters.quantized.grouped import Spec, left_plain, linear_layers, plain, split
from fastplug.exporters.tensors import LazyTensor

_GROUPS = (128, 64, 32)  # the sizes that vLLM's kernels have


@dataclass(frozen=True)
class Scheme:
    """What compressed-tensors calls a quantization scheme: ``format`` is its name for the way of storing."""

    name: str
    format: str
    weights: dict[str, Any]
    activations: dict[str, Any] | None = None


_PER_TOKEN = {"strategy": "token", "dynamic": True, "symmetric": True}
FP8 = Scheme(
    "fp8",
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    {"num_bits": 8, "type": "float", **_PER_TOKEN},
)
INT8 = Scheme(
    "int8",
    "int-quantized",
    {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
    {"num_bits": 8, "type": "int", **_PER_TOKEN},
)
W4A16 = Scheme(
    "w4a16",
    "pack-quantized",
    {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "dynamic": False},
)


def encode(scheme: Scheme, tensors: Sequence[LazyTensor], dtype: torch.dtype, heads: Sequence[str]) -> Encoded:
    """The linear layers in ``scheme``, the rest in ``dtype``.

    Raises:
        MissingExtra: compressed-tensors is not installed.
        ExportError: No layer can be stored so.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError as error:
        raise MissingExtra("compressed-tensors", "compressed", scheme.name) from error
    layers = linear_layers(tensors)
    weights = dict(scheme.weights)
    if weights["strategy"] == "group":
        weights["group_size"] = _group_size(layers)
    made = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=scheme.activations)
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    group = weights.get("group_size")
    fitting = {layer.name for layer in layers if not layer.shape[1] % (group or 1)}
    if not fitting:
        raise ExportError(f"fastplug: no linear layer has a width that {scheme.name} can store; use merged_8bit or fp8")

    stored: list[LazyTensor] = []
    for tensor in tensors:
        if tensor.name not in fitting:
            stored.append(plain(tensor, dtype))
            continue
        prefix = tensor.name.removesuffix("weight")
        columns = tensor.shape[1] // group if group else 1
        specs = _specs(compressor, made, tensor.shape, (tensor.shape[0], columns), dtype)

        def quantize(values: Tensor, prefix: str = prefix, columns: int = columns) -> dict[str, Tensor]:
            # In fp32: the quotient of two bf16 numbers is off by up to half a step of an 8-bit code.
            scale = _scales(values, made, columns, dtype).float()
            parts = compressor.compress({"weight": values, "weight_scale": scale}, made)
            parts["weight_scale"] = parts["weight_scale"].to(dtype)
            return {prefix + key: part.contiguous() for key, part in parts.items()}

        stored += split(tensor, {prefix + key: spec for key, spec in specs.items()}, quantize)
    ignored = left_plain(tensors, fitting, heads)
    stays = f"in {str(dtype).removeprefix('torch.')}"
    notes = []
    if odd := [layer.linear for layer in layers if layer.name not in fitting]:
        notes.append(f"{len(odd)} linear layers stay {stays}: their width is no multiple of {group} (first: {odd[0]}).")
    if any(name.startswith("re:") for name in ignored):
        notes.append(f"The experts stay {stays}: only linear layers are quantized.")
    config = {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "observer": "minmax"},
                "input_activations": scheme.activations,
                "output_activations": None,
            }
        },
    }
    return Encoded(stored, config, notes, _reload_options())


def _group_size(layers: Sequence[LazyTensor]) -> int:
    """The largest size that divides the width of every layer, or that of the most."""
    widths = [layer.shape[1] for layer in layers]
    return max(_GROUPS, key=lambda size: (sum(not width % size for width in widths), size))


def _scales(values: Tensor, scheme: Any, columns: int, dtype: torch.dtype) -> Tensor:
    """The scales [rows, columns] of a weight [rows, width], rounded to the dtype in which they are stored."""
    from compressed_tensors.quantization.utils import calculate_qparams

    parts = values.unflatten(1, (columns, -1))
    scales: Tensor
    scales, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
    return scales.to(dtype)


def _specs(
    compressor: Any, scheme: Any, shape: tuple[int, ...], scales: tuple[int, int], dtype: torch.dtype
) -> dict[str, Spec]:
    """What the compressor will return, asked on a single row."""
    probe = {"weight": torch.ones(1, shape[1], dtype=dtype), "weight_scale": torch.ones(1, scales[1], dtype=dtype)}
    found: dict[str, Spec] = {}
    for name, part in compressor.compress(probe, scheme).items():
        rows = part.shape if name == "weight_shape" else (shape[0], *part.shape[1:])
        found[name] = (tuple(rows), part.dtype)
    return found


def _reload_options() -> dict[str, Any]:
    """The proof decodes the weights: the kernels that multiply them as they are need a GPU."""
    import inspect

    import transformers

    config = transformers.CompressedTensorsConfig
    if "dequantize" in inspect.signature(config).parameters:
        return {"quantization_config": config(dequantize=True)}
    return {"quantization_config": config(run_compressed=False)}
