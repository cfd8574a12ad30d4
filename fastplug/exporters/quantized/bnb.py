"""bitsandbytes: NF4 with double quantization (arXiv:2305.14314) and LLM.int8() (arXiv:2208.07339).

The keys and the packing of the state are those that ``save_pretrained`` of a model loaded in 4 or 8 bit writes, so the
folder loads without a quantization config of the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastplug.errors import MissingExtra
from fastplug.exporters.api import ExportError
from fastplug.exporters.assembly import Encoded
from fastplug.exporters.quantized.grouped import Spec, left_plain, linear_layers, plain, split
from fastplug.exporters.tensors import LazyTensor

_BLOCK, _NESTED = 64, 256  # values per scale, scales per nested scale: bitsandbytes' defaults
_STATE = 384  # bytes of the JSON beside a weight, padded with spaces: its length depends on the values


def encode_4bit(tensors: Sequence[LazyTensor], dtype: torch.dtype, heads: Sequence[str]) -> Encoded:
    """NF4 with double quantization for the linear layers, ``dtype`` for the rest."""
    functional = _functional("merged_4bit")
    layers = {tensor.name for tensor in linear_layers(tensors)}
    _require(layers)
    stored: list[LazyTensor] = []
    for tensor in tensors:
        if tensor.name not in layers:
            stored.append(plain(tensor, dtype))
            continue
        values = tensor.shape[0] * tensor.shape[1]
        blocks = -(-values // _BLOCK)
        name = tensor.name
        specs: dict[str, Spec] = {
            name: (((values + 1) // 2, 1), torch.uint8),
            f"{name}.absmax": ((blocks,), torch.uint8),
            f"{name}.quant_map": ((16,), torch.float32),
            f"{name}.nested_absmax": ((-(-blocks // _NESTED),), torch.float32),
            f"{name}.nested_quant_map": ((256,), torch.float32),
            f"{name}.quant_state.bitsandbytes__nf4": ((_STATE,), torch.uint8),
        }

        def encode(values: Tensor, name: str = name) -> dict[str, Tensor]:
            packed, state = functional.quantize_4bit(
                values.contiguous(), blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
            )
            state.dtype = dtype  # what it decodes to
            parts = state.as_dict(packed=True)
            key = "quant_state.bitsandbytes__nf4"
            text = json.dumps(json.loads(bytes(parts[key].tolist()))).encode().ljust(_STATE)
            found = {f"{name}.{part}": tensor for part, tensor in parts.items() if part != key}
            return {
                name: packed,
                **found,
                f"{name}.{key}": torch.frombuffer(bytearray(text), dtype=torch.uint8),
            }

        stored += split(tensor, specs, encode)
    config = {
        **_skipped(tensors, layers, heads),
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
    return Encoded(stored, config)


def encode_8bit(tensors: Sequence[LazyTensor], dtype: torch.dtype, heads: Sequence[str]) -> Encoded:
    """LLM.int8() for the linear layers: a scale per output row. ``dtype`` for the rest."""
    functional = _functional("merged_8bit")
    layers = {tensor.name for tensor in linear_layers(tensors)}
    _require(layers)
    stored: list[LazyTensor] = []
    for tensor in tensors:
        if tensor.name not in layers:
            stored.append(plain(tensor, dtype))
            continue
        name, scales = tensor.name, f"{tensor.name.removesuffix('weight')}SCB"
        kind = f"{name}_format"
        specs: dict[str, Spec] = {
            name: (tensor.shape, torch.int8),
            scales: ((tensor.shape[0],), torch.float32),
            kind: ((), torch.uint8),
        }

        def encode(values: Tensor, names: tuple[str, str, str] = (name, scales, kind)) -> dict[str, Tensor]:
            # The library quantizes from fp16, as it does when it loads a model.
            codes, absmax, _ = functional.int8_vectorwise_quant(values.half())
            return dict(zip(names, (codes, absmax.float().reshape(-1), torch.zeros((), dtype=torch.uint8))))

        stored += split(tensor, specs, encode)
    return Encoded(stored, {**_skipped(tensors, layers, heads), "load_in_4bit": False, "load_in_8bit": True})


def _functional(purpose: str) -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "bnb", purpose) from error
    return functional


def _skipped(tensors: Sequence[LazyTensor], layers: set[str], heads: Sequence[str]) -> dict[str, Any]:
    """The part of the config that is the same for both."""
    names = [name for name in left_plain(tensors, layers, heads) if not name.startswith("re:")]
    return {"quant_method": "bitsandbytes", "llm_int8_skip_modules": names, "llm_int8_threshold": 6.0}


def _require(layers: set[str]) -> None:
    if not layers:
        raise ExportError("fastplug: the model has no linear layers to quantize; use merged_16bit")
