"""Reading a stored weight: plain 16- and 32-bit, bitsandbytes 4-bit, and every format that has a codec.

Reading never changes the module: no move, no unpacking in place, no cached copy. That is why bitsandbytes' 4-bit layers
are not read by their codec, which unpacks what the library has repacked for a CPU.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastplug.exporters.api import ExportError
from fastplug.exporters.safetensors_stream import DTYPES
from fastplug.manager import manager
from fastplug.ops.table import table_for
from fastplug.quant import Codec, EncodedWeight
from fastplug.quant.fp8 import FP8, fp8


def is_4bit(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a bitsandbytes ``Params4bit`` that holds packed codes."""
    return type(tensor).__name__ == "Params4bit" and getattr(tensor, "quant_state", None) is not None


def is_fp8(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds 8-bit floats, which stand for values only with their scales."""
    return tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


# transformers' FP8Linear multiplies by weight_scale_inv (in spite of its name), compressed-tensors by weight_scale.
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
_OTHER_SCALES = ("activation_scale", "input_scale", "weight_zero_point", "weight_shape")


def scale_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that compressed-tensors leaves in a layer that it decompresses."""
    return frozenset((*_WEIGHT_SCALES, *_OTHER_SCALES) if hasattr(module, "quantization_scheme") else ())


@functools.cache
def _codecs() -> tuple[Codec, ...]:
    return tuple(manager().collect("fastplug_codecs"))


def codec_of(module: nn.Module) -> Codec | None:
    """The codec that decodes the weight of ``module``; None where it is plain, in bitsandbytes' 4 bits, or none."""
    weight: Any = module._parameters.get("weight")
    wide = weight is not None and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if type(module).__name__ == "Linear4bit" or (wide and type(weight).__name__ in ("Parameter", "Int8Params")):
        return None
    return next((codec for codec in reversed(_codecs()) if codec.name != "plain" and codec.matches(module)), None)


def encoded_weight(module: nn.Module, name: str) -> EncodedWeight | None:
    """The weight of ``module`` where it has to be decoded by a codec, else None.

    Raises:
        ExportError: It cannot be read; ``name``, the module's, is in the message.
    """
    codec = codec_of(module)
    weight = module._parameters.get("weight")
    scale = next((getattr(module, key) for key in _WEIGHT_SCALES if getattr(module, key, None) is not None), None)
    if codec is None and (weight is None or not is_fp8(weight) or scale is None):
        return None
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        refuse_sharded(tensor, f"{name}.{key}")
    if codec is not None:
        encoded = codec.read(module)
    else:  # an embedding, say
        block: Any = getattr(module, "block_size", None)
        given: Any = weight
        encoded = fp8(FP8(), given.detach(), scale.detach(), block)  # type: ignore[union-attr, operator]
    if isinstance(encoded, str):
        raise ExportError(
            f"fastplug: {name} ({type(module).__name__}) cannot be decoded: {encoded}. Load the model again, or merge "
            "onto the unquantized base instead"
        )
    return encoded


def decode(module: nn.Module, encoded: EncodedWeight) -> Tensor:
    """An encoded weight as the forward of ``module`` uses it, in the dtype in which its library multiplies fp32 inputs.

    That is fp32 for formats whose library multiplies in the dtype of its input.
    """
    dtype = decoded_dtype(module)
    device = encoded.tensors[0].device
    dense = encoded.dense(dtype)
    if dense is None:
        dense = torch.empty(encoded.shape, dtype=dtype, device=device)
        encoded.decode(dense, table_for(device))
    return dense


def decoded_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that :func:`decode` gives."""
    codec = codec_of(module)
    found = torch.float32 if codec is None else codec.compute_dtype(module, torch.float32)
    return torch.float32 if isinstance(found, str) else found


def refuse_sharded(tensor: Tensor, name: str) -> None:
    """Raise :class:`ExportError` if ``tensor`` holds only a part of its values, or none."""
    gather = (
        "gather the full model first (accelerator.get_state_dict or the strategy's own full checkpoint) and export that"
    )
    if type(tensor).__name__ == "DTensor":
        raise ExportError(f"fastplug: {name} is sharded (DTensor: FSDP2 or tensor parallel); {gather}")
    if type(tensor).__name__ == "FlatParameter" or getattr(tensor, "_is_flat_param", False):
        raise ExportError(f"fastplug: {name} is flattened and sharded (FSDP); {gather}")
    if hasattr(tensor, "ds_id") and getattr(getattr(tensor, "ds_status", None), "name", "") != "AVAILABLE":
        raise ExportError(f"fastplug: {name} is partitioned (DeepSpeed ZeRO-3); {gather}")
    if tensor.device.type == "meta":
        raise ExportError(
            f"fastplug: {name} is on the meta device (offloaded, or never loaded); load the model on a real device "
            "and export that"
        )


def refuse_unreadable(tensor: Tensor, name: str) -> None:
    """Raise :class:`ExportError` for a tensor whose values this module cannot read, naming it and the way out."""
    refuse_sharded(tensor, name)
    if is_4bit(tensor):
        return
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain or tensor.dtype not in DTYPES or is_fp8(tensor):
        raise ExportError(
            f"fastplug: {name} is a {type(tensor).__name__} of {tensor.dtype}; only plain 16- and 32-bit weights, "
            "and those of layers that have a codec can be decoded here. Merge onto the unquantized base instead"
        )


def logical_spec(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the values that ``tensor`` stands for, without decoding it."""
    if is_4bit(tensor):
        state: Any = tensor.quant_state  # type: ignore[attr-defined]
        dtype = state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype
        return tuple(state.shape), dtype
    return tuple(tensor.shape), tensor.dtype


def decode_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The values of a parameter or buffer ``module.<name>`` that no codec reads.

    Returns:
        A tensor of the logical shape, in the dtype that holds the values exactly: the stored dtype of a plain weight
        (the stored tensor itself, so do not write into it), or the dtype from which a 4-bit weight was quantized
        (bitsandbytes rounds to it when it decodes).
    """
    tensor: Any = module._parameters.get(name)
    tensor = module._buffers[name] if tensor is None else tensor
    return _decode_4bit(tensor) if is_4bit(tensor) else tensor.detach()


def repacked_for_cpu(tensor: Tensor) -> bool:
    """Whether bitsandbytes repacked this 4-bit weight for AVX512-BF16, which rounded its scales to bf16."""
    return is_4bit(tensor) and bool(getattr(tensor.quant_state, "packing_format_for_cpu", False))  # type: ignore[attr-defined]


def _decode_4bit(tensor: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = tensor.data, tensor.quant_state
    if repacked_for_cpu(tensor):
        # The library's inverse edits the state that it is given and quantizes the scales a second time: hand it a
        # copy that is not nested, and put back the scales that the repacked forward uses.
        scales = state.absmax.T.reshape(-1).float()
        state = copy.copy(state)
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax, state.nested = scales, False
    values: Tensor = functional.dequantize_4bit(data, state)
    return values.reshape(state.shape)
