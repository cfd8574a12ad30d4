"""Decoding of weights of 8- and 4-bit floats with scales: FP8, MXFP8, MXFP4, NVFP4."""

from fastplug.ops.float_weights.reference import Layout

__all__ = ["Layout"]
