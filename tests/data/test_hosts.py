"""Packed and padding-free batches in the hosts: the losses of the padded run, and no quadratic mask on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastplug
from fastplug.data import PaddingFreeCollator, pack
from fastplug.ops.document_attention import DocumentMask, Documents
from tests import models
from tests.data.texts import documents, looks_for_documents, padded

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fastplug_hf import FastPlugCallback
from tests.hf import tiny

LENGTHS = tuple(5 + 7 * i % 23 for i in range(16))


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many lazy masks were handed to backbones, and how many masks with numbers were made."""
    counted = {"lazy": 0, "made": 0}
    new, made = DocumentMask.__new__, Documents.mask

    def counting_new(cls: Any, *args: Any) -> Any:
        counted["lazy"] += 1
        return new(cls, *args)

    def counting_mask(self: Documents, window: int | None = None) -> torch.Tensor:
        counted["made"] += 1
        return made(self, window)

    monkeypatch.setattr(DocumentMask, "__new__", staticmethod(counting_new))
    monkeypatch.setattr(Documents, "mask", counting_mask)
    return counted


def rows() -> list[dict[str, list[int]]]:
    """Their first labels are none anywhere, so that every version of transformers counts the same labels."""
    made = documents(LENGTHS)
    return [{**row, "labels": [-100, *row["labels"][1:]]} for row in made]


def hf(folder: Path, collator: Any, *callbacks: Any, data: Any = None, **changes: Any) -> Any:
    from transformers import Trainer

    data = rows() if data is None else data
    trainer = Trainer(
        model=models.lora(models.plain()),
        args=tiny.arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=collator,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_hf_trainer(changes: dict[str, Any], tmp_path: Path, lazy: dict[str, int]) -> None:
    plain = hf(tmp_path / "a", padded, **changes)
    fused = hf(tmp_path / "b", PaddingFreeCollator(), FastPlugCallback(), **changes)
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=2e-5)
    assert tiny.losses(fused, "eval_loss") == pytest.approx(tiny.losses(plain, "eval_loss"), rel=2e-5)
    theirs = dict(plain.model.named_parameters())
    for name, parameter in fused.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-5)
    assert not fastplug.report(fused.model).fallbacks
    assert lazy["lazy"] > 0
    assert "eval_steps" in changes or lazy["made"] == 0  # few tokens without gradients run as they are


@looks_for_documents
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hf_trainer_over_packed_rows(checkpointing: bool, tmp_path: Path, lazy: dict[str, int]) -> None:
    """As a dataset, from which the Trainer takes the columns that the model does not know."""
    datasets = pytest.importorskip("datasets")
    packed = pack(datasets.Dataset.from_list(rows()), 48)
    changes = {"per_device_train_batch_size": 2, "gradient_checkpointing": checkpointing}
    as_list = [{name: row[name] for name in row if name != "seq_lengths"} for row in packed]
    plain = hf(tmp_path / "a", PaddingFreeCollator(cu_seqlens=False), data=as_list, **changes)
    assert lazy == {"lazy": 0, "made": 0}
    fused = hf(tmp_path / "b", PaddingFreeCollator(), FastPlugCallback(), data=packed, **changes)
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=2e-5)
    assert lazy == {"lazy": 3, "made": 0}
    tiny.assert_fused(fused.model)


def sft(folder: Path, *callbacks: Any, **changes: Any) -> Any:
    trl = pytest.importorskip("trl")
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU, TRL launches kernels of its own on a CPU model's tensors")
    from tests.hf.test_trl import COMMON, texts

    config = trl.SFTConfig(output_dir=str(folder), **{**COMMON, **changes})
    trainer = trl.SFTTrainer(
        model=models.lora(models.plain()),
        args=config,
        train_dataset=texts(),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@looks_for_documents
def test_trl_padding_free_is_the_padded_run(tmp_path: Path, lazy: dict[str, int]) -> None:
    plain = sft(tmp_path / "a")
    fused = sft(tmp_path / "b", FastPlugCallback(), padding_free=True, max_length=None)
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=2e-5)
    assert not fastplug.report(fused.model).fallbacks
    assert lazy == {"lazy": 3, "made": 0}


@looks_for_documents
def test_trl_packs_and_fastplug_keeps_its_documents_apart(tmp_path: Path, lazy: dict[str, int]) -> None:
    changes: dict[str, Any] = {"packing": True, "max_length": 24}
    plain = sft(tmp_path / "a", **changes)
    assert lazy == {"lazy": 0, "made": 0}
    fused = sft(tmp_path / "b", FastPlugCallback(), **changes)
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=2e-5)
    assert not fastplug.report(fused.model).fallbacks
    assert lazy == {"lazy": 3, "made": 0}


@looks_for_documents
def test_trl_takes_rows_that_fastplug_packed(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.hf.test_trl import COMMON

    packed = pack(datasets.Dataset.from_list(rows()), 48).select_columns(["input_ids", "labels", "seq_lengths"])
    config = trl.SFTConfig(output_dir=str(tmp_path), **{**COMMON, "padding_free": True, "max_length": None})
    trainer = trl.SFTTrainer(
        model=models.lora(models.plain()), args=config, train_dataset=packed, processing_class=tiny.tokenizer()
    )
    (batch, *_) = list(trainer.get_train_dataloader())
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
    assert int((batch["position_ids"] == 0).sum()) > len(batch["input_ids"]) * 4  # more documents than rows


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lightning(checkpointing: bool, tmp_path: Path, lazy: dict[str, int]) -> None:
    from fastplug_lightning import FastPlug
    from tests.lightning.setups import Module, trainer

    def fit(collator: Any, *plugins: Any) -> Any:
        torch.manual_seed(0)
        module = Module()
        if checkpointing:
            module.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            module.llm.enable_input_require_grads()
        loader = torch.utils.data.DataLoader(rows(), batch_size=4, collate_fn=collator)  # type: ignore[arg-type]
        trainer(tmp_path, *plugins).fit(module, loader)
        return module

    plain, fused = fit(padded), fit(PaddingFreeCollator(), FastPlug())
    assert len(fused.losses) == 4
    assert fused.losses == pytest.approx(plain.losses, rel=2e-5)
    tiny.assert_fused(fused)
    assert lazy == {"lazy": 4, "made": 0}


@looks_for_documents
def test_without_fastplug_the_collator_is_right_too(tmp_path: Path) -> None:
    """The batch says that there is no cache, so transformers makes its mask of the positions."""
    model, batch = models.lora(models.plain()), PaddingFreeCollator()(rows())
    assert float(model(**batch).loss) == pytest.approx(float(model(**padded(rows())).loss), rel=2e-5)
