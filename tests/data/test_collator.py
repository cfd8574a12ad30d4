"""``PaddingFreeCollator``: what a batch holds, from every kind of row, and what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from fastplug.data import PaddingFreeCollator, pack
from fastplug.errors import DataError, OptionError
from tests.data.texts import documents, looks_for_documents, padded

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}, {"input_ids": [4]}, {"input_ids": [5, 6]}]


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_a_batch() -> None:
    batch = PaddingFreeCollator()(ROWS)
    assert plain(batch) == {
        "input_ids": [[1, 2, 3, 4, 5, 6]],
        "labels": [[-100, -100, 3, -100, -100, 6]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "use_cache": False,
        "cu_seq_lens_q": [0, 3, 4, 6],
        "cu_seq_lens_k": [0, 3, 4, 6],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert plain(PaddingFreeCollator(cu_seqlens=False)(ROWS)) == {
        name: plain(batch)[name] for name in ("input_ids", "labels", "position_ids", "use_cache")
    }


@looks_for_documents
def test_it_is_what_transformers_and_trl_make() -> None:
    transformers = pytest.importorskip("transformers")
    ours = plain(PaddingFreeCollator()(documents()))
    collators = [transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)]
    trl = pytest.importorskip("trl")
    version = tuple(map(int, trl.__version__.split(".")[:2]))
    if version >= (1, 16):
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collators.append(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    for collator in collators:
        theirs = plain(collator(documents()))
        for name in ours.keys() - {"use_cache"}:
            assert ours[name] == theirs[name], (type(collator).__name__, name)


@pytest.mark.parametrize("column", ["seq_lengths", "position_ids"])
def test_packed_rows_are_taken_apart(column: str) -> None:
    rows = pack(documents(), 32)
    other = {"seq_lengths": "position_ids", "position_ids": "seq_lengths"}[column]
    stripped = [{name: values for name, values in row.items() if name != other} for row in rows]
    batch = plain(PaddingFreeCollator()(stripped))
    assert batch["input_ids"] == [[token for row in rows for token in row["input_ids"]]]
    assert batch["labels"] == [[label for row in rows for label in row["labels"]]]
    assert batch["position_ids"] == [[position for row in rows for position in row["position_ids"]]]
    lengths = [length for row in rows for length in row["seq_lengths"]]
    assert [b - a for a, b in zip(batch["cu_seq_lens_q"], batch["cu_seq_lens_q"][1:])] == lengths


def test_rows_of_tensors_and_bare_tokens() -> None:
    tensors = [{name: torch.tensor(values) for name, values in row.items()} for row in ROWS]
    assert plain(PaddingFreeCollator()(tensors)) == plain(PaddingFreeCollator()(ROWS))
    bare = PaddingFreeCollator()([torch.tensor([1, 2]), [3]])
    assert plain(bare)["labels"] == [[-100, 2, -100]]


def test_another_collators_padding_is_left_out() -> None:
    made: list[Any] = []

    def collator(features: Any) -> dict[str, Any]:
        made.append(features)
        return {**padded(features), "idle": None, "number": 3}

    assert plain(PaddingFreeCollator(collator)(documents())) == plain(PaddingFreeCollator()(documents()))
    assert made == [documents()]
    right = padded(documents())
    missing = (right["attention_mask"] == 0).sum(1).tolist()
    left = {
        name: torch.stack([row.roll(count) for row, count in zip(values, missing)]) for name, values in right.items()
    }
    assert plain(PaddingFreeCollator(lambda _: left)([])) == plain(PaddingFreeCollator()(documents()))


def test_filling_up_to_a_multiple() -> None:
    batch = PaddingFreeCollator(pad_to_multiple_of=8, pad_token_id=9)(ROWS)
    assert plain(batch)["input_ids"] == [[1, 2, 3, 4, 5, 6, 9, 9]]
    assert plain(batch)["labels"] == [[-100, -100, 3, -100, -100, 6, -100, -100]]
    assert plain(batch)["position_ids"] == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert plain(batch)["cu_seq_lens_q"] == [0, 3, 4, 6, 8]
    assert PaddingFreeCollator(pad_to_multiple_of=6)(ROWS)["input_ids"].shape == (1, 6)


def test_empty_rows_are_left_out() -> None:
    rows = [{"input_ids": []}, *ROWS, {"input_ids": [7], "attention_mask": [0]}]
    assert plain(PaddingFreeCollator()(rows)) == plain(PaddingFreeCollator()(ROWS))
    with pytest.raises(DataError, match="a batch without a single token"):
        PaddingFreeCollator()([{"input_ids": []}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "row 0 of the batch has no input_ids"),
        ([ROWS[0], {"input_ids": "words"}], "input_ids of row 1 of the batch must be a list of integers, not str"),
        ([{"input_ids": [1, 2, 3], "seq_lengths": [1, 1]}], "has 3 input_ids, but its seq_lengths add up to 2"),
        ([{"input_ids": [1.5]}], "must hold integers, not float"),
    ],
)
def test_what_is_no_row_is_named(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PaddingFreeCollator()(rows)


def test_impossible_arguments() -> None:
    with pytest.raises(OptionError, match="collator must be callable, not str"):
        PaddingFreeCollator("pad")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="pad_to_multiple_of must be a positive whole number, not 0"):
        PaddingFreeCollator(pad_to_multiple_of=0)
    with pytest.raises(DataError, match=r"the collator's batch has no input_ids \(it has ids\)"):
        PaddingFreeCollator(lambda _: {"ids": []})([])


def test_workers_of_a_loader_can_take_it_along() -> None:
    copied = pickle.loads(pickle.dumps(PaddingFreeCollator(pad_to_multiple_of=4)))
    assert plain(copied(ROWS)) == plain(PaddingFreeCollator(pad_to_multiple_of=4)(ROWS))
    loader = torch.utils.data.DataLoader(documents(), batch_size=4, collate_fn=copied, num_workers=1)  # type: ignore[arg-type]
    assert [batch["input_ids"].shape[0] for batch in loader] == [1, 1]
