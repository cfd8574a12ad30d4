"""Reading a stored weight: plain 16- and 32-bit, bitsandbytes 4-bit and 8-bit, FP8 with scales.

Reading never changes the module: no move, no unpacking in place, no cached copy.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastplug.exporters.api import ExportError
from fastplug.exporters.safetensors_stream import DTYPES


def is_4bit(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a bitsandbytes ``Params4bit`` that holds packed codes."""
    return type(tensor).__name__ == "Params4bit" and getattr(tensor, "quant_state", None) is not None


def is_8bit(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a bitsandbytes ``Int8Params`` that holds int8 codes."""
    return type(tensor).__name__ == "Int8Params" and tensor.dtype == torch.int8


def is_fp8(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds 8-bit floats, which stand for values only with their scales."""
    return tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def is_quantized(tensor: Tensor) -> bool:
    """Whether the values that ``tensor`` stands for have to be decoded."""
    return is_4bit(tensor) or is_8bit(tensor) or is_fp8(tensor)


# transformers' FP8Linear multiplies by weight_scale_inv (in spite of its name), compressed-tensors by weight_scale.
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
_OTHER_SCALES = ("activation_scale", "input_scale", "weight_zero_point", "weight_shape")


def scale_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers of ``module`` that belong to the encoding of its weight and not to it."""
    weight = module._parameters.get("weight")
    quantized = weight is not None and is_fp8(weight)
    # compressed-tensors leaves the scales in place when it decompresses a layer.
    return frozenset((*_WEIGHT_SCALES, *_OTHER_SCALES) if quantized or hasattr(module, "quantization_scheme") else ())


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


def refuse_unreadable(tensor: Tensor, name: str, module: nn.Module | None = None) -> None:
    """Raise :class:`ExportError` for a tensor whose values this module cannot read, naming it and the way out."""
    refuse_sharded(tensor, name)
    if is_4bit(tensor) or is_8bit(tensor) or (is_fp8(tensor) and module is not None and _fp8_scale(module) is not None):
        return
    if name.endswith(".weight_packed"):
        raise ExportError(
            f"fastplug: {name} is packed by compressed-tensors; load the model with "
            "CompressedTensorsConfig(dequantize=True), or merge onto the unquantized base"
        )
    plain = type(tensor) in (Tensor, nn.Parameter) or type(tensor).__name__ in ("Params4bit", "Int8Params")
    if not plain or tensor.dtype not in DTYPES or is_fp8(tensor):
        raise ExportError(
            f"fastplug: {name} is a {type(tensor).__name__} of {tensor.dtype}; only plain 16- and 32-bit weights, "
            "bitsandbytes 4-bit and 8-bit, and FP8 with its scales can be decoded here. Merge onto the unquantized "
            "base instead"
        )


def logical_spec(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the values that ``tensor`` stands for, without decoding it."""
    if is_4bit(tensor):
        state: Any = tensor.quant_state  # type: ignore[attr-defined]
        dtype = state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype
        return tuple(state.shape), dtype
    return tuple(tensor.shape), torch.float32 if is_8bit(tensor) or is_fp8(tensor) else tensor.dtype


def decode_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The values of ``module.<name>`` as its forward uses them.

    Args:
        module: The module that owns the parameter or buffer.
        name: Its attribute name.

    Returns:
        A tensor of the logical shape, in the dtype that holds the values exactly: the stored dtype of a plain weight
        (the stored tensor itself, so do not write into it), the dtype from which a 4-bit weight was quantized
        (bitsandbytes rounds to it when it decodes), fp32 for an 8-bit one: ``codes * SCB / 127`` (LLM.int8(),
        arXiv:2208.07339), and for FP8 ``weight * scale`` of its tensor, row or block.

    Raises:
        ExportError: An 8-bit weight without its scales.
    """
    tensor: Any = module._parameters.get(name)
    tensor = module._buffers[name] if tensor is None else tensor
    if is_4bit(tensor):
        return _decode_4bit(tensor)
    if is_8bit(tensor):
        scales = getattr(tensor, "SCB", None)
        scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
        if scales is None:
            raise ExportError(f"fastplug: an 8-bit {type(module).__name__} has no scales (SCB); load the model again")
        from bitsandbytes.functional import int8_vectorwise_dequant

        values: Tensor = int8_vectorwise_dequant(tensor.data, scales.to(tensor.device))
        return values
    if is_fp8(tensor):
        return _decode_fp8(module, tensor.detach())
    return tensor.detach()  # type: ignore[no-any-return]


def _fp8_scale(module: nn.Module) -> Tensor | None:
    found = (getattr(module, name, None) for name in _WEIGHT_SCALES)
    return next((scale for scale in found if scale is not None), None)


def _decode_fp8(module: nn.Module, weight: Tensor) -> Tensor:
    scale: Any = _fp8_scale(module)
    scale = scale.detach().to(weight.device).float()
    values = weight.float()
    rows, columns = values.shape
    if scale.numel() == 1 or scale.shape == (rows, 1):
        return values.mul_(scale)
    if scale.dim() == 1 and len(scale) == rows:
        return values.mul_(scale[:, None])
    block: Any = getattr(module, "block_size", None)
    if block is None:  # compressed-tensors keeps it in the scheme
        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        block = getattr(weights, "block_structure", None) or (1, columns // scale.shape[-1])
    high, wide = block
    if scale.shape != (-(-rows // high), -(-columns // wide)):
        raise ExportError(
            f"fastplug: an FP8 {type(module).__name__} of shape {rows}x{columns} has scales of shape "
            f"{tuple(scale.shape)} for blocks of {high}x{wide}; load the model again"
        )
    expanded = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return values.mul_(expanded)


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
