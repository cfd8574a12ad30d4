"""What is not exported: an adapter on a base that it was not made for, and damaged quantized weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastplug
from fastplug.errors import ModelError
from fastplug.exporters.api import ExportError
from fastplug.exporters.models import load
from tests import models
from tests.exporters.models import adapted, llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, an adapter of it, and another base of the same shapes."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    llama().save_pretrained(tmp_path / "other")
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")
    return tmp_path


def named(folder: Path, name: str) -> None:
    file = folder / "adapter/adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": name}), encoding="utf-8")


def test_another_base_of_the_same_shapes_is_told_apart(folder):
    with pytest.raises(ExportError, match=r"was trained on .*base, and .*other is another model: .* differs"):
        fastplug.export(folder / "other", folder / "out", adapter=folder / "adapter")
    assert not (folder / "out").exists()


def test_the_base_under_another_name_or_in_another_dtype_is_the_base(folder):
    shutil.copytree(folder / "base", folder / "moved")
    load(folder / "moved", folder / "adapter")
    transformers.AutoModelForCausalLM.from_pretrained(folder / "base").bfloat16().save_pretrained(folder / "half")
    load(folder / "half", folder / "adapter")


@pytest.mark.parametrize("name", ["", "somebody/a-model-that-is-not-here"])
def test_nothing_is_said_where_the_named_base_is_not_to_be_found(folder, name):
    named(folder, name)
    load(folder / "other", folder / "adapter")


def test_a_damaged_weight_of_a_live_model_is_not_exported(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = models.qlora()
    layer = next(module for module in model.modules() if type(module).__name__ == "Linear4bit")
    state = layer.weight.quant_state
    inner = state.state2 if state.nested else state
    inner.absmax[0] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        fastplug.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
