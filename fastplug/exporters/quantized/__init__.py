"""Quantized merged models: bitsandbytes NF4 and LLM.int8(), and FP8, INT8 and W4A16 as compressed-tensors stores them.

Each weight of a linear layer is merged in fp32 and quantized from there, rounded once; embeddings, norms and the head
over the vocabulary stay 16-bit. Weights are rounded to the nearest value (no calibration data), and the proof says what
that costs.
"""

from __future__ import annotations

from fastplug.exporters.quantized.formats import fp8, int8, merged_4bit, merged_8bit, w4a16

__all__ = ["fp8", "int8", "merged_4bit", "merged_8bit", "w4a16"]
