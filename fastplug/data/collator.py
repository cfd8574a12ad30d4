"""Batches without padding: all documents of a batch one after another in a single row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastplug.data.documents import IGNORED, Document, split_packed
from fastplug.errors import DataError, OptionError


class PaddingFreeCollator:
    """Flattens a batch into one row: ``data_collator=`` of a Trainer, ``collate_fn=`` of a DataLoader.

    Args:
        collator: A collator of your own that runs first; its batch may be padded. None reads the rows themselves.
        cu_seqlens: Give ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` with the batch, as
            transformers' ``FlashAttentionKwargs`` names them: the model then need not look for the documents.
        pad_to_multiple_of: Fill the row up to a multiple of this; the filling is a document of its own and not learnt.
        pad_token_id: What it is filled with.

    A row of the dataset is a mapping with ``input_ids`` and, as far as there are, ``labels``, masks of what is learnt
    (see :func:`fastplug.data.pack`), an ``attention_mask`` with 0 at padding, which is left out, and ``seq_lengths`` or
    ``position_ids`` where the row is a pack. Plain lists of token ids will do too.

    A batch has, for T tokens in N documents:

    * ``input_ids``, ``labels``, ``position_ids``: int64 [1, T]. Positions start at 0 in each document, and the label of
      its first token is -100: no document predicts the next.
    * ``use_cache``: False. Asked for a cache, transformers would let documents see each other.
    * ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32 [N + 1], where documents begin, and T; ``max_length_q``,
      ``max_length_k``: the length of the longest. Made here, on the CPU, once per step.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
        *,
        cu_seqlens: bool = True,
        pad_to_multiple_of: int | None = None,
        pad_token_id: int = 0,
    ) -> None:
        if collator is not None and not callable(collator):
            raise OptionError(f"fastplug.data: collator must be callable, not {type(collator).__name__}")
        if pad_to_multiple_of is not None and (not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1):
            raise OptionError(
                f"fastplug.data: pad_to_multiple_of must be a positive whole number, not {pad_to_multiple_of!r}"
            )
        self.collator, self.cu_seqlens = collator, cu_seqlens
        self.pad_to_multiple_of, self.pad_token_id = pad_to_multiple_of, pad_token_id

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """One row of all documents; those without tokens are left out.

        Raises:
            DataError: No feature has a token, or one is not tokenized; names it.
        """
        rows = features if self.collator is None else _rows(self.collator(features))
        documents = [
            document
            for number, row in enumerate(rows)
            for document in split_packed(row, f"row {number} of the batch")
            if len(document)
        ]
        if not documents:
            raise DataError("fastplug.data: a batch without a single token; leave empty documents out of the dataset")
        self._fill(documents)
        lengths = torch.tensor([len(document) for document in documents])
        ends = lengths.cumsum(0)
        starts = (ends - lengths).repeat_interleave(lengths)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[token for document in documents for token in document.input_ids]]),
            "labels": torch.tensor([[label for document in documents for label in document.labels]]),
            "position_ids": (torch.arange(int(ends[-1])) - starts)[None],
            "use_cache": False,
        }
        if self.cu_seqlens:
            cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = cu_seqlens
            batch["max_length_q"] = batch["max_length_k"] = int(lengths.max())
        return batch

    def _fill(self, documents: list[Document]) -> None:
        missing = -sum(map(len, documents)) % (self.pad_to_multiple_of or 1)
        if missing:
            documents.append(Document([self.pad_token_id] * missing, [IGNORED] * missing))


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a collated batch: what has as many entries as there are rows of token ids."""
    if "input_ids" not in batch:
        raise DataError(f"fastplug.data: the collator's batch has no input_ids (it has {', '.join(batch)})")
    count = len(batch["input_ids"])
    columns = {name: values for name, values in batch.items() if hasattr(values, "__len__") and len(values) == count}
    return [{name: values[index] for name, values in columns.items()} for index in range(count)]


__all__ = ["PaddingFreeCollator"]
