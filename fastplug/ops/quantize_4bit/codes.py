"""The values that the codes of bitsandbytes' formats stand for.

NF4 has the quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E), FP4 a sign,
two exponent bits and a mantissa bit, and the scales of double quantization the dynamic 8-bit type (Dettmers et al.
2022, arXiv:2110.02861, section 1.3): a sign, leading zeros that tell the power of ten, and a fraction of it.
"""

from __future__ import annotations

import functools

import torch

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # of the three bits below the sign; they are divided by 12

KINDS = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # scales that share a scale of their own


def values(kind: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """[16] fp32: what each 4-bit code stands for, between -1 and 1."""
    if kind == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device=device)
    positive = torch.tensor(_FP4, dtype=torch.float32)
    return (torch.cat((positive, -positive)) / positive.max()).to(device)


def scale_values(device: torch.device | str = "cpu") -> torch.Tensor:
    """[256] fp32, ascending: what each 8-bit code of a scale stands for, between -1 and 1."""
    return torch.tensor(_dynamic(), dtype=torch.float32, device=device)


@functools.cache
def _dynamic() -> tuple[float, ...]:
    found = [0.0, 1.0]
    for zeros in range(7):  # of the exponent: 2**k equal parts of the decade from 0.1 to 1, times 10**(k - 6)
        edges = torch.linspace(0.1, 1, 2**zeros + 1, dtype=torch.float32)
        for middle in (10 ** (zeros - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist():
            found += (middle, -middle)
    return tuple(sorted(found))
