"""``onnx``: the merged model as an ONNX graph, with or without a KV cache, checked in onnxruntime."""

from __future__ import annotations

from fastplug.exporters.onnx.exporter import onnx

__all__ = ["onnx"]
