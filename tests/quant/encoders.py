"""Encoders of the formats, written from their documentation and sharing no code with fastplug's decoders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column lies in the first, second ... four bits of a word


def stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] as int32 words [..., n * bits / 32], the bits of each row one after another, lowest first."""
    data = np.unpackbits(codes.to(torch.uint8).numpy()[..., None], axis=-1, count=bits, bitorder="little")
    data = data.reshape(*codes.shape[:-1], -1)
    pad = -data.shape[-1] % 32
    data = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, pad)])
    return torch.from_numpy(np.packbits(data, axis=-1, bitorder="little").view(np.int32))


def awq(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes [..., n] as AWQ's int32 words."""
    ordered = codes.unflatten(-1, (-1, 8))[..., AWQ_ORDER].long()
    words = sum(ordered[..., place] << 4 * place for place in range(8))
    return torch.as_tensor(words).to(torch.int32)  # keeps the lowest 32 bits


def split(codes: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Codes [n] as words of ``width`` bits, each holding one code of every part of n / (width // bits)."""
    parts = width // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.numel() % parts)).view(parts, -1)
    words = sum(padded[part] << (parts - 1 - part) * bits for part in range(parts))
    return torch.as_tensor(words).to(torch.uint8 if width == 8 else torch.int32)


def choose(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K] 0 .. 2**bits - 1, scales and integer zero points [N, K / group] by minimum and maximum."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    top = 2**bits - 1
    scales = ((high - low) / top).clamp(min=1e-6).to(weight.dtype)
    zeros = (-low / scales.float()).round().clamp(0, top).int()
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top).int()
    return codes.flatten(1), scales, zeros


def spread(values: torch.Tensor, group: int | Sequence[int]) -> torch.Tensor:
    """One value per column: of its group, or of the group that is named for it."""
    if isinstance(group, int):
        return values.repeat_interleave(group, 1)
    return values[:, torch.as_tensor(group).long()]
