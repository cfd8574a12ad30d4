from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import transformers

import fastplug
from fastplug.exporters import ExportError
from fastplug.exporters.folder import verify_manifest
from tests.exporters.models import DTYPE, adapted, llama, read

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
LINEARS = 2 * 7


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return adapted(llama(tied=True, **SHAPE))


@pytest.fixture(scope="module")
def merged(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "fp32"
    fastplug.export(model, out, "merged_32bit", verify=False)
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_is_what_transformers_saves(model: Any, merged: Path, tmp_path: Path, bits: int) -> None:
    result = fastplug.export(model, tmp_path / "ours", f"merged_{bits}bit", max_shard_size="60KB")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if bits == 4 else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        merged,
        quantization_config=transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options),
        **{DTYPE: torch.bfloat16},
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        if "quant_state" in name:
            states = [json.loads(bytes(part.tolist())) for part in (tensor, expected[name])]
            assert states[0].pop("nested_offset") == pytest.approx(states[1].pop("nested_offset"), abs=1e-4)
            states[1]["dtype"] = states[0]["dtype"]
            assert states[0] == states[1]
        elif name.endswith(".absmax"):
            assert (tensor.int() - expected[name].int()).abs().float().mean() < 1
        elif tensor.dtype in (torch.uint8, torch.int8) and tensor.numel() > 1:  # theirs quantized from bf16, ours not
            assert (tensor == expected[name]).float().mean() > 0.9
        else:
            torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=2**-7, atol=1e-3)
    assert config_of(tmp_path / "ours")["llm_int8_skip_modules"] == ["lm_head"]
    assert result.proof is not None
    assert 0 < result.proof.kl < 2e-3
    assert verify_manifest(tmp_path / "ours") == ()
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", ["fp8", "int8", "w4a16"])
def test_compressed_tensors(model: Any, merged: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    result = fastplug.export(model, tmp_path / "out", name, max_shard_size="60KB")
    found, exact = read(tmp_path / "out"), read(merged)
    config = config_of(tmp_path / "out")
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    quantized = [key for key in exact if f"{key.removesuffix('weight')}weight_scale" in found]
    assert len(quantized) == LINEARS
    for key in quantized:
        prefix, weight = key.removesuffix("weight"), exact[key]
        scale = found[prefix + "weight_scale"]
        if name == "w4a16":
            packed = found[prefix + "weight_packed"]
            assert found[prefix + "weight_shape"].tolist() == list(weight.shape)
            assert scale.shape == (weight.shape[0], weight.shape[1] // 128)
            codes = torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1) - 8
            values = codes.float().unflatten(1, (-1, 128)) * scale.float()[..., None]
            assert (values.flatten(1) - weight).abs().max() <= scale.float().max() * 0.51 + 2**-8 * weight.abs().max()
        else:
            assert found[key].dtype == (torch.float8_e4m3fn if name == "fp8" else torch.int8)
            assert scale.shape == (weight.shape[0], 1)
            error = (found[key].float() * scale.float() - weight).abs()
            step = scale.float() * 0.51 if name == "int8" else weight.abs() * 2**-4 + scale.float() * 2**-9
            assert bool((error <= step + 2**-8 * weight.abs()).all())
    for key in exact.keys() - set(quantized):
        assert torch.equal(found[key], exact[key].bfloat16())
    assert result.proof is not None
    assert 0 < result.proof.kl < 2e-3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # the config says it all
    assert type(loaded).__name__ == "LlamaForCausalLM"


def test_layers_that_do_not_fit_stay_plain(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = adapted(llama(hidden_size=64, intermediate_size=80))
    result = fastplug.export(model, tmp_path / "out", "w4a16")
    assert any("2 linear layers stay in bfloat16: their width is no multiple of 64" in note for note in result.notes)
    assert "model.layers.1.mlp.down_proj" in config_of(tmp_path / "out")["ignore"]
    assert "model.layers.0.mlp.down_proj.weight" in read(tmp_path / "out")
    with pytest.raises(ExportError, match="no linear layer has a width that w4a16 can store"):
        fastplug.export(llama(hidden_size=24, intermediate_size=40, head_dim=6), tmp_path / "none", "w4a16")
    assert not (tmp_path / "none").exists()


def test_experts_stay_plain(tmp_path: Path) -> None:
    model = adapted(llama(kind="qwen3_moe"), target_modules=["q_proj"])
    fastplug.export(model, tmp_path / "out", "merged_4bit")
    found = read(tmp_path / "out")
    assert found["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.bfloat16
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
