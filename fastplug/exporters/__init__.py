"""Exporters: what ``fastplug.export(model, path, format=...)`` can write.

A format is one :class:`Exporter`: its name, one line about it, and a function. The built-in ones stand in
:data:`BUILTIN`; another package adds its own through the hook ``fastplug_exporters``. What formats share is here too:
:mod:`~fastplug.exporters.tensors` (the merged model as a lazy list of tensors), ``safetensors_stream`` (a writer that
holds one tensor) and ``folder`` (a folder that appears whole or not at all).
"""

from __future__ import annotations

from fastplug.exporters.api import Exporter, ExportError, ExportResult
from fastplug.exporters.gguf.export import gguf as gguf_files
from fastplug.exporters.gguf.lora import gguf_lora
from fastplug.exporters.hub import hub
from fastplug.exporters.lora import lora
from fastplug.exporters.merged import merged_16bit, merged_32bit
from fastplug.exporters.ollama import ollama as ollama_model
from fastplug.exporters.onnx import onnx
from fastplug.exporters.quantized import fp8, int8, merged_4bit, merged_8bit, w4a16
from fastplug.exporters.vllm import vllm
from fastplug.manager import hookimpl

BUILTIN: tuple[Exporter, ...] = (
    Exporter("merged_16bit", "the model with its adapter merged in: bf16 or fp16 safetensors", merged_16bit),
    Exporter("merged_32bit", "the same in fp32", merged_32bit),
    Exporter("merged_4bit", "merged, then bitsandbytes NF4 with double quantization", merged_4bit),
    Exporter("merged_8bit", "merged, then bitsandbytes LLM.int8()", merged_8bit),
    Exporter("fp8", "merged, then FP8 weights and activations (compressed-tensors, for vLLM)", fp8),
    Exporter("int8", "merged, then INT8 weights and activations (compressed-tensors, for vLLM)", int8),
    Exporter("w4a16", "merged, then 4-bit weights in groups (compressed-tensors, for vLLM)", w4a16),
    Exporter("lora", "the adapter alone, in PEFT's layout", lora),
    Exporter("vllm", "a folder that vLLM serves, with the command (weights=16bit, fp8, ..., adapter)", vllm),
    Exporter("onnx", "merged, as an ONNX graph in fp32, with a KV cache or without (kv_cache=)", onnx),
    Exporter("hub", "any of these (weights=), pushed to a Hugging Face hub with a model card", hub),
    Exporter(
        "gguf", "merged, as one file for llama.cpp in each of types=; gguf:q4_k_m names them", gguf_files, "types"
    ),
    Exporter("ollama", "merged, as a GGUF file with a Modelfile for Ollama", ollama_model, "types"),
    Exporter("gguf_lora", "the adapter alone, for llama.cpp's --lora", gguf_lora),
)


@hookimpl
def fastplug_exporters() -> tuple[Exporter, ...]:
    return BUILTIN


__all__ = ["BUILTIN", "ExportError", "ExportResult", "Exporter"]
