"""A and B of several adapters as one pair of matrices: the kernel against PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastplug.ops.adapter_matrices import kernel, reference

pytestmark = pytest.mark.interpreter
# In features; of each adapter: its rank, its out features and where these begin; all out features.
GROUPS = {
    "one": (40, [(16, 72, 0)], 72),
    "one of two": (40, [(8, 24, 48)], 72),
    "gate and up": (128, [(16, 300, 0), (16, 300, 300)], 600),
    "q and v": (33, [(4, 70, 0), (9, 20, 90)], 110),
    "q, k and v": (96, [(16, 130, 0), (5, 40, 130), (16, 40, 170)], 210),
    "four": (16, [(2, 8, 0), (2, 8, 8), (2, 8, 16), (2, 8, 24)], 32),
}


def numbers(*shape, device):
    """Such as the interpreter does not have to round to bf16, which it does by cutting off."""
    drawn = torch.randn(shape, device=device)
    return drawn if device.type == "cuda" else drawn.bfloat16().float()


def adapters(name, dtypes, device):
    width, parts, out_features = GROUPS[name]
    kinds = [dtypes[i % len(dtypes)] for i in range(len(parts))]
    a = [numbers(rank, width, device=device).to(kind) for (rank, _, _), kind in zip(parts, kinds)]
    b = [numbers(rows, rank, device=device).to(kind) for (rank, rows, _), kind in zip(parts, kinds)]
    return a, b, [row for _, _, row in parts], out_features


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16), (torch.float64,)],
    ids=["fp32", "bf16", "mixed", "fp64"],
)
def test_same_bits(name, dtype, dtypes, device):
    a, b, rows, out_features = adapters(name, dtypes, device)
    stacked, block = kernel.matrices(a, b, rows, out_features, dtype)
    assert stacked.dtype == block.dtype == dtype
    assert torch.equal(stacked, torch.cat([part.to(dtype) for part in a]))
    truth, column = torch.zeros(out_features, len(stacked), dtype=dtype, device=device), 0
    for part, row in zip(b, rows):
        truth[row : row + len(part), column : column + part.shape[1]] = part.to(dtype)
        column += part.shape[1]
    assert torch.equal(block, truth)
    for mine, theirs in zip((stacked, block), reference.matrices(a, b, rows, out_features, dtype)):
        assert torch.equal(mine, theirs)


def test_one_launch_and_none_where_nothing_changes(device, monkeypatch):
    launches = []
    launched = kernel.launched
    monkeypatch.setattr(kernel, "launched", lambda *given: launches.append(given) or launched(*given))
    kernel.matrices(*adapters("q, k and v", (torch.float32,), device), torch.bfloat16)
    assert len(launches) == 1
    a, b, rows, out_features = adapters("one", (torch.bfloat16,), device)
    stacked, block = kernel.matrices(a, b, rows, out_features, torch.bfloat16)
    assert len(launches) == 1
    assert stacked.data_ptr() == a[0].data_ptr()
    assert block.data_ptr() == b[0].data_ptr()


def test_matrices_that_are_views_are_read_as_they_are(device):
    a, b, rows, out_features = adapters("gate and up", (torch.float32,), device)
    views = [torch.empty(part.shape[::-1], device=device).t().copy_(part) for part in b]
    for mine, theirs in zip(
        kernel.matrices(a, views, rows, out_features, torch.bfloat16),
        kernel.matrices(a, b, rows, out_features, torch.bfloat16),
    ):
        assert torch.equal(mine, theirs)


def test_custom_op(device):
    a, b, rows, out_features = adapters("q and v", (torch.float32,), device)
    stacked, block = torch.empty(13, 33, device=device), torch.empty(out_features, 13, device=device)
    torch.library.opcheck(kernel.adapter_matrices.op, (a, b, rows, stacked, block))
