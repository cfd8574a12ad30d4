"""LightningModules and Trainers on a tiny model, made the same way with and without fastplug."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests import models

NAMES = [name for name in ("lightning.pytorch", "pytorch_lightning") if importlib.util.find_spec(name.split(".")[0])]
if not NAMES:
    pytest.skip("neither lightning nor pytorch_lightning is installed", allow_module_level=True)
pytest.importorskip("peft")
pl: Any = importlib.import_module(NAMES[0])
io: Any = importlib.import_module(f"{NAMES[0]}.plugins.io")
Batch = dict[str, torch.Tensor]


def batches(count: int = 6) -> list[Batch]:
    return [models.padded("right", rows=3, length=12, seed=10 + i) for i in range(count)]


def loader(count: int = 6) -> Any:
    return DataLoader(batches(count), batch_size=None)  # type: ignore[arg-type]


class Hooks:
    """Fine-tunes one causal LM; keeps the loss of every step and of every validation."""

    late = False
    rate = 3e-3

    def __init__(self, make: Any = None) -> None:
        super().__init__()
        self.make = make or (lambda: models.lora(models.plain()))
        self.losses: list[float] = []
        self.validations: list[float] = []
        self.llm: Any = None
        if not self.late:
            self.llm = self.make()

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        loss = self.llm(**batch).loss
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=False)  # type: ignore[attr-defined]
        return loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Batch, index: int) -> None:
        loss = self.llm(**batch).loss
        self.validations.append(loss.item())
        self.log("val_loss", loss, batch_size=3)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate)  # type: ignore[attr-defined]
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


class Module(Hooks, pl.LightningModule):
    pass


class Late(Module):
    """Builds its model in configure_model, as large models want it."""

    late = True

    def configure_model(self) -> None:
        if self.llm is None:
            self.llm = self.make()


def trainer(folder: Path, *plugins: Any, package: Any = pl, **changes: Any) -> Any:
    values: dict[str, Any] = dict(
        max_epochs=1, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=str(folder), log_every_n_steps=1, logger=False,
        num_sanity_val_steps=0, plugins=list(plugins) or None,
    )  # fmt: skip
    return package.Trainer(**{**values, **changes})


def fit(module: Any, folder: Path, *plugins: Any, validate: bool = False, **changes: Any) -> Any:
    """Train ``module`` and give its Trainer; ``ckpt_path`` and ``count`` (of batches) are for fit."""
    path, count = changes.pop("ckpt_path", None), changes.pop("count", 6)
    torch.manual_seed(0)
    made = trainer(folder, *plugins, **changes)
    made.fit(module, loader(count), loader(2) if validate else None, ckpt_path=path)
    return made
