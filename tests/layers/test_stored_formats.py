"""Whole folders of quantized weights, loaded into QuantLinear without the library that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastplug
from fastplug.errors import ModelError, OptionError
from fastplug.layers import QuantLinear, dequantize_, load, save
from fastplug.layers.expansion_files import expand_folder
from tests import models
from tests.quant.cases import CASES, COMPRESSED, quantized

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
CONFIGS: dict[str, dict[str, Any]] = {
    "bitsandbytes int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8 small blocks": {"quant_method": "fp8", "weight_block_size": [16, 32]},
    "fp8 rows, fbgemm": {"quant_method": "fbgemm_fp8"},
    "gptq": GPTQ,
    "gptq v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq 3 bits": {**GPTQ, "bits": 3},
    "gptq, act-order": {**GPTQ, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "hqq": {"quant_method": "hqq"},
    "torchao int8": {"quant_method": "torchao"},
}
for _name in ("w8a8", "int4 groups", "int4 zeros", "fp8 rows", "fp8 blocks", "mxfp4", "nvfp4"):
    _weights = {k: v for k, v in COMPRESSED[_name][0].items() if k not in ("scale_dtype", "activations")}
    _weights = {"type": "int", "symmetric": True, **_weights}
    CONFIGS[f"compressed {_name}"] = {
        "quant_method": "compressed-tensors", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _weights}},
    }  # fmt: skip


def write(folder: Path, case: str, **options: Any) -> dict[str, torch.Tensor]:
    """A folder as the library of a case lays it out; returns the weights that it stands for."""
    model, made = models.plain("qwen2", **options), CASES[case]
    truths: dict[str, torch.Tensor] = {}
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    metadata = {"format": "pt"}
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        layer = quantized(made, linear)
        truths[name] = made.truth(layer)
        del tensors[f"{name}.weight"]
        own = {key: value for key, value in layer.state_dict().items() if torch.is_tensor(value)}
        if case.startswith("torchao"):
            support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
            flat, described = support.flatten_tensor_state_dict({f"{name}.weight": layer.weight.data})
            tensors.update(flat)
            metadata.update(described)
            own.pop("weight")
        tensors.update({f"{name}.{key}": value for key, value in own.items()})
    finish(folder, model, tensors, CONFIGS[case], metadata)
    return truths


def finish(folder: Path, model: Any, tensors: dict[str, Any], config: Any, metadata: Any = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata=metadata or {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if config is not None:
        change_config(folder, quantization_config=config)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change(folder: Path, function: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**{key: value.to(model.device) for key, value in models.batch().items()}).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_is_loaded_as_it_is(case: str, tmp_path: Path, device: torch.device) -> None:
    truths = write(tmp_path, case)
    loaded = load(tmp_path, device=device, dtype=torch.float32)
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    assert layers.keys() == truths.keys()
    assert len(layers) == 14
    assert type(loaded.lm_head) is nn.Linear
    assert getattr(loaded.config, "quantization_config", None) is None
    for name, layer in layers.items():
        truth = truths[name].to(device)
        assert torch.equal(layer.dequantize(torch.float32).to(truth.dtype), truth), name
        assert (layer.bias is None) == (not name.endswith(("q_proj", "k_proj", "v_proj")))
    stored = sum(p.numel() * p.element_size() for layer in layers.values() for p in layer.parameters())
    assert stored < 2 * sum(truth.numel() for truth in truths.values())  # less than 16 bits a weight


@pytest.mark.parametrize("case", ["gptq, act-order", "awq", "compressed int4 zeros", "compressed nvfp4", "fp8 blocks"])
def test_training_on_it(case: str, tmp_path: Path, device: torch.device) -> None:
    write(tmp_path, case)
    plain = dequantize_(load(tmp_path, device=device, dtype=torch.float32))
    expected = gradients(models.lora(plain))
    model = models.lora(load(tmp_path, device=device, dtype=torch.float32))
    applied = fastplug.apply(model, strict=True)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    applied.undo()


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_modelopt(tmp_path: Path, place: str) -> None:
    """NVFP4 by its documented layout, described in either of the files that ModelOpt has used."""
    model = models.plain()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    truths = {}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name, linear in model.named_modules():
        if type(linear) is nn.Linear and name != "lm_head":
            N, K = linear.weight.shape
            codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
            scales, outer = (torch.rand(N, K // 16) * 400).to(torch.float8_e4m3fn), torch.rand(()) * 1e-4
            truths[name] = values[codes.int()] * (scales.float() * outer).repeat_interleave(16, 1)
            tensors[f"{name}.weight"] = codes[:, ::2] | codes[:, 1::2] << 4
            tensors |= {f"{name}.weight_scale": scales, f"{name}.weight_scale_2": outer}
            tensors[f"{name}.input_scale"] = torch.ones(())
    config = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    finish(tmp_path, model, tensors, {"quant_method": "modelopt", **config} if place == "config.json" else None)
    if place != "config.json":
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": config})
        (tmp_path / place).write_text(text)
    loaded = load(tmp_path, device="cpu", dtype=torch.float32)
    for name, truth in truths.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), truth), name
    (tmp_path / "hf_quant_config.json").write_text("{")
    if place != "config.json":
        with pytest.raises(ModelError, match="does not say how the folder is quantized"):
            load(tmp_path, device="cpu")


def test_biases_of_zeros_where_the_layers_have_none(tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias."""
    truths = write(tmp_path, "gptq")
    bias = "model.layers.0.mlp.up_proj.bias"
    change(tmp_path, lambda tensors: tensors.update({bias: torch.zeros(128)}))
    assert load(tmp_path, device="cpu").model.layers[0].mlp.up_proj.bias is None
    change(tmp_path, lambda tensors: tensors.update({bias: torch.ones(128)}))
    with pytest.raises(ModelError, match=r"holds a bias .*up_proj\.bias, and by the config the layer has none"):
        load(tmp_path, device="cpu")
    assert "model.layers.0.mlp.up_proj" in truths


