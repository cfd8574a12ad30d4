"""Attention within the documents of packed rows."""

from fastplug.ops.document_attention.attention import BACKENDS, choose, document_attention
from fastplug.ops.document_attention.documents import Documents
from fastplug.ops.document_attention.lazy_mask import DocumentMask

__all__ = ["BACKENDS", "DocumentMask", "Documents", "choose", "document_attention"]
