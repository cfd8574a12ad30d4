"""Root-mean-square layer normalization, with the residual addition before it fused in."""

from fastplug.ops.rms_norm.autograd import rms_norm

__all__ = ["rms_norm"]
