"""Dense copies of modules whose linear layers are quantized."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.manager import manager
from fastplug.ops.table import table_for
from fastplug.quant.codec import Codec
from fastplug.quant.plain import Plain


def dense_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy of ``module`` in which quantized linear layers are plain ones of the values they decode to.

    Args:
        module: Any module; the encoded weights are not copied.
        dtype: Of all its floating-point parameters. Default: of the first plain one, else of what the first quantized
            layer computes in.

    Raises:
        ModelError: A quantized layer that no codec reads.
    """
    codecs = manager(True).collect("fastplug_codecs")
    memo: dict[int, Any] = {}
    for name, part in module.named_modules():
        codec = next((codec for codec in reversed(codecs) if codec.matches(part)), None)
        if codec is not None and codec.name != Plain.name:
            memo[id(part)] = decoded(part, codec, name, dtype)
        elif codec is None and _packed(part):
            raise ModelError(f"fastplug.layers: {name} is a {type(part).__name__}, which no codec decodes")
    made = copy.deepcopy(module, memo)
    floats = [parameter for parameter in made.parameters() if parameter.is_floating_point()]
    for parameter in floats:
        parameter.data = parameter.data.to(dtype or floats[0].dtype)
    return made


def decoded(part: nn.Module, codec: Codec, name: str = "", dtype: torch.dtype | None = None) -> nn.Linear:
    """The plain twin of a quantized linear layer."""
    encoded = codec.read(part)
    if isinstance(encoded, str):
        raise ModelError(f"fastplug.layers: {name} cannot be decoded: {encoded}")
    device = encoded.tensors[0].device
    if dtype is None:
        found = codec.compute_dtype(part, torch.bfloat16)
        own = getattr(part, "dtype", None)
        dtype = own if isinstance(own, torch.dtype) else found if isinstance(found, torch.dtype) else torch.bfloat16
    weight = torch.empty(encoded.shape, dtype=dtype, device=device)
    encoded.decode(weight, table_for(device))
    bias = getattr(part, "bias", None)
    linear = nn.Linear(encoded.shape[1], encoded.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone().to(dtype))
    return linear.train(part.training)


def _packed(part: nn.Module) -> bool:
    """Whether a layer's weight is codes: its ``weight``, or what libraries have in the place of one."""
    weight = next((getattr(part, name) for name in ("weight", "qweight", "W_q") if hasattr(part, name)), None)
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point() and weight.dim() > 0