def test_shards_and_what_is_no_linear_layer(tmp_path: Path) -> None:
    """Parts of one weight may lie in several files; an embedding cannot be quantized here."""
    truths = write(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = [sorted(tensors)[i::3] for i in range(3)]
    for i, own in enumerate(names):
        save_file({name: tensors[name] for name in own}, tmp_path / f"part{i}.safetensors")
    index = {"weight_map": {name: f"part{i}.safetensors" for i, own in enumerate(names) for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(tmp_path, device="cpu", dtype=torch.float32)
    for name, truth in truths.items():
        assert torch.equal(loaded.get_submodule(name).dequantize().to(truth.dtype), truth)


def test_a_quantized_embedding(tmp_path: Path) -> None:
    write(tmp_path, "fp8 small blocks")

    def encode(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
        tensors["model.embed_tokens.weight_scale_inv"] = torch.ones(len(tensors["model.embed_tokens.weight"]) // 16, 2)

    change(tmp_path, encode)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is stored as fp8 and belongs to a Embedding"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("case", "lost", "message"),
    [
        (
            "fp8 blocks",
            "weight_scale_inv",
            "is torch.float8_e4m3fn, which is a quantized weight, and the files hold no",
        ),
        ("bitsandbytes int8", "SCB", "is torch.int8, which is a quantized weight"),
        ("compressed w8a8", "weight_scale", "is torch.int8, which is a quantized weight"),
        ("gptq", "scales", "q_proj cannot be read as gptq: there is no scales"),
        ("gptq", "qweight", r"not in the files .*q_proj\.weight.*the library that wrote it"),
        ("compressed nvfp4", "weight_packed", "cannot be read as compressed-tensors"),
    ],
)
def test_a_part_that_is_missing(tmp_path: Path, case: str, lost: str, message: str) -> None:
    """Never a weight without its scales."""
    write(tmp_path, case)
    change(tmp_path, lambda tensors: tensors.pop(f"model.layers.1.self_attn.q_proj.{lost}"))
    with pytest.raises(ModelError, match=message):
        load(tmp_path, device="cpu")


def test_what_is_said_of_other_folders(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    with pytest.raises(OptionError, match="quantized weights: skip= can no longer"):
        load(tmp_path, device="cpu", skip=["lm_head"])
    with pytest.raises(ModelError, match="stored as gptq, which bitsandbytes does not have"):
        save(load(tmp_path, device="cpu"), tmp_path / "out")
    with pytest.raises(ModelError, match="cannot be written again beside new blocks"):
        expand_folder(tmp_path, tmp_path / "out", every=1)
    change_config(tmp_path, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ModelError, match="quantized with aqlm cannot be read from files; these can"):
        load(tmp_path, device="cpu")
    change_config(tmp_path, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    with pytest.raises(ModelError, match="cannot be read as awq"):
        load(tmp_path, device="cpu")
    change_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ModelError, match="quantized with fp8, and no tensor of its files is"):
        load(tmp_path, device="cpu")
    config = {**CONFIGS["compressed int4 groups"], "transform_config": {"config_groups": {"R1": {}}}}
    write(tmp_path / "rotated", "compressed int4 groups")
    change_config(tmp_path / "rotated", quantization_config=config)
    with pytest.raises(ModelError, match="transform_config"):
        load(tmp_path / "rotated", device="cpu")
    config = {**CONFIGS["compressed int4 groups"], "format": "marlin-24"}
    change_config(tmp_path / "rotated", quantization_config=config)
    with pytest.raises(ModelError, match="marlin-24"):
        load(tmp_path / "rotated", device="cpu")
