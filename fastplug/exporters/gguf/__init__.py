"""GGUF files: see :func:`~fastplug.exporters.gguf.export.gguf` and :func:`~fastplug.exporters.gguf.lora.gguf_lora`."""

from __future__ import annotations

from fastplug.exporters.gguf.export import gguf
from fastplug.exporters.gguf.lora import gguf_lora
from fastplug.exporters.gguf.types import TYPES, FileType

__all__ = ["TYPES", "FileType", "gguf", "gguf_lora"]
