"""The gated linear unit of transformer MLPs: ``activation(gate) * up``."""

from fastplug.ops.glu.autograd import glu

__all__ = ["glu"]
