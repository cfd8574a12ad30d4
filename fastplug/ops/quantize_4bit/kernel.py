"""Blockwise quantization in Triton, as bitsandbytes' CUDA code does it. The functions are those of ``reference``.

bitsandbytes is compiled with fast arithmetic: x / absmax is x times the hardware's approximate reciprocal. An exact
division would give another code to a few of a hundred million values, so the kernels ask for the same instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.launch import on_device
from fastplug.ops.library import custom_op
from fastplug.ops.quantize_4bit import codes
from fastplug.ops.quantize_4bit.reference import check


@triton.jit
def _reciprocal(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def _nf4(x):
    """The code next to x: a search in the midpoints of neighbouring values, in fp32. Not a number becomes 0."""
    high = x > 0.03979014977812767
    upper = tl.where(high, x > 0.3893125355243683, x > -0.33967943489551544)
    code = high.to(tl.int32) * 8 + upper.to(tl.int32) * 4
    middle = tl.where(
        high,
        tl.where(upper, 0.6427869200706482, 0.2035212516784668),
        tl.where(upper, -0.13791173323988914, -0.6106329262256622),
    )
    second = x > middle
    code += second.to(tl.int32) * 2
    top = tl.where(
        upper,
        tl.where(second, 0.8614783883094788, 0.5016633868217468),
        tl.where(second, 0.2920137718319893, 0.1202552542090416),
    )
    bottom = tl.where(
        upper,
        tl.where(second, -0.045525018125772476, -0.23460740596055984),
        tl.where(second, -0.4599952697753906, -0.8480964303016663),
    )
    return code + (x > tl.where(high, top, bottom)).to(tl.int32)


@triton.jit
def _fp4(x):
    """Likewise. The values in the order of their size have the codes 0, 1, 6, 7, 4, 5, 2, 3."""
    size = tl.abs(x)
    code = tl.where(size > 0.00260417, 1, 0)
    code = tl.where(size > 0.0859375, 6, code)
    code = tl.where(size > 0.20833333, 7, code)
    code = tl.where(size > 0.29166667, 4, code)
    code = tl.where(size > 0.4166667, 5, code)
    code = tl.where(size > 0.583333, 2, code)
    code = tl.where(size > 0.8333333, 3, code)
    return code + tl.where(x < -1.1754943508222875e-38, 8, 0)  # what is smaller is flushed to 0 there


@triton.jit
def _quantize_kernel(
    weight_ptr,  # [n]
    packed_ptr,  # [(n + 1) / 2] uint8
    absmax_ptr,  # [n / BLOCKSIZE] fp32
    n,
    NF4: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    index = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(weight_ptr + index, mask=index < n, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), axis=1)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < n)
    scaled = x * _reciprocal(absmax, APPROXIMATE)[:, None]
    code = _nf4(scaled) if NF4 else _fp4(scaled)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, (high * 16 + low).to(tl.uint8), mask=byte * 2 < n)


@triton.jit
def _scales_kernel(
    absmax_ptr,  # [n] fp32
    offset_ptr,  # [] fp32
    table_ptr,  # [256] fp32, ascending
    code_ptr,  # [n] uint8
    absmax2_ptr,  # [n / BLOCKSIZE] fp32
    n,
    BLOCKSIZE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    mask = index < n
    x = tl.load(absmax_ptr + index, mask=mask, other=0.0) - tl.load(offset_ptr)
    x = tl.where(mask, x, 0.0)
    absmax = tl.max(tl.abs(x), axis=0)
    tl.store(absmax2_ptr + block, absmax)
    x = x * _reciprocal(absmax, APPROXIMATE)
    below = tl.zeros((BLOCKSIZE,), tl.int32)  # the highest code whose value x exceeds, 0 if there is none
    for power in tl.static_range(7, -1, -1):
        next_up = below + (1 << power)
        value = tl.load(table_ptr + tl.minimum(next_up, 255))
        below = tl.where((next_up <= 255) & (x > value), next_up, below)
    above = tl.minimum(below + 1, 255)
    middle = (tl.load(table_ptr + below) + tl.load(table_ptr + above)) * 0.5
    up = (x > middle) | ((x == middle) & (above % 2 == 0))  # halfway lies the code where bitsandbytes' search ends
    tl.store(code_ptr + index, tl.where(up, above, below).to(tl.uint8), mask=mask)


def _approximate(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None


@custom_op("packed", "absmax")
def quantize_4bit_blocks(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, kind: str, blocksize: int
) -> None:
    """Write the codes and scales of ``weight`` [n] into ``packed`` and ``absmax``."""
    blocks = max(config(weight.device).decoded // blocksize, 1)
    with on_device(weight):
        launched(_quantize_kernel, (triton.cdiv(absmax.numel(), blocks),))(
            weight, packed, absmax, weight.numel(), kind == "nf4", blocksize, blocks, _approximate(weight), num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


@custom_op("found", "absmax2")
def quantize_4bit_scales(
    absmax: torch.Tensor, offset: torch.Tensor, table: torch.Tensor, found: torch.Tensor, absmax2: torch.Tensor
) -> None:
    """Write the codes and scales of ``absmax`` - ``offset`` into ``found`` and ``absmax2``."""
    with on_device(absmax):
        launched(_scales_kernel, (absmax2.numel(),))(
            absmax, offset, table, found, absmax2, absmax.numel(), codes.NESTED_BLOCKSIZE, _approximate(absmax),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def quantize(weight: torch.Tensor, kind: str = "nf4", blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fastplug.ops.quantize_4bit.reference.quantize`."""
    check(weight, kind, blocksize)
    flat = weight.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=flat.device)
    quantize_4bit_blocks(flat, packed, absmax, kind, blocksize)
    return packed, absmax


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`fastplug.ops.quantize_4bit.reference.quantize_scales`."""
    offset = absmax.mean()
    table = codes.scale_values(absmax.device)
    found = torch.empty(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(-(-absmax.numel() // codes.NESTED_BLOCKSIZE), dtype=torch.float32, device=absmax.device)
    quantize_4bit_scales(absmax, offset, table, found, absmax2)
    return found, absmax2, offset, table
