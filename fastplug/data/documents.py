"""What a tokenized document is: token ids, labels, and what else a dataset's row says about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastplug.errors import DataError

IGNORED = -100  # the label of what is not learnt, by PyTorch's and transformers' convention
LOSS_MASKS = (
    "completion_mask",
    "assistant_masks",
    "loss_mask",
)  # 1 where a token is learnt; TRL's names, and a plain one


@dataclass(frozen=True)
class Document:
    """One document: token ids and, of the same length, labels. The first token's label is ``IGNORED``: nothing before
    it predicts it."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    def part(self, start: int, end: int) -> Document:
        """The tokens from ``start`` to ``end`` as a document of its own."""
        return Document(self.input_ids[start:end], [IGNORED, *self.labels[start + 1 : end]][: end - start])


def read_document(row: Any, where: str) -> Document:
    """A document from a row: a mapping with ``input_ids``, or the token ids alone.

    A mapping may have ``labels`` (else the token ids are learnt), an ``attention_mask`` (what it hides is padding and
    left out) and masks of what is learnt: ``completion_mask``, ``assistant_masks``, ``loss_mask``.

    Args:
        row: The row; its values are lists, arrays or tensors of one dimension.
        where: What to call it in an error.

    Raises:
        DataError: There are no token ids, something else than integers, or values of different lengths.
    """
    row = row if isinstance(row, Mapping) else {"input_ids": row}
    if row.get("input_ids") is None:
        raise DataError(
            f"fastplug.data: {where} has no input_ids (it has {', '.join(map(str, row))}); tokenize it first"
        )
    ids = _integers(row["input_ids"], where, "input_ids")
    values = {"labels": ids if row.get("labels") is None else _integers(row["labels"], where, "labels")}
    for name in ("attention_mask", *LOSS_MASKS):
        if row.get(name) is not None:
            values[name] = _integers(row[name], where, name)
    for name, column in values.items():
        if len(column) != len(ids):
            raise DataError(f"fastplug.data: {where} has {len(ids)} input_ids but {len(column)} {name}")
    labels = list(values["labels"])
    for name in LOSS_MASKS:
        if name in values:
            labels = [label if learnt else IGNORED for label, learnt in zip(labels, values[name])]
    if "attention_mask" in values and not all(values["attention_mask"]):
        kept = [index for index, real in enumerate(values["attention_mask"]) if real]
        ids, labels = [ids[index] for index in kept], [labels[index] for index in kept]
    return Document(list(ids), [IGNORED, *labels[1:]] if labels else [])


def split_packed(row: Any, where: str) -> Iterator[Document]:
    """The documents of a row that may be a pack of several, by its ``seq_lengths`` or by ``position_ids`` that start
    again; the tokens of a row without either are one document."""
    lengths = _lengths(row, where)
    if lengths is None:
        yield read_document(row, where)
        return
    columns = [name for name in ("input_ids", "labels", "attention_mask", *LOSS_MASKS) if row.get(name) is not None]
    start = 0
    for length in lengths:
        part = {name: row[name][start : start + length] for name in columns}
        yield read_document(part, where)
        start += length
    if start != len(row["input_ids"]):
        raise DataError(
            f"fastplug.data: {where} has {len(row['input_ids'])} input_ids, but its seq_lengths add up to {start}"
        )


def _lengths(row: Any, where: str) -> list[int] | None:
    if not isinstance(row, Mapping):
        return None
    if row.get("seq_lengths") is not None:
        return _integers(row["seq_lengths"], where, "seq_lengths")
    if row.get("position_ids") is None:
        return None
    positions = _integers(row["position_ids"], where, "position_ids")
    starts = [i for i, position in enumerate(positions) if i == 0 or position != positions[i - 1] + 1]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)])]


def _integers(values: Any, where: str, name: str) -> list[int]:
    found: Any = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes)):
        raise DataError(f"fastplug.data: {name} of {where} must be a list of integers, not {type(values).__name__}")
    if found and not isinstance(found[0], int):
        raise DataError(
            f"fastplug.data: {name} of {where} must hold integers, not {type(found[0]).__name__}; tokenize text first, "
            "one document a row"
        )
    return found if isinstance(found, list) else list(found)


__all__ = ["IGNORED", "LOSS_MASKS", "Document", "read_document", "split_packed"]
