"""The project's tolerance: at most twice the error that PyTorch itself makes in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor | None]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference to the truth, NaN counted as infinite."""
    if truth.numel() == 0:
        assert value.shape == truth.shape
        return 0.0
    difference = (value.double() - truth.double()).abs()
    return float("inf") if difference.isnan().any() else float(difference.max())


def assert_as_accurate(ours: Tensors, pytorch: Tensors, truth: Tensors, names: Sequence[str] | None = None) -> None:
    """Each of ``ours`` is within 2x of PyTorch's own error to ``truth`` (computed in fp32 or fp64).

    The slack beside the factor is a few units in the last place of the largest value, for results where PyTorch's
    own error happens to be zero.
    """
    for i, (mine, theirs, true) in enumerate(zip(ours, pytorch, truth, strict=True)):
        name = names[i] if names else f"tensor {i}"
        if true is None:
            assert mine is None, f"{name}: expected no tensor"
            continue
        assert mine is not None, f"{name} is missing"
        assert theirs is not None
        assert mine.shape == true.shape, f"{name}: shape {tuple(mine.shape)}, expected {tuple(true.shape)}"
        scale = float(true.abs().max()) if true.numel() else 0.0
        slack = 2 * torch.finfo(theirs.dtype).eps * scale
        mine_error, their_error = error(mine, true), error(theirs, true)
        assert mine_error <= 2 * their_error + slack, f"{name}: error {mine_error:.3e}, PyTorch's own {their_error:.3e}"
