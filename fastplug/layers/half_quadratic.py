"""Half-quadratic quantization, HQQ (Badri and Shaji 2023, mobiusml.github.io/hqq_blog): 4 bits without calibration.

Every group of a row has a scale s and a zero point z, and a weight is (q - z) s for a code q from 0 to 15. The scale
follows from the group's range. The zero point is the one that minimises the sum of |w - (q - z) s|^p with p < 1, which
cares for most weights and little for outliers. Half-quadratic splitting solves that: with an auxiliary error e it takes
turns between two problems with closed solutions,

    e = shrink(w - (q - z) s)      shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
    z = mean over the group of q - (w - e) / s

while beta grows by a factor each time, until the error no longer falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastplug.errors import ModelError, OptionError
from fastplug.quant.codec import EncodedWeight
from fastplug.quant.hqq import HQQ, hqq

LARGEST = 15  # of the 4-bit codes
NORM, BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20  # p, the first beta, its growth a step, and the most steps
_VALUES = 1 << 22  # at a time: several copies in fp32 are needed
_STEEPEST = 2e4  # of 1 / s: a group of equal weights has no range


@dataclass(frozen=True)
class HalfQuadratic:
    """HQQ in 4 bits, as layers of the package ``hqq`` store it.

    Attributes:
        group: Neighbouring weights of a row that share a scale and a zero point.
    """

    group: int = 64

    def __post_init__(self) -> None:
        if self.group < 8 or self.group % 8:
            raise OptionError(f"fastplug: blocksize {self.group} is no multiple of 8, which HQQ's groups are")

    def __call__(self, weight: torch.Tensor) -> EncodedWeight:
        """Encode a weight [out_features, in_features] of fp32, bf16 or fp16; scales have its dtype.

        One on the meta device gives the shapes alone.

        Raises:
            ModelError: The groups do not divide a row.
        """
        rows, columns = weight.shape
        if columns % self.group:
            raise ModelError(
                f"fastplug: groups of {self.group} do not divide rows of {columns} weights; choose another blocksize, "
                "or name such layers in skip="
            )
        groups = weight.detach().reshape(-1, self.group)
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(len(groups), 1, dtype=weight.dtype, device=weight.device)
        zeros = torch.empty_like(scales)
        step = max(1, _VALUES // self.group)
        for start in range(0, 0 if weight.is_meta else len(groups), step):
            part = slice(start, start + step)
            codes[part], scales[part], zeros[part] = solve(groups[part].float(), weight.dtype)
        half = (len(codes) + 1) // 2
        packed = codes[:half] << 4
        packed[: len(codes) - half] |= codes[half:]
        if len(codes) % 2:
            raise ModelError(f"fastplug: a weight of {rows}x{columns} has an odd number of groups of {self.group}")
        meta = {"packing": "4bit_u8", "shape": (rows, columns), "axis": 1, "group_size": self.group}
        found = hqq(HQQ(), packed, {**meta, "scale": scales, "zero": zeros})
        if isinstance(found, str):
            raise ModelError(f"fastplug: a weight of {rows}x{columns} cannot be stored as HQQ: {found}")
        return found


def solve(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [groups, group] uint8, scales and zero points [groups, 1] in ``dtype``, of fp32 [groups, group]."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    inverse = (LARGEST / (high - low)).clamp_(max=_STEEPEST)
    zero = (-low * inverse).round_()
    beta, best = BETA, float("inf")
    chosen = zero
    for _ in range(STEPS):
        codes = _codes(weight, inverse, zero)
        error = weight - (codes - zero) / inverse
        size = error.abs()
        total = float(size.mean())
        if total >= best:
            break
        best, chosen = total, zero
        shrunk = error.sign_().mul_((size - size.pow(NORM - 1) / beta).clamp_(min=0))
        zero = (codes - (weight - shrunk) * inverse).mean(1, keepdim=True)
        beta *= GROWTH
    # What is stored is rounded: the codes are those next to the weights by the rounded numbers.
    scale, chosen = (1 / inverse).to(dtype), chosen.to(dtype)
    codes = _codes(weight, 1 / scale.float(), chosen.float())
    return codes.to(torch.uint8), scale, chosen


def _codes(weight: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (weight * inverse).add_(zero).round_().clamp_(0, LARGEST)
