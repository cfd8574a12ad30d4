"""``fastplug convert-adapter``: DoRA to LoRA, and checkpoints of training to PEFT's layout."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from typer.testing import CliRunner

from fastplug.cli import app
from fastplug.errors import ModelError, OptionError
from fastplug.layers import load, quantize_, save
from fastplug.layers.dora_to_lora import dora_to_lora, truncated
from fastplug.layers.sharded_adapter import adapter_tensors, peft_name
from tests import models

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def logits(model):
    with torch.no_grad():
        return model.eval()(models.batch()["input_ids"]).logits


def changed_magnitudes(model):
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    models.plain().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A DoRA model and the folder of its adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    options = {"alpha_pattern": {"q_proj": 7}, "rank_pattern": {"down_proj": 2}, "use_rslora": True}
    model = changed_magnitudes(models.lora(model, use_dora=True, modules_to_save=["lm_head"], **options))
    path = tmp_path_factory.mktemp("dora") / "adapter"
    model.save_pretrained(path)
    return model, path


def relative(value, truth):
    return float((value - truth).norm() / truth.norm())


def test_at_full_rank_nothing_is_lost(base, trained, tmp_path):
    model, adapter = trained
    targets = dora_to_lora(adapter, tmp_path / "out", rank=32, device="cpu")
    assert len(targets) == 14
    wide = [error for error in targets if "k_proj" in error.name or "v_proj" in error.name]  # 32 x 64
    assert all(error.relative < 1e-5 for error in wide)
    assert max(error.relative for error in targets) > 0.01
    again = transformers.AutoModelForCausalLM.from_pretrained(base)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "out")
    config = again.peft_config["default"]
    assert not config.use_dora
    assert config.r == config.lora_alpha == 32
    plain = logits(transformers.AutoModelForCausalLM.from_pretrained(base))
    assert relative(logits(again), logits(model)) < 0.3 * relative(plain, logits(model))


def test_a_higher_rank_loses_less(trained, tmp_path):
    errors = []
    for rank in (2, 8, 24):
        found = dora_to_lora(trained[1], tmp_path / str(rank), rank=rank, device="cpu")
        assert found == sorted(found, key=lambda error: -error.relative)
        errors.append(sum(error.relative for error in found))
        assert all(error.of_weight <= error.relative * 2 for error in found)
    assert errors[0] > errors[1] > errors[2]


def test_the_reported_error_is_the_error(base, trained, tmp_path):
    model, adapter = trained
    found = {e.name: e.relative for e in dora_to_lora(adapter, tmp_path / "out", rank=4, device="cpu")}
    merged = copy.deepcopy(model).merge_and_unload()
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    lora = lora.merge_and_unload()
    name = "model.layers.1.mlp.up_proj"
    weights = [part.get_submodule(name).weight for part in (merged, plain, lora)]
    expected = float((weights[0] - weights[2]).norm() / (weights[0] - weights[1]).norm())
    assert found[name] == pytest.approx(expected, rel=1e-3)
    assert torch.equal(lora.lm_head.weight, merged.lm_head.weight)


def test_a_4_bit_base(tmp_path):
    folder = save(quantize_(models.plain()), tmp_path / "base")
    model = changed_magnitudes(models.lora(load(folder, device="cpu"), use_dora=True))
    model.save_pretrained(tmp_path / "adapter")
    errors = dora_to_lora(tmp_path / "adapter", tmp_path / "out", base=folder, rank=32, device="cpu")
    assert next(error for error in errors if "k_proj" in error.name).relative < 1e-5


def test_the_randomized_decomposition(monkeypatch):
    from fastplug.layers import dora_to_lora as module

    matrix = torch.randn(80, 60) @ torch.diag(0.8 ** torch.arange(60.0))
    exact = truncated(matrix, 8)
    monkeypatch.setattr(module, "EXACT", 10)
    state = torch.get_rng_state()
    fast = truncated(matrix, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(fast[1], exact[1], rtol=1e-4, atol=1e-4)


def test_what_is_no_dora_adapter(base, trained, tmp_path):
    models.lora(models.plain()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ModelError, match="no DoRA adapter"):
        dora_to_lora(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(ModelError, match=r"no readable adapter_config\.json"):
        dora_to_lora(tmp_path, tmp_path / "out")
    models.plain(hidden_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="trained on another base"):
        dora_to_lora(trained[1], tmp_path / "out", base=tmp_path / "other", device="cpu")
    with pytest.raises(OptionError, match="rank 33 is larger than"):
        dora_to_lora(trained[1], tmp_path / "out", rank=33, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "name", "adapter"),
    [
        ("base_model.model.m.q.lora_A.default.weight", "base_model.model.m.q.lora_A.weight", "default"),
        ("model.base_model.model.m.q.lora_B.x.bias", "base_model.model.m.q.lora_B.bias", "x"),
        ("base_model.model.m._fsdp_wrapped_module.q.lora_A.weight", "base_model.model.m.q.lora_A.weight", None),
        ("state_dict.m.q.lora_A.default.weight", "base_model.model.m.q.lora_A.weight", "default"),
        ("base_model.model.q.lora_magnitude_vector.d.weight", "base_model.model.q.lora_magnitude_vector", "d"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight", "default"),
        ("base_model.model.e.lora_embedding_A.default", "base_model.model.e.lora_embedding_A", "default"),
    ],
)  # fmt: skip
def test_names(key, name, adapter):
    assert peft_name(key) == (name, adapter)


def test_names_that_are_no_adapter_s():
    assert peft_name("base_model.model.m.q.base_layer.weight") is None
    assert peft_name("optim.state.base_model.model.m.q.lora_A.default.weight.exp_avg") is None


@pytest.fixture
def lora_model():
    return models.lora(models.plain("qwen2"), lora_bias=True, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2})


def same_adapter(folder, model):
    again = peft.PeftModel.from_pretrained(models.plain("qwen2"), folder)
    ours, theirs = peft.get_peft_model_state_dict(again), peft.get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def write_sharded(model, path, prefix="model."):
    from torch.distributed import checkpoint

    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    state["optim.state.step"] = torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(state, checkpoint_id=path, no_dist=True)


@pytest.mark.parametrize("kind", ["sharded", "nested", "full", "safetensors"])
def test_checkpoints(lora_model, tmp_path, kind):
    source = tmp_path / "checkpoint-7"
    source.mkdir()
    if kind == "sharded":
        write_sharded(lora_model, source)
    elif kind == "nested":
        write_sharded(lora_model, source / "pytorch_model_fsdp_0")
        (source / "optimizer_0").mkdir()
        (source / "optimizer_0" / ".metadata").write_bytes(b"")
    elif kind == "full":
        torch.save(lora_model.state_dict(), source / "pytorch_model_fsdp.bin")
    else:
        from safetensors.torch import save_file

        save_file({k: v.clone() for k, v in lora_model.state_dict().items()}, source / "model.safetensors")
    lora_model.peft_config["default"].save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["convert-adapter", str(source), "--out", str(tmp_path / "out"), "--base", "b"])
    assert result.exit_code == 0, result.output
    assert "rank 4 with alpha 12" in result.output
    same_adapter(tmp_path / "out", lora_model)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "b"


def test_a_config_made_from_the_tensors(tmp_path):
    model = models.lora(models.plain("qwen2"), use_dora=True, rank_pattern={"q_proj": 2})
    torch.save(model.state_dict(), tmp_path / "state.pt")
    arguments = ["convert-adapter", str(tmp_path / "state.pt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert "--alpha" in result.output
    result = CliRunner().invoke(app, [*arguments, "--alpha", "12"])
    assert result.exit_code == 0, result.output
    same_adapter(tmp_path / "out", model)
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert config.use_dora
    assert (config.r, config.lora_alpha) == (4, 12)
    assert set(config.target_modules) == set(models.LINEARS)


def test_several_adapters(tmp_path):
    model = models.lora(models.plain())
    models.add(model, "second", r=3)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with pytest.raises(ModelError, match="holds the adapters default, second"):
        adapter_tensors(tmp_path / "state.pt")
    with pytest.raises(ModelError, match="no adapter 'third'"):
        adapter_tensors(tmp_path / "state.pt", "third")
    found = adapter_tensors(tmp_path / "state.pt", "second")
    assert all(t.shape[0] == 3 for name, t in found.items() if name.endswith("lora_A.weight"))


def test_dora_command(trained, tmp_path):
    arguments = ["convert-adapter", str(trained[1]), "--out", str(tmp_path / "out"), "--rank", "8", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "14 matrices" in result.output
    assert "9 others" in result.output
    assert CliRunner().invoke(app, arguments).exit_code != 0


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_bad_checkpoints(lora_model, tmp_path, capsys):
    with pytest.raises(ModelError, match="no checkpoint"):
        adapter_tensors(tmp_path / "none")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ModelError, match="names builtins print"):
        adapter_tensors(tmp_path / "a")
    torch.save({"a": Harmful()}, tmp_path / "b.pt")
    with pytest.raises(ModelError, match="cannot be read as a checkpoint of tensors alone"):
        adapter_tensors(tmp_path / "b.pt")
    assert "harm" not in capsys.readouterr().out
    torch.save(models.plain().state_dict(), tmp_path / "c.pt")
    with pytest.raises(ModelError, match="no tensors of a LoRA adapter"):
        adapter_tensors(tmp_path / "c.pt")
    write_sharded(lora_model, tmp_path / "d")
    for file in (tmp_path / "d").glob("*.distcp"):
        file.unlink()
    with pytest.raises(ModelError, match="cannot be read whole"):
        adapter_tensors(tmp_path / "d")


def test_a_config_of_another_run(lora_model, tmp_path):
    model = models.lora(models.plain(), r=8)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    models.lora(models.plain(), r=4).peft_config["default"].save_pretrained(tmp_path / "run")
    arguments = ["convert-adapter", str(tmp_path / "state.pt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--config", str(tmp_path / "run" / "adapter_config.json")])
    assert result.exit_code != 0
    assert "different runs" in result.output
