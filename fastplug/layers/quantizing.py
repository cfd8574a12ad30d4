"""Turn the linear layers of a model into quantized ones, and back, in place and one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.layers.encoding import Encoder, encoder
from fastplug.layers.linear import QuantLinear
from fastplug.layers.own_save import guard

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Place(NamedTuple):
    """A linear layer in a model: its parent, its name there, and its full name."""

    parent: nn.Module
    child: str
    name: str
    linear: nn.Linear


def quantize(linear: nn.Linear, encode: Encoder | str = "nf4") -> QuantLinear:
    """A quantized copy of a linear layer; its bias is shared.

    Args:
        linear: A plain ``torch.nn.Linear`` with a weight of fp32, bf16 or fp16.
        encode: The name of a format, or a function from a weight to its encoding.

    Raises:
        ModelError: The weight is not there as a whole, or not a floating-point matrix.
    """
    weight = linear.weight
    if weight.device.type == "meta":
        raise ModelError("fastplug.layers: a weight on the meta device has no values to quantize; load the model first")
    if weight.dtype not in FLOATS or type(weight) not in (nn.Parameter, torch.Tensor) or weight.dim() != 2:
        raise ModelError(
            f"fastplug.layers: a {type(weight).__name__} of {weight.dtype} and shape {tuple(weight.shape)} cannot be "
            "quantized: a whole fp32, bf16 or fp16 matrix is needed"
        )
    encode = encoder(encode) if isinstance(encode, str) else encode
    with torch.no_grad():
        made = QuantLinear(encode(weight.detach()), linear.bias, weight.dtype)
    return made.train(linear.training)


def quantize_(
    model: Any,
    format: str = "nf4",
    *,
    skip: Iterable[str] | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
) -> Any:
    """Quantize the linear layers of ``model`` in place, one at a time, where they are.

    Each matrix is freed before the next is encoded, so memory falls from the start. Embeddings, norms, and linear
    layers whose matrix another module shares (a tied head) stay as they are. Of PEFT's layers the base is quantized
    and the adapter stays.

    Args:
        model: A model with its weights; they are cast to no other dtype first, so load it in the one to compute in.
        format: ``nf4``, ``fp4`` or ``hqq``.
        skip: Names of layers to leave: full names, names of a parent, or last parts (``lm_head``). Default: the
            output embeddings.
        blocksize: Values that share a scale.
        double_quant: Whether the scales of NF4 and FP4 are quantized too, as in QLoRA.

    Returns:
        ``model``.

    Raises:
        ModelError: Nothing to quantize, or a weight that cannot be.
        OptionError: An unknown format or block size; a name in ``skip`` that no layer has.
    """
    encode = encoder(format, blocksize, double_quant)
    places = list(plan(model, skip))
    if not places:
        raise ModelError(f"fastplug.layers: {type(model).__name__} has no linear layers to quantize")
    while places:
        place = places.pop(0)
        setattr(place.parent, place.child, quantize(place.linear, encode))
        del place
    guard(model)
    return model


def dequantize_(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Turn the quantized layers of ``model`` into plain ones of the values they decode to, in place.

    Args:
        model: A model with ``QuantLinear`` layers.
        dtype: Of the weights; default: the one in which each was trained.

    Returns:
        ``model``.
    """
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, QuantLinear):
                setattr(parent, child, plain(layer, dtype))
    return model


def plain(layer: QuantLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    """A plain linear layer of the weight that ``layer`` decodes to; the bias is shared."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def plan(model: nn.Module, skip: Iterable[str] | None = None) -> Iterator[Place]:
    """The linear layers of ``model`` to quantize. Raises :class:`OptionError` for a name that no module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    head = getattr(model, "get_output_embeddings", lambda: None)()
    skipped = None if skip is None else tuple(skip)
    names = {name for name, _ in model.named_modules()}
    for name in skipped or ():
        if not any(_matches(name, full) for full in names):
            raise OptionError(f"fastplug.layers: skip names {name!r}, and the model has no such module")
    for place in list(_linears(model, "")):
        if owners[id(place.linear.weight)] > 1 or (skipped is None and place.linear is head):
            continue
        if not any(_matches(name, place.name) for name in skipped or ()):
            yield place


def _matches(name: str, full: str) -> bool:
    return full == name or full.startswith(f"{name}.") or full.endswith(f".{name}") or f".{name}." in full


def _linears(module: nn.Module, prefix: str) -> Iterator[Place]:
    adapter = type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")
    for child, part in module.named_children():
        if adapter and child != "base_layer":
            continue
        if type(part) is nn.Linear:
            yield Place(module, child, prefix + child, part)
        elif type(part).__name__ != "ModulesToSaveWrapper":
            yield from _linears(part, f"{prefix}{child}.")
