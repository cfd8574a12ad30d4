"""The formats into which fastplug itself quantizes, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastplug.errors import OptionError
from fastplug.layers.half_quadratic import HalfQuadratic
from fastplug.ops.quantize_4bit import codes, implementation
from fastplug.quant.bnb4 import BitsAndBytes4
from fastplug.quant.codec import EncodedWeight

Encoder = Callable[[torch.Tensor], EncodedWeight]


@dataclass(frozen=True)
class BlocksOf4Bits:
    """NF4 or FP4, as bitsandbytes stores them.

    Attributes:
        kind: ``nf4`` or ``fp4``.
        blocksize: Values that share a scale: a power of two from 32 to 4096.
        double_quant: Whether the scales are stored in 8 bits (QLoRA's double quantization).
    """

    kind: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.blocksize not in codes.BLOCKSIZES:
            sizes = ", ".join(map(str, codes.BLOCKSIZES))
            raise OptionError(f"fastplug: blocksize {self.blocksize} is not one that {self.kind} has: {sizes}")

    def __call__(self, weight: torch.Tensor) -> EncodedWeight:
        """Encode a weight [out_features, in_features] of fp32, bf16 or fp16."""
        op = implementation(weight.device)
        packed, absmax = op.quantize(weight, self.kind, self.blocksize)
        code = codes.values(self.kind, weight.device)
        shape = (weight.shape[0], weight.shape[1])
        if not self.double_quant:
            return EncodedWeight(BitsAndBytes4(), (packed, absmax, code), shape, (self.blocksize,))
        found, absmax2, offset, code2 = op.quantize_scales(absmax)
        tensors = (packed, found, code, code2, absmax2, offset)
        return EncodedWeight(BitsAndBytes4(), tensors, shape, (self.blocksize, codes.NESTED_BLOCKSIZE))


FORMATS = (*codes.KINDS, "hqq")


def encoder(name: str, blocksize: int = 64, double_quant: bool = True) -> Encoder:
    """What encodes a weight in the format ``name``.

    Raises:
        OptionError: There is no such format, or it has no such block size.
    """
    if name == "hqq":
        return HalfQuadratic(blocksize)
    if name not in codes.KINDS:
        raise OptionError(f"fastplug: there is no format {name!r} to quantize to; there are {', '.join(FORMATS)}")
    return BlocksOf4Bits(name, blocksize, double_quant)
