from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import peft

from fastplug.exporters import ExportError
from fastplug.exporters.folder import verify_manifest
from fastplug.exporters.lora import lora
from tests.exporters.models import adapted, llama, logits, quantized, read, train

ADDED = {"fastplug.json", "SHA256SUMS"}


def fresh(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return llama(dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    ],
    ids=["all-linear", "dora", "embeddings", "tokens"],
)
@pytest.mark.parametrize("name", ["default", "mine"])
def test_same_tensors_as_peft_and_loads(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    model = adapted(fresh(), name, **options)
    exact = logits(model)
    result = lora(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    theirs = tmp_path / "theirs" / ("" if name == "default" else name)
    assert set(result.files) - ADDED - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}
    ours, expected = read(tmp_path / "ours"), read(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "ours", theirs)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or None  # old PEFT writes ""
    assert configs[0] == configs[1]
    assert verify_manifest(tmp_path / "ours") == ()
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours").eval()), exact)
    assert not model.peft_config[name].inference_mode


def test_several_adapters_and_a_chosen_one(tmp_path: Path) -> None:
    model = adapted(llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    train(model)
    lora(model, tmp_path / "other", adapter="other")
    assert all(min(tensor.shape) == 2 for tensor in read(tmp_path / "other").values())
    config = json.loads((tmp_path / "other/adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    lora(model, tmp_path / "both", adapter=["default", "other"])
    assert (tmp_path / "both/default/adapter_model.safetensors").is_file()
    assert (tmp_path / "both/other/adapter_model.safetensors").is_file()


def test_adapters_of_transformers_itself(tmp_path: Path) -> None:
    model = fresh(torch.float32)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    train(model)
    exact = logits(model.eval())
    lora(model, tmp_path / "out")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh(torch.float32), tmp_path / "out").eval()), exact)


def test_4bit_base_is_not_repacked(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base"))
    logits(model)
    states = {
        name: (p.data_ptr(), vars(p.quant_state).copy())
        for name, p in model.named_parameters()
        if hasattr(p, "quant_state")
    }
    assert states
    lora(model, tmp_path / "out")
    for name, parameter in model.named_parameters():
        if name in states:
            assert parameter.data_ptr() == states[name][0]
            assert vars(parameter.quant_state).keys() == states[name][1].keys()
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has no adapter to write"):
        lora(llama(), tmp_path / "out")
    model = adapted(llama())
    lora(model, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        lora(model, tmp_path / "out")
    assert lora(model, tmp_path / "out", overwrite=True).bytes
