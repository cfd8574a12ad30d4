"""Decoding of bitsandbytes' 4-bit weights (NF4 and FP4), bit for bit as bitsandbytes decodes them."""

from fastplug.ops.nf4.autograd import nf4_linear

__all__ = ["nf4_linear"]
