"""``fastplug.data.pack``: what lies where, what is learnt, and what is refused."""

from __future__ import annotations

import itertools
import logging
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastplug.data import pack
from fastplug.data.binning import best_fit_decreasing
from fastplug.errors import DataError, OptionError


def contents(rows: list[dict[str, list[int]]]) -> list[list[int]]:
    """The documents of packed rows, sorted."""
    found = []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            found.append(list(row["input_ids"][start : start + length]))
            start += length
        assert start == len(row["input_ids"])
    return sorted(found)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60))
def test_every_item_lies_in_one_bin_and_none_overflows(sizes: list[int]) -> None:
    bins = best_fit_decreasing(sizes, 30)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in chosen) <= 30 for chosen in bins)
    # No item of one bin would have fit into an earlier one as it was: of any two bins the contents exceed one bin.
    filled = [sum(sizes[i] for i in chosen) for chosen in bins]
    assert all(a + b > 30 for a, b in itertools.combinations(filled, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_it_is_best_fit_decreasing(sizes: list[int]) -> None:
    """Against the definition, written down directly: the fullest bin with room, over falling sizes."""
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [left for left in room if left >= size]
        if fitting:
            room[room.index(min(fitting))] -= size
        else:
            room.append(20 - size)
    mine = [20 - sum(sizes[i] for i in chosen) for chosen in best_fit_decreasing(sizes, 20)]
    assert sorted(mine) == sorted(room)


def test_it_is_fast_enough_for_large_datasets() -> None:
    sizes = random.Random(0).choices(range(1, 2048), k=100_000)
    start = time.perf_counter()
    bins = best_fit_decreasing(sizes, 2048)
    assert time.perf_counter() - start < 10  # 0.2 s alone on a core; a quadratic search takes minutes
    assert sum(sizes) / (2048 * len(bins)) > 0.99


def test_rows_hold_whole_documents_whose_positions_start_again() -> None:
    documents = [[5] * 6, [7] * 3, [8] * 4, [9]]
    rows = pack(documents, 8)
    assert contents(rows) == sorted(documents)
    assert len(rows) == 2
    for row in rows:
        assert len({len(row[name]) for name in ("input_ids", "labels", "position_ids")}) == 1
        assert row["position_ids"] == [i for length in row["seq_lengths"] for i in range(length)]
        for position, token, label in zip(row["position_ids"], row["input_ids"], row["labels"]):
            assert label == (-100 if position == 0 else token)


def test_the_same_arguments_give_the_same_rows() -> None:
    lengths = random.Random(1).choices(range(1, 40), k=300)
    documents = [[i % 50] * length for i, length in enumerate(lengths)]
    assert pack(documents, 64) == pack(documents, 64)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_labels_and_loss_masks_are_carried_along(as_tensors: bool) -> None:
    documents: list[dict[str, Any]] = [
        {"input_ids": [1, 2, 3, 4], "labels": [1, -100, 3, 4]},
        {"input_ids": [11, 12, 13], "completion_mask": [0, 0, 1]},
        {"input_ids": [21, 22], "loss_mask": [True, True], "assistant_masks": [0, 1]},
        {"input_ids": [31, 32, 0, 0], "attention_mask": [1, 1, 0, 0]},
    ]
    if as_tensors:
        documents = [{name: torch.tensor(values) for name, values in row.items()} for row in documents]
    (row,) = pack(documents, 16)
    learnt = {tuple(row["input_ids"][i - p : i + 1]): row["labels"][i] for i, p in enumerate(row["position_ids"])}
    assert {prefix: label for prefix, label in learnt.items() if label != -100} == {
        (1, 2, 3): 3,
        (1, 2, 3, 4): 4,
        (11, 12, 13): 13,
        (21, 22): 22,
        (31, 32): 32,
    }


def test_documents_longer_than_a_row() -> None:
    documents = [list(range(1, 12)), [20, 21]]
    with pytest.raises(DataError, match=r"document 0 has 11 tokens, more than max_length=4.*overflow='split'"):
        pack(documents, 4)
    cut = pack(documents, 4, overflow="split")
    assert contents(cut) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11], [20, 21]]
    assert all(row["labels"][i] == -100 for row in cut for i, p in enumerate(row["position_ids"]) if p == 0)
    assert contents(pack(documents, 4, overflow="truncate")) == [[1, 2, 3, 4], [20, 21]]
    assert contents(pack(documents, 11)) == sorted(documents)  # just fits


