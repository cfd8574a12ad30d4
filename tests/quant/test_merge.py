"""Merges onto bases of every format: the decoded weight plus the adapter, in fp32, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("safetensors")

import fastplug
from fastplug.errors import ModelError
from tests.exporters.models import adapted, llama, read
from tests.quant.cases import CASES, linear, quantized

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
FORMATS = {
    "bitsandbytes int8", "fp8 small blocks", "fp8 rows, compressed", "compressed fp8 blocks", "compressed w8a8",
    "gptq, act-order", "awq", "hqq", "torchao int8", "torchao float8",
}  # fmt: skip
NAME = "model.layers.1.mlp.down_proj"


def model_over(case: str) -> tuple[Any, Any]:
    """A LoRA model with one quantized layer, and that layer."""
    model = llama(**SHAPE)
    module = linear((64, 128), bias=False)
    layer = quantized(CASES[case], module)
    model.set_submodule(NAME, layer)
    return adapted(model, target_modules=["q_proj", "down_proj"]), layer


@pytest.mark.parametrize("case", sorted(FORMATS))
def test_merged_is_the_formula(case: str, tmp_path: Path) -> None:
    model, layer = model_over(case)
    result = fastplug.export(model, tmp_path / "out", "merged_32bit")
    found = read(tmp_path / "out")
    inner = model.base_model.model if hasattr(model, "base_model") else model
    lora = inner.get_submodule(NAME)
    down, up = lora.lora_A["default"].weight.float(), lora.lora_B["default"].weight.float()
    expected = CASES[case].truth(layer).float() + up @ down * lora.scaling["default"]
    torch.testing.assert_close(found[f"{NAME}.weight"], expected, rtol=1e-6, atol=1e-7)
    assert [key for key in found if key.startswith(NAME)] == [f"{NAME}.weight"]
    assert found[f"{NAME}.weight"].dtype == torch.float32
    assert result.proof is not None
    assert result.proof.kl < 1e-3
    assert lora.base_layer is layer
    assert "forward" not in layer.__dict__ or case.startswith("compressed")


def test_16_bits_round_once(tmp_path: Path) -> None:
    model, layer = model_over("gptq, act-order")
    fastplug.export(model, tmp_path / "out", "merged_16bit", dtype="bfloat16", verify=False)
    lora = model.base_model.model.get_submodule(NAME)
    delta = lora.lora_B["default"].weight.float() @ lora.lora_A["default"].weight.float() * lora.scaling["default"]
    expected = (CASES["gptq, act-order"].truth(layer).float() + delta).bfloat16()
    assert torch.equal(read(tmp_path / "out")[f"{NAME}.weight"], expected)


def test_a_bias_comes_along(tmp_path: Path) -> None:
    model = llama(mlp_bias=True, **SHAPE)
    layer = quantized(CASES["awq"], linear((64, 128), bias=True))
    model.set_submodule(NAME, layer)
    fastplug.export(adapted(model, target_modules=["q_proj"]), tmp_path / "out", "merged_32bit", verify=False)
    found = read(tmp_path / "out")
    assert torch.equal(found[f"{NAME}.bias"], layer.bias)
    assert torch.equal(found[f"{NAME}.weight"], CASES["awq"].truth(layer).float())


def test_a_damaged_layer_is_named(tmp_path: Path) -> None:
    model, layer = model_over("gptq, act-order")
    layer.scales = layer.scales[:2]
    with pytest.raises(ModelError, match=r"down_proj\S* is damaged: zero points of shape"):
        fastplug.export(model, tmp_path / "out", "merged_32bit")
    assert not (tmp_path / "out").exists()
