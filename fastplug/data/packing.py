"""Documents of many lengths as rows of nearly one length."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fastplug.data.binning import best_fit_decreasing
from fastplug.data.documents import Document, read_document
from fastplug.errors import DataError, OptionError

logger = logging.getLogger("fastplug")

Overflow = Literal["error", "split", "truncate"]
OVERFLOW: tuple[str, ...] = ("error", "split", "truncate")
EMPTY: tuple[str, ...] = ("drop", "error")
COLUMNS = ("input_ids", "labels", "position_ids", "seq_lengths")


def pack(
    documents: Any,
    max_length: int,
    *,
    overflow: Overflow = "error",
    empty: Literal["drop", "error"] = "drop",
    group_size: int | None = None,
) -> Any:
    """Put documents together into rows of at most ``max_length`` tokens, by best-fit decreasing.

    Each row holds whole documents one after another. Their positions start at 0 again, so that a model tells them
    apart, and the first token of each has the label -100, so that no document predicts the next. The same arguments
    give the same rows; shuffle them afterwards, as trainers do.

    Args:
        documents: Tokenized documents: a sequence of lists of token ids, a sequence of mappings, or a
            ``datasets.Dataset`` (or ``IterableDataset``). Of mappings and datasets these columns are read:
            ``input_ids``; ``labels`` (without them all tokens are learnt); ``completion_mask``, ``assistant_masks`` or
            ``loss_mask`` with 1 where a token is learnt; ``attention_mask`` with 0 at padding, which is left out.
        max_length: Tokens of a row, at most.
        overflow: What becomes of a document longer than ``max_length``: ``"error"``; ``"split"`` cuts it into documents
            of at most ``max_length`` tokens, which do not see each other; ``"truncate"`` keeps its first tokens.
        empty: What becomes of a document without tokens: ``"drop"`` leaves it out, ``"error"`` raises.
        group_size: Pack so many documents at a time, which bounds the memory; None for all at once, and for datasets
            100,000.

    Returns:
        Rows with ``input_ids``, ``labels``, ``position_ids`` (lists of ints of one length) and ``seq_lengths`` (the
        length of each document): a list of dicts, or a dataset where one was given.

    Raises:
        DataError: A document is too long, empty (if that is an error), not tokenized or of unequal columns, or all are
            empty. Names the document and its length.
        OptionError: An argument has an impossible value.
    """
    _check(max_length, overflow, empty, group_size)
    if hasattr(documents, "map") and hasattr(documents, "column_names"):
        return _pack_dataset(documents, max_length, overflow, empty, 100_000 if group_size is None else group_size)
    if isinstance(documents, (str, bytes, Mapping)) or not isinstance(documents, Iterable):
        raise DataError(
            f"fastplug.data.pack: documents must be a sequence of token lists or of mappings with input_ids, or a "
            f"datasets.Dataset, not {type(documents).__name__}"
        )
    rows: list[dict[str, list[int]]] = []
    numbered = enumerate(documents)
    while group := list(itertools.islice(numbered, group_size)):
        rows += _pack([document for _, document in group], group[0][0], max_length, overflow, empty)
    if not rows:
        raise DataError("fastplug.data.pack: there is nothing to pack: no document has a token")
    _tell(rows, max_length)
    return rows


def _pack(rows: Sequence[Any], first: int, max_length: int, overflow: str, empty: str) -> list[dict[str, list[int]]]:
    """Packs of one group, whose first document is number ``first`` of all."""
    pieces: list[Document] = []
    dropped = 0
    for number, row in enumerate(rows, first):
        document = read_document(row, f"document {number}")
        if not len(document):
            if empty == "error":
                raise DataError(
                    f"fastplug.data.pack: document {number} has no tokens; empty='drop' leaves such documents out"
                )
            dropped += 1
        elif len(document) <= max_length:
            pieces.append(document)
        elif overflow == "error":
            raise DataError(
                f"fastplug.data.pack: document {number} has {len(document)} tokens, more than max_length={max_length}; "
                "overflow='split' cuts such documents, overflow='truncate' keeps their beginning, or raise max_length"
            )
        else:
            starts = range(0, len(document), max_length) if overflow == "split" else (0,)
            pieces += [document.part(start, min(start + max_length, len(document))) for start in starts]
    if dropped:
        logger.warning("fastplug.data.pack: left out %d of %d documents, which have no tokens", dropped, len(rows))
    bins = best_fit_decreasing([len(piece) for piece in pieces], max_length)
    return [_row([pieces[index] for index in chosen]) for chosen in bins]


def _row(documents: Sequence[Document]) -> dict[str, list[int]]:
    lengths = [len(document) for document in documents]
    return {
        "input_ids": [token for document in documents for token in document.input_ids],
        "labels": [label for document in documents for label in document.labels],
        "position_ids": [position for length in lengths for position in range(length)],
        "seq_lengths": lengths,
    }


def _pack_dataset(dataset: Any, max_length: int, overflow: str, empty: str, group_size: int) -> Any:
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise DataError(
            f"fastplug.data.pack: this is a dictionary of datasets; pack one of them: {', '.join(map(str, columns))}"
        )
    if columns is not None and "input_ids" not in columns:
        raise DataError(
            f"fastplug.data.pack: the dataset has no column input_ids (it has {', '.join(columns)}); tokenize it first"
        )
    function = functools.partial(_pack_batch, max_length=max_length, overflow=overflow, empty=empty)
    packed = dataset.map(function, with_indices=True, batched=True, batch_size=group_size, remove_columns=columns)
    if hasattr(packed, "__len__"):
        if not len(packed):
            raise DataError("fastplug.data.pack: there is nothing to pack: no document has a token")
        _tell(packed.select_columns("seq_lengths"), max_length)
    return packed


def _pack_batch(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], max_length: int, overflow: str, empty: str
) -> dict[str, list[list[int]]]:
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    packs = _pack(rows, indices[0], max_length, overflow, empty)
    return {name: [made[name] for made in packs] for name in COLUMNS}


def _check(max_length: Any, overflow: Any, empty: Any, group_size: Any) -> None:
    for name, value, allowed in (("overflow", overflow, OVERFLOW), ("empty", empty, EMPTY)):
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise OptionError(f"fastplug.data.pack: {name} cannot be {value!r}; one of {choices}")
    for name, value in (("max_length", max_length), ("group_size", 1 if group_size is None else group_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"fastplug.data.pack: {name} must be a positive whole number, not {value!r}")


def _tell(rows: Iterable[Any], max_length: int) -> None:
    lengths = [row["seq_lengths"] for row in rows]
    documents, tokens = sum(map(len, lengths)), sum(map(sum, lengths))
    logger.info(
        "fastplug.data.pack: %d documents of %d tokens in %d rows of %d, which are %.1f%% full",
        documents,
        tokens,
        len(lengths),
        max_length,
        100 * tokens / (len(lengths) * max_length),
    )


__all__ = ["pack"]
