"""Decoding of weights of packed integers with scales: LLM.int8(), GPTQ, AWQ, HQQ, torchao, compressed-tensors."""

from fastplug.ops.int_weights.reference import Layout

__all__ = ["Layout"]
