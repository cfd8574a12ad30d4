"""The same tiny run gives the same losses in plain PyTorch, the HF Trainer and Lightning, patched or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import fastplug
from tests import models

pytest.importorskip("transformers")
pytest.importorskip("peft")
from tests.hf import tiny

STEPS, BATCH, RATE = 5, 4, 3e-3
KINDS = {
    "full": lambda: models.plain("llama"),
    "lora": lambda: models.lora(models.plain("qwen3")),
    "qlora": lambda: models.qlora("llama"),
}


def rows() -> list[dict[str, torch.Tensor]]:
    return tiny.rows(STEPS * BATCH)


def loop(make: Any, fused: bool, folder: Path) -> list[float]:
    """Five lines of PyTorch."""
    model = make()
    applied = fastplug.apply(model) if fused else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = []
    for batch in DataLoader(rows(), batch_size=BATCH):  # type: ignore[arg-type]
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if applied is not None:
        tiny.assert_fused(applied.model)
    return losses


def trainer(make: Any, fused: bool, folder: Path) -> list[float]:
    from fastplug_hf import FastPlugCallback

    made = tiny.trainer(
        make(), folder, *([FastPlugCallback()] if fused else []), data=rows(), max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch", train_sampling_strategy="sequential",
    )  # fmt: skip
    made.train()
    if fused:
        tiny.assert_fused(made.model)
    return tiny.losses(made)


def lightning(make: Any, fused: bool, folder: Path) -> list[float]:
    pl = pytest.importorskip("lightning.pytorch")
    from fastplug_lightning import FastPlug

    losses: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    module = Module()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, plugins=[FastPlug()] if fused else None,
    ).fit(module, DataLoader(rows(), batch_size=BATCH))  # type: ignore[arg-type]  # fmt: skip
    if fused:
        tiny.assert_fused(module)
    return losses


@pytest.fixture(scope="module", params=KINDS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float]]:
    """How to make the model, and the losses of an unpatched one in plain PyTorch."""
    if request.param == "qlora":
        pytest.importorskip("bitsandbytes")
    make = KINDS[request.param]
    losses = loop(make, False, tmp_path_factory.mktemp("reference"))
    assert len(set(losses)) == STEPS
    return make, losses


@pytest.mark.parametrize("fused", [False, True], ids=["as it is", "patched"])
@pytest.mark.parametrize("host", [loop, trainer, lightning])
def test_hosts_agree(host: Any, fused: bool, reference: tuple[Any, list[float]], tmp_path: Path) -> None:
    make, losses = reference
    assert host(make, fused, tmp_path) == pytest.approx(losses, rel=1e-5)
