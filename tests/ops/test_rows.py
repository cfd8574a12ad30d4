"""Copies between tensors whose rows lie apart."""

from __future__ import annotations

import pytest
import torch

from fastplug.ops.rows import copy_rows


def apart(rows: int, heads: int, width: int, gap: int, start: int, dtype: torch.dtype, device: torch.device):
    """[rows, heads, width] of random numbers in rows that are ``gap`` numbers longer."""
    size = heads * width
    buffer = torch.randint(-9, 9, (start + rows * (size + gap),), device=device).to(dtype)
    return buffer[start:].view(rows, size + gap)[:, :size].unflatten(-1, (heads, width)), buffer


LAYOUTS = [(8, 64, 0), (8, 7, 0), (7, 64, 0), (8, 64, 2)]  # width, gap, start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.complex128])
@pytest.mark.parametrize(("width", "gap", "start"), LAYOUTS)
def test_copies_all_and_nothing_else(width, gap, start, dtype, device):
    out, buffer = apart(5, 3, width, gap, start, dtype, device)
    x = apart(5, 3, width, 2 * gap, 0, dtype, device)[0]
    expected, place = buffer.clone(), out.storage_offset()
    expected[place:].view(5, -1)[:, : 3 * width] = x.flatten(1)
    copy_rows(out, x)
    assert torch.equal(buffer, expected)


def test_other_dtypes_and_layouts_too(device):
    x = torch.randn(4, 6, 8, device=device)
    for given in (x.double(), x.transpose(0, 1).contiguous().transpose(0, 1), x.flip(-1), x.mT.contiguous().mT):
        out = torch.zeros(4, 6, 8, device=device)
        copy_rows(out, given)
        assert torch.equal(out, given.float())
    nothing = torch.zeros(0, 8, device=device)
    copy_rows(nothing, nothing.clone())
