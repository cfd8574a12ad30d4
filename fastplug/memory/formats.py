"""How many bytes a weight takes in each format, with its scales."""

from __future__ import annotations

from typing import Any

import torch

from fastplug.errors import OptionError

BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit formats
NESTED = 256  # scales that share one in double quantization

BITS = {
    # format: (bits of a weight with what it shares in groups, bytes a row)
    "nf4": (4.0, 0),
    "fp4": (4.0, 0),
    "nf4-single": (4.0, 0),
    "fp4-single": (4.0, 0),
    "int8": (8.0, 4),
    "fp8": (8.0, 4),
    "int4": (4 + (16 + 16) / 128, 0),
}
"""``nf4`` and ``fp4`` are bitsandbytes' with double quantization, ``-single`` without; ``int8`` bitsandbytes' LLM.int8;
``fp8`` with a scale a row; ``int4`` what GPTQ, AWQ and HQQ have at groups of 128, 16 bits of scale and of zero each."""


def checked(quant: str) -> str:
    """A name of :data:`BITS`.

    Raises:
        OptionError: It is none.
    """
    if quant not in BITS:
        raise OptionError(f"fastplug: quant cannot be {quant!r}; one of {', '.join(BITS)}")
    return quant


def encoded_bytes(quant: str, out_features: int, in_features: int) -> int:
    """Bytes of a weight [out_features, in_features] in a format, scales included."""
    bits, row = BITS[checked(quant)]
    count = out_features * in_features
    size = int(-(-count * bits // 8)) + out_features * row
    if bits != 4:
        return size
    blocks = -(-count // BLOCK)
    if quant.endswith("-single"):
        return size + 4 * blocks + 4 * 16  # a scale each, and the 16 values of the format
    return size + blocks + 4 * -(-blocks // NESTED) + 4 * (16 + 256 + 1)  # scales in 8 bits, theirs, both codes, offset


def stored_bytes(linear: Any) -> int:
    """Bytes of what a linear module stores: its own parameters and buffers, and the tensors of bitsandbytes' state.

    A 4-bit weight that was never quantized, as on the meta device, counts as what it will be.
    """
    weight = getattr(linear, "weight", None)  # HQQ's and AWQ's layers have none
    own = [*linear.parameters(recurse=False), *linear.buffers(recurse=False)]
    state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
    kind = getattr(weight, "quant_type", None)
    if kind in ("nf4", "fp4") and state is None:
        double = getattr(weight, "compress_statistics", True)
        size = encoded_bytes(kind if double else f"{kind}-single", linear.out_features, linear.in_features)
        return size + sum(_bytes(tensor) for tensor in own if tensor is not weight)
    if state is not None:
        inner = getattr(state, "state2", None)
        own += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
        own += [
            t for t in (getattr(inner, "absmax", None), getattr(inner, "code", None)) if isinstance(t, torch.Tensor)
        ]
    int8 = getattr(weight, "SCB", None)
    if isinstance(int8, torch.Tensor):
        own.append(int8)
    return sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in own}.values())


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of those that one of torchao's is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    sharded = hasattr(tensor, "device_mesh")  # a DTensor: what counts is the whole, which its layer gathers
    if flatten is not None and not sharded and type(tensor) not in (torch.nn.Parameter, torch.Tensor):
        return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
    return int(tensor.numel() * tensor.element_size())
