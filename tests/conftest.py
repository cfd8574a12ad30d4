"""Shared fixtures. Without a GPU, Triton interprets its kernels: the variable must be set before triton is imported."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  # before anything imports distutils: later, as PyTorch's inductor does, it refuses

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same bits each time, on a GPU too. FlashAttention's backward adds with atomics unless it is asked not to, and
    a mere warning (``warn_only``) does not ask it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many quantized weights were decoded, where kernels were not just compiled ahead."""
    from fastplug.ops import ahead
    from fastplug.quant.bnb4 import BitsAndBytes4
    from fastplug.quant.codec import EncodedWeight

    count: Counter[str] = Counter()
    decode, decode_all = EncodedWeight.decode, BitsAndBytes4.decode_all

    def counted(self: EncodedWeight, *args: Any, **kwargs: Any) -> Any:
        count["decoded"] += not ahead.going()
        return decode(self, *args, **kwargs)

    def counted_together(self: BitsAndBytes4, weights: Sequence[EncodedWeight], *args: Any) -> bool:
        done = decode_all(self, weights, *args)
        count["decoded"] += len(weights) * done * (not ahead.going())
        return done

    monkeypatch.setattr(EncodedWeight, "decode", counted)
    monkeypatch.setattr(BitsAndBytes4, "decode_all", counted_together)
    return count


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
