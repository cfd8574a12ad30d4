"""What both kernels of the adapted gated unit for Hopper GPUs are made of, in Gluon, Triton's lower level.

A tile is 64 tokens by 64 channels, in the layout in which the tensor cores leave their results. An adapter's share is
an accumulator to which the tile is added where it lies; results go back over the tile in shared memory, from where the
copy engine writes them and the tensor cores read them for the thin products. So each tensor is read and written once.

Programs are persistent and each takes a stretch of all tiles, of equal length. What is summed over a row or a column of
tiles stays in registers until it ends, or the program's stretch does. Sums that were written in parts are added up by
``sums.py``, in a fixed order: the same bits each time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma

WARPS = 4

# Named otherwise up to Triton 3.8.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _sigmoid(x):
    below = 1.0 + gl.exp2(-1.4426950408889634 * x)  # at most infinite, of which the reciprocal is 0
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _cubic(g):
    """z of gelu's tanh approximation 0.5 g (1 + tanh(z / 2)) = g sigmoid(z), and dz/dg."""
    c = gl.minimum(gl.maximum(g, -32.0), 32.0)  # saturated long before, and c³ cannot overflow
    square = c * c
    return 1.5957691216057308 * c * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 0.134145 * square)


@gluon.jit
def value(g, ACTIVATION: gl.constexpr):
    if ACTIVATION == "silu":
        return g * _sigmoid(g)
    else:
        z, _ = _cubic(g)
        return g * _sigmoid(z)


@gluon.jit
def value_and_slope(g, ACTIVATION: gl.constexpr):
    """The activation and its derivative. Where 1 - factor cancels, what it is added to does not."""
    if ACTIVATION == "silu":
        factor = _sigmoid(g)
        slope = factor + factor * (1.0 - factor) * g
    else:
        z, dz = _cubic(g)
        factor = _sigmoid(z)
        slope = factor + factor * (1.0 - factor) * g * dz
    return g * factor, slope


@gluon.jit
def share(left, right, like):
    """left rightᵀ as an accumulator."""
    return warpgroup_mma(left, right, like, use_acc=False, is_async=True)