def test_documents_without_tokens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastplug"):
        assert contents(pack([[1, 2], [], [3]], 4)) == [[1, 2], [3]]
    assert "left out 1 of 3 documents" in caplog.text
    with pytest.raises(DataError, match="document 1 has no tokens; empty='drop'"):
        pack([[1, 2], [], [3]], 4, empty="error")
    for nothing in ([], [[], []], [{"input_ids": [0], "attention_mask": [0]}]):
        with pytest.raises(DataError, match="nothing to pack"):
            pack(nothing, 4)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["some text"], "input_ids of document 0 must be a list of integers, not str"),
        ([["some", "text"]], "must hold integers, not str; tokenize text first"),
        ([{"text": "some"}], r"document 0 has no input_ids \(it has text\)"),
        ([[1], {"input_ids": [1, 2], "labels": [1]}], "document 1 has 2 input_ids but 1 labels"),
        ([{"input_ids": [1, 2], "completion_mask": [1]}], "2 input_ids but 1 completion_mask"),
        ("text", "must be a sequence of token lists"),
        ({"input_ids": [[1]]}, "must be a sequence of token lists"),
        (3, "must be a sequence of token lists"),
    ],
)
def test_what_is_no_document_is_named(documents: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(documents, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overflow": "drop"}, "overflow cannot be 'drop'; one of 'error', 'split', 'truncate'"),
        ({"empty": "keep"}, "empty cannot be 'keep'"),
        ({"max_length": 0}, "max_length must be a positive whole number, not 0"),
        ({"max_length": 2.5}, "max_length must be a positive whole number"),
        ({"group_size": -1}, "group_size must be a positive whole number"),
    ],
)
def test_impossible_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pack([[1]], **{"max_length": 4, **changes})


def test_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    lengths = random.Random(2).choices(range(0, 30), k=80)
    rows = [
        {"input_ids": [i % 50] * length, "completion_mask": [j % 2 for j in range(length)], "text": "..."}
        for i, length in enumerate(lengths)
    ]
    packed = pack(datasets.Dataset.from_list(rows), 32)
    assert packed.column_names == ["input_ids", "labels", "position_ids", "seq_lengths"]
    assert packed[:] == {name: [row[name] for row in pack(rows, 32)] for name in packed.column_names}
    in_groups = pack(datasets.Dataset.from_list(rows), 32, group_size=10)
    assert contents(list(in_groups)) == contents(list(packed))
    assert len(in_groups) >= len(packed)
    streamed = pack(datasets.Dataset.from_list(rows).to_iterable_dataset(), 32, group_size=10)
    assert [row["input_ids"] for row in streamed] == in_groups["input_ids"][:]
    with pytest.raises(DataError, match="document 3 has 30 tokens"):
        pack(
            datasets.Dataset.from_list([*rows[:3], {**rows[0], "input_ids": [1] * 30, "completion_mask": [1] * 30}]), 29
        )
    with pytest.raises(DataError, match=r"no column input_ids \(it has text\)"):
        pack(datasets.Dataset.from_dict({"text": ["a"]}), 8)
    with pytest.raises(DataError, match="dictionary of datasets; pack one of them: train"):
        pack(datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), 8)


def test_groups_bound_what_is_packed_together(caplog: pytest.LogCaptureFixture) -> None:
    documents = [[i] * (1 + i % 7) for i in range(50)]
    with caplog.at_level(logging.INFO, "fastplug"):
        rows = pack(iter(documents), 8, group_size=5)
    assert contents(rows) == sorted(documents)
    assert f"50 documents of {sum(map(len, documents))} tokens in {len(rows)} rows of 8" in caplog.text
