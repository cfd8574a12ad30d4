"""A wide copy of one part of a model: decoded weights, all in fp32 (or fp64), computed by the original code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastplug.patching.sites import Runtime
from fastplug.quant import EncodedWeight


class CannotJudgeError(Exception):
    """There is no wide copy of this part; the message says why."""


def widened(module: nn.Module, dtype: torch.dtype, runtime: Runtime) -> nn.Module:
    """A deep copy of an unpatched module in ``dtype``, in which quantized linear layers are plain ones.

    Needs the memory of this copy alone: the encoded weights are not copied.

    Raises:
        CannotJudgeError: A weight has no codec, or its codec cannot read it.
    """
    memo: dict[int, Any] = {}
    for name, part in module.named_modules():
        linear = _decoded(name, part, dtype, runtime)
        if linear is not None:
            memo[id(part)] = linear
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        part.__dict__.pop("forward", None)  # a host's wrapper would call the module it was made for
        if part.__dict__.get("gradient_checkpointing"):
            part.__dict__["gradient_checkpointing"] = False
    for name, parameter in twin.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise CannotJudgeError(f"{name} is stored as {parameter.dtype} and has no codec")
        parameter.data = parameter.data.to(dtype)
    return twin


def _decoded(name: str, part: nn.Module, dtype: torch.dtype, runtime: Runtime) -> nn.Linear | None:
    """The plain twin of a quantized linear layer; None for any other module."""
    codec = runtime.codec(part)
    if codec is None or type(part) is nn.Linear:
        return None
    encoded = codec.read(part)
    if isinstance(encoded, str):
        raise CannotJudgeError(f"{name}: {encoded}")
    if encoded.dense(dtype) is not None:
        return None
    out_features, in_features = encoded.shape
    bias = getattr(part, "bias", None)
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(_weight(part, encoded, runtime).to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def _weight(part: nn.Module, encoded: EncodedWeight, runtime: Runtime) -> torch.Tensor:
    """The decoded weight in fp32, by the owning library's own decoder where there is one: the judge is independent."""
    state = getattr(getattr(part, "weight", None), "quant_state", None)
    if type(part).__module__ == "bitsandbytes.nn.modules" and state is not None:
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(state)
        state.dtype = torch.float32
        return dequantize_4bit(part.weight.data, state)  # type: ignore[no-any-return, union-attr]
    out = torch.empty(encoded.shape, dtype=torch.float32, device=encoded.tensors[0].device)
    encoded.decode(out, runtime.ops)
    return out


def cast(value: Any, dtype: torch.dtype) -> Any:
    """All floating-point tensors of a nested value in ``dtype``."""

    def one(item: Any) -> Any:
        return item.to(dtype) if isinstance(item, torch.Tensor) and item.is_floating_point() else item

    return torch.utils._pytree.tree_map(one, value)
