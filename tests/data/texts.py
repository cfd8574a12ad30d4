"""Documents of many lengths for the tests of packing, and one row or one padded batch of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests import models

LENGTHS = (11, 3, 1, 27, 7, 15)  # a single token; 64 in all: fewer without gradients run unpatched


looks_for_documents = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("transformers.masking_utils") is None,
    reason="transformers before 4.53 does not tell documents apart by their positions",
)


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random documents, of which a part is not learnt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        tokens = torch.randint(3, models.VOCABULARY, (length,), generator=generator)
        labels = tokens.masked_fill(torch.rand(length, generator=generator) < 0.2, -100)
        made.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return made


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The documents as a batch padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(values: list[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([value + [filling] * (longest - len(value)) for value in values])

    return {
        "input_ids": column([row["input_ids"] for row in rows], 0),
        "attention_mask": column([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": column([row["labels"] for row in rows], -100),
    }


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
