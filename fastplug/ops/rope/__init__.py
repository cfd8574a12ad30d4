"""Rotary position embedding of queries and keys, with the per-head RMSNorm before it fused in."""

from fastplug.ops.rope.autograd import rope

__all__ = ["rope"]
