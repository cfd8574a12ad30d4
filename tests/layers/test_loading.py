"""Streaming a model into quantized layers, and writing it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.exporters.folder import verify_manifest
from fastplug.layers import QuantLinear, load, quantize_, save
from tests import models

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model"
    model = models.plain("qwen2").to(torch.bfloat16)
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    return path


def bitsandbytes_model(folder, **options):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, **options,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, torch_dtype=torch.bfloat16
    )


def same_bits(ours, theirs) -> int:
    """Compares every weight; returns how many are quantized. Each model may be on a device of its own."""

    def same(mine, other) -> bool:
        return mine.dtype == other.dtype and torch.equal(mine.cpu(), other.cpu())

    layers = dict(theirs.named_modules())
    count = 0
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            weight = layers[name].weight
            state = weight.quant_state
            assert same(module.weight, weight.data.flatten()), name
            assert same(module.absmax, state.absmax)
            assert same(module.nested_absmax, state.state2.absmax)
            assert same(module.nested_offset.view(()), state.offset)
            count += 1
    plain = {name: p for name, p in theirs.named_parameters() if p.is_floating_point()}
    mine = {name: p for name, p in ours.named_parameters() if name in plain}
    assert mine.keys() == plain.keys()
    assert all(same(mine[name], parameter) for name, parameter in plain.items())
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():  # computed on the device that each was made on
        torch.testing.assert_close(buffer.cpu(), buffers[name].cpu(), rtol=1e-6, atol=0)
    return count


def logits(model):
    with torch.no_grad():
        return model(models.batch()["input_ids"].to(model.device)).logits.float().cpu()


def test_the_same_bits_as_transformers_with_bitsandbytes(folder, device):
    ours, theirs = load(folder, device=device), bitsandbytes_model(folder)
    assert ours.device.type == theirs.device.type == device.type
    assert same_bits(ours, theirs) == 14
    assert not ours.training
    assert ours.generation_config.top_k == 7
    assert ours.dtype == torch.bfloat16
    assert ours.config.name_or_path == str(folder)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.05, atol=0.1)


def test_it_is_what_quantize_makes(folder):
    loaded = load(folder, "fp4", device="cpu", blocksize=128, double_quant=False, skip=["lm_head", "q_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    quantize_(model, "fp4", blocksize=128, double_quant=False, skip=["lm_head", "q_proj"])
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))


def test_plain_weights(folder):
    loaded = load(folder, None, device="cpu", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dtype == torch.float32
    assert not any(isinstance(module, QuantLinear) for module in loaded.modules())


@pytest.mark.parametrize("shards", [None, "100KB"])
def test_tied_weights_and_shards(tmp_path, shards):
    model = models.plain(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    loaded = load(tmp_path, device="cpu", skip=[])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(loaded.lm_head) is nn.Linear
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(quantize_(reference)))


def test_buffers_that_no_checkpoint_holds(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    model = models.plain(rope_scaling=scaling, max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, None, device="cpu")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(loaded), logits(model.eval()))


# In a process of its own: an allocator that has seen other tests keeps what they freed.
MEASURE = """
import sys, torch
from fastplug.demo.memory import PeakMemory
from fastplug.layers import load
load(sys.argv[1], device="cpu")  # imports, threads and tables are there now
meter = PeakMemory(torch.device("cpu"))
loaded = load(sys.argv[1], device="cpu")
print(meter.read() or -1, sum(p.numel() * p.element_size() for p in loaded.parameters()))
"""


def test_loading_needs_the_quantized_model_and_one_tensor(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    # glibc keeps freed blocks below this threshold, which it raises as it goes: up to 45 MB of them, or none.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    peak, size = map(int, out.stdout.split())
    if peak < 0:
        pytest.skip("the peak of the resident memory cannot be measured here")
    assert stored > 100e6
    assert size < 0.3 * stored
    largest = 1024 * 2816 * 2
    assert peak < size + largest + (6 << 20)


def test_stored_tensors_that_transformers_joins(tmp_path):
    """The experts of a mixture lie one by one in the files, and in transformers 5 as one tensor in the model."""
    config = transformers.MixtralConfig(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    if any(name.endswith("experts.0.w1.weight") for name in model.state_dict()):  # transformers 4
        loaded = load(tmp_path, "nf4", device="cpu")
    else:
        with pytest.raises(ModelError, match=r"joins or splits.*quantize_"):
            load(tmp_path, "nf4", device="cpu")
        loaded = quantize_(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(loaded), logits(quantize_(model.eval())))


def test_save_and_read_without_fastplug(folder, tmp_path):
    ours = load(folder, device="cpu")
    out = save(ours, tmp_path / "nf4", max_shard_size="50KB")
    assert not verify_manifest(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.bfloat16)
    assert same_bits(ours, theirs) == 14
    again = load(out, device="cpu")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert again.generation_config.top_k == 7
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again), logits(ours))


def test_a_folder_that_bitsandbytes_wrote(folder, tmp_path):
    theirs = bitsandbytes_model(folder)
    theirs.save_pretrained(tmp_path)
    assert same_bits(load(tmp_path, device="cpu"), theirs) == 14


def test_training_on_it(folder):
    model = models.lora(load(folder, device="cpu", dtype=torch.float32))
    model(**models.batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_save_refuses(folder, tmp_path):
    with pytest.raises(ModelError, match="no QuantLinear"):
        save(models.plain(), tmp_path / "a")
    with pytest.raises(ModelError, match="not a PeftModel"):
        save(models.lora(load(folder, device="cpu")), tmp_path / "a")
    mixed = quantize_(quantize_(models.plain(), skip=["lm_head", "mlp"]), "fp4")
    with pytest.raises(ModelError, match="different ways"):
        save(mixed, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_damaged_folders(copied):
    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ModelError, match="truncated"):
        load(copied, device="cpu")
    (copied / "model.safetensors").write_bytes(weights[:5])
    with pytest.raises(ModelError, match="truncated"):
        load(copied, device="cpu")
    (copied / "model.safetensors").write_bytes(weights)
    rewrite(copied, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"not in the files .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copied, device="cpu")
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load(copied, device="cpu")
    (copied / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(copied, device="cpu")


def test_files_of_another_model(copied):
    def widen(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(192, 64)

    rewrite(copied, widen)
    with pytest.raises(ModelError, match=r"up_proj\.weight .*\(192, 64\), and by the config it is \(128, 64\)"):
        load(copied, device="cpu")


def state(**values):
    """Changes values in the JSON text of a 4-bit weight's state."""

    def change(text):
        found = {**json.loads(bytes(text.tolist())), **values}
        return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("absmax", lambda t: t[:-1], "absmax holds 63 values"),
        ("quant_state.bitsandbytes__nf4", state(blocksize=128), "absmax holds 64 values, and 64x64 needs 32"),
        ("quant_state.bitsandbytes__nf4", state(blocksize=48), "its blocksize is 48"),
        ("quant_state.bitsandbytes__nf4", state(nested_blocksize=32), "nested_absmax holds 1 values.* needs 2"),
        ("quant_state.bitsandbytes__nf4", state(nested_offset=float("nan")), "its nested_offset is nan"),
        ("quant_state.bitsandbytes__nf4", state(shape=[64, 32]), "weight holds 2048 values, and 64x32 needs 1024"),
        ("nested_absmax", lambda t: t * float("nan"), "not finite"),
        ("quant_state.bitsandbytes__nf4", lambda t: t[:20], "not JSON"),
        ("quant_map", lambda t: t[:15].clone(), "quant_map holds 15"),
    ],
)
def test_damaged_4_bit_weights(folder, tmp_path, part, change, message):
    out = save(load(folder, device="cpu"), tmp_path / "nf4")

    def damage(tensors):
        key = f"model.layers.0.self_attn.q_proj.weight.{part}"
        tensors[key] = change(tensors[key])

    rewrite(out, damage)
    with pytest.raises(ModelError, match=f"q_proj.weight is damaged: .*{message}"):
        load(out, device="cpu")


def test_bad_arguments(folder, tmp_path, copied):
    with pytest.raises(OptionError, match="no format 'nf5'"):
        load(folder, "nf5")
    with pytest.raises(OptionError, match="dtype is bfloat16"):
        load(folder, dtype="int8", device="cpu")
    with pytest.raises(ModelError, match="neither a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(OptionError, match="skip names 'nothing'"):
        load(folder, skip=["nothing"], device="cpu")
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized with gptq"):
        load(copied, device="cpu")
