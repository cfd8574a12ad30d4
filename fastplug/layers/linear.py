"""A linear layer over a frozen, encoded weight of any format.

The stored tensors are the layer's parameters, under names of their own, without gradients: so ``state_dict``, FSDP and
``to(device)`` see plain tensors and nothing else. They are parameters and not buffers because DistributedDataParallel
broadcasts buffers before every forward.

The layer is a ``torch.nn.Linear`` to those who ask, such as PEFT, which then puts its usual LoRA layer on it. Its
``weight`` holds the packed bytes in one dimension, whatever the format: code that takes it for a matrix (PEFT's
``merge_and_unload``) fails loudly instead of adding to a copy. ``dequantize()`` gives the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastplug.ops.lora.group import Group
from fastplug.ops.lora.linear import lora_linear
from fastplug.ops.lora.projection import Projection
from fastplug.ops.table import table_for
from fastplug.quant.codec import EncodedWeight
from fastplug.sharding import SHARDED, distributed

# What the tensors of a format are called beside the first, which is always ``weight``. Others: ``part1``, ``part2``...
_NAMES = {
    "bitsandbytes-4bit": ("absmax", "code", "nested_code", "nested_absmax", "nested_offset"),
    "hqq": ("scale", "zero"),
}


class QuantLinear(nn.Linear):
    """``x @ weight.T + bias`` for an encoded weight, which is decoded in each pass and never kept.

    Args:
        encoded: The weight [out_features, in_features], in any codec's format. Its tensors are taken, not copied.
        bias: [out_features] or None.
        dtype: The dtype in which the weight was trained, which :meth:`dequantize` and exports give.
    """

    def __init__(
        self, encoded: EncodedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the matrix
        self.out_features, self.in_features = encoded.shape
        self.codec, self.layout, self.dtype = encoded.codec, encoded.layout, dtype
        names: tuple[str, ...] = _NAMES.get(encoded.codec.name, ())
        if len(names) < len(encoded.tensors) - 1:
            names = tuple(f"part{i}" for i in range(1, len(encoded.tensors)))
        self.parts = ("weight", *names[: len(encoded.tensors) - 1])
        self._stored = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in encoded.tensors)
        for name, tensor in zip(self.parts, encoded.tensors):
            flat = tensor.detach().contiguous()
            if name == "weight":
                flat = flat.view(-1).view(torch.uint8)
            elif flat.dim() == 0:
                flat = flat.view(1)  # FSDP2 shards no scalars
            setattr(self, name, nn.Parameter(flat, requires_grad=False))
        kept = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", kept)

    @property
    def W_q(self) -> torch.Tensor:
        """The packed bytes under the name by which PEFT's DoRA knows layers that offer ``dequantize()``."""
        return self.weight

    def read(self) -> EncodedWeight | str:
        """The weight as it is now, or the reason why it is not whole."""
        tensors: list[torch.Tensor] = []
        for name, (dtype, shape) in zip(self.parts, self._stored):
            part = getattr(self, name)
            if distributed(part):
                return f"its encoded weight {SHARDED}"
            values = part.detach()
            if values.numel() * values.element_size() != dtype.itemsize * torch.Size(shape).numel():
                return f"its encoded weight {SHARDED}"
            tensors.append((values.view(dtype) if name == "weight" else values).view(shape))
        return EncodedWeight(self.codec, tuple(tensors), (self.out_features, self.in_features), self.layout)

    def _whole(self) -> EncodedWeight:
        found = self.read()
        if isinstance(found, str):
            raise RuntimeError(f"fastplug: a QuantLinear cannot be used: {found}; gather it first")
        return found

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [out_features, in_features] as a new tensor, in ``dtype`` or the one it was trained in."""
        encoded = self._whole()
        out = torch.empty(encoded.shape, dtype=dtype or self.dtype, device=self.weight.device)
        encoded.decode(out, table_for(out.device))
        return out

    def projection(self) -> Projection:
        """The layer as the fused ops see it."""
        return Projection(self._whole, (self.out_features, self.in_features), bias=self.bias, owner=self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out_features] for [..., in_features], in autocast's dtype where that is on, else in the input's."""
        group = Group([self.projection()], product_dtype(input), table_for(input.device))
        return lora_linear(group, input)

    def reset_parameters(self) -> None:
        """There is nothing to initialise: the weight is given."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # .to(dtype) and .half() are meant for what is computed with, not for the numbers that encode the weight.
        encoded = {id(getattr(self, name)) for name in self.parts}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in encoded and out.dtype != tensor.dtype else out

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.codec.name}, layout={self.layout}"
        )


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a layer that follows its input multiplies x."""
    kind = x.device.type
    dtype: Any = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype  # type: ignore[no-any-return]
