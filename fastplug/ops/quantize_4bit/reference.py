"""Blockwise quantization in plain PyTorch, to the bits of bitsandbytes' CPU code.

Every ``blocksize`` values share the scale absmax = max|x|; a value becomes the code whose value is next to x / absmax.
Double quantization stores the scales in 8 bits in the same way, in blocks of 256, after their mean was subtracted
(QLoRA, arXiv:2305.14314, section 3). bitsandbytes looks those up in a table of 65536 steps on a CPU, and searches the
nearest code on a GPU; ``kernel.py`` does the latter.
"""

from __future__ import annotations

import functools

import torch

from fastplug.ops.quantize_4bit import codes

_CHUNK = 1 << 18  # values at a time: their copies in fp32 stay in the cache, and small beside a matrix
_TINY = 1e-38


def check(weight: torch.Tensor, kind: str, blocksize: int) -> None:
    """Raise ``ValueError`` for what the format cannot hold."""
    if kind not in codes.KINDS:
        raise ValueError(f"there is no 4-bit format {kind!r}: nf4 or fp4")
    if blocksize not in codes.BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is not one of {', '.join(map(str, codes.BLOCKSIZES))}")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"a weight of {weight.dtype} cannot be quantized: fp32, bf16 or fp16")
    if not weight.numel():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no values to quantize")


def quantize(weight: torch.Tensor, kind: str = "nf4", blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The 4-bit codes and scales of a weight.

    Args:
        weight: fp32, bf16 or fp16, any shape; numbered along rows.
        kind: ``nf4`` or ``fp4``.
        blocksize: Values that share a scale: a power of two from 32 to 4096.

    Returns:
        packed: [(n + 1) / 2] uint8, two codes a byte, the first in the high four bits.
        absmax: [n / blocksize, rounded up] fp32.

    Raises:
        ValueError: Another dtype, format or block size, or no values.
    """
    check(weight, kind, blocksize)
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=flat.device)
    table = codes.values(kind, flat.device)
    ordered, order = table.sort(stable=True)
    bounds = (ordered[:-1] + ordered[1:]) / 2
    for start in range(0, n, _CHUNK):
        part = flat[start : start + _CHUNK].float()
        scaled = _scaled(part, blocksize, absmax[start // blocksize :])
        index = torch.bucketize(scaled, bounds, out_int32=True)
        index = (index if kind == "nf4" else order[index]).to(torch.uint8)
        if len(index) % 2:
            filler = torch.bucketize(scaled.new_zeros(1), bounds)
            index = torch.cat((index, (filler if kind == "nf4" else order[filler]).to(torch.uint8)))
        packed[start // 2 : (start + len(index)) // 2] = (index[::2] << 4) | index[1::2]
    return packed, absmax


def _scaled(part: torch.Tensor, blocksize: int, absmax: torch.Tensor) -> torch.Tensor:
    """x / absmax [n], and the scales written into ``absmax``."""
    whole = len(part) // blocksize * blocksize
    blocks = part[:whole].view(-1, blocksize)
    largest = blocks.abs().amax(-1) if whole else part.new_empty(0)
    absmax[: len(largest)] = largest
    scaled = (blocks * (1.0 / largest.clamp(min=_TINY))[:, None]).clamp_(-1, 1).view(-1)
    if whole == len(part):
        return scaled
    rest = part[whole:]
    last = rest.abs().amax().clamp(min=_TINY)
    absmax[len(largest)] = last
    return torch.cat((scaled, (rest / last).clamp(-1, 1)))


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization of scales [blocks] fp32.

    Returns:
        codes: [blocks] uint8.
        absmax2: [blocks / 256, rounded up] fp32.
        offset: 0-dim fp32, the mean that was subtracted.
        code2: [256] fp32, so that ``absmax = code2[codes] * absmax2[block] + offset``.
    """
    offset = absmax.mean()
    shifted = absmax - offset
    missing = -len(shifted) % codes.NESTED_BLOCKSIZE
    blocks = torch.nn.functional.pad(shifted, (0, missing)).view(-1, codes.NESTED_BLOCKSIZE)
    absmax2 = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax2)[:, None]).nan_to_num_(-1.0)  # a block of zeros has the lowest code
    step = ((scaled + 1.0) * 32767.5 + 0.5).int().clamp_(0, 65535)
    found = _lookup().to(absmax.device)[step].view(-1)[: len(absmax)]
    return found, absmax2, offset, codes.scale_values(absmax.device)


@functools.cache
def _lookup() -> torch.Tensor:
    """[65536] uint8: the code next to each of the equal steps from -1 to 1."""
    table = codes.scale_values()
    steps = torch.arange(65536, dtype=torch.float32) / 32767.5 - 1.0
    return torch.bucketize(steps, (table[:-1] + table[1:]) / 2).to(torch.uint8)
