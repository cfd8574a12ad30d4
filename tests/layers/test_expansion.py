"""LLaMA-Pro: inserted blocks are the identity, they alone train, and the model saves and loads as any other."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

import fastplug
from fastplug.errors import ModelError, OptionError
from fastplug.exporters.folder import verify_manifest
from fastplug.layers import QuantLinear, dequantize_, expand_blocks, load, quantize_, save
from fastplug.layers.expansion import sources
from tests import models
from tests.engine.step import assert_parity

transformers = pytest.importorskip("transformers")


QWEN = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
WINDOWS = {"mistral": {"sliding_window": 5}, "qwen2": QWEN, "qwen3": QWEN}


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(models.batch()["input_ids"].to(model.device), **kwargs).logits.cpu()


@pytest.mark.parametrize(
    ("blocks", "every", "count", "expected"),
    [
        (4, 2, None, [0, 1, 1, 2, 3, 3]),
        (5, 2, None, [0, 1, 1, 2, 3, 3, 4]),
        (4, None, 1, [0, 1, 2, 3, 3]),
        (5, None, 2, [0, 1, 1, 2, 3, 4, 4]),
        (2, 1, None, [0, 0, 1, 1]),
    ],
)
def test_where_copies_go(blocks, every, count, expected):
    assert sources(blocks, every, count) == expected


@pytest.mark.parametrize("family", models.FAMILIES)
def test_it_computes_the_same_and_trains_the_copies(family, tmp_path):
    model = models.plain(family, num_hidden_layers=4, **WINDOWS.get(family, {}))
    before = logits(model)
    assert expand_blocks(model, every=2) is model
    assert torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"2", "5"}
    model.train()(**models.batch()).loss.backward()
    assert model.model.layers[2].mlp.down_proj.weight.grad.abs().max() > 0
    assert model.model.layers[1].mlp.down_proj.weight.grad is None
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), before)


def test_generation_with_a_cache():
    model = models.plain(num_hidden_layers=2).eval()
    ids = models.batch()["input_ids"]
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    expand_blocks(model, every=1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)


@pytest.mark.parametrize("base", ["bitsandbytes", "QuantLinear"])
def test_a_quantized_base_gets_dense_copies(base, tmp_path):
    if base == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        model = models.quantized(models.plain())
    else:
        model = quantize_(models.plain())
    before = logits(model)
    expand_blocks(model, count=1)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    block = model.model.layers[2]
    assert type(block.self_attn.q_proj) is nn.Linear
    assert block.self_attn.q_proj.weight.dtype == torch.float32
    assert not block.self_attn.o_proj.weight.any()
    model.train()(**models.batch()).loss.backward()
    assert block.mlp.down_proj.weight.grad.abs().max() > 0


def test_a_quantized_one_is_written_and_read(tmp_path):
    model = expand_blocks(quantize_(models.plain()), count=1)
    nn.init.normal_(model.model.layers[2].mlp.down_proj.weight)
    before = logits(model)
    again = load(save(model, tmp_path / "q"), device="cpu")
    assert isinstance(again.model.layers[1].mlp.up_proj, QuantLinear)
    assert type(again.model.layers[2].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(again), before)
    pytest.importorskip("bitsandbytes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert type(theirs.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
    assert type(theirs.model.layers[2].mlp.up_proj) is nn.Linear
    with torch.no_grad():  # in evaluation, bitsandbytes rounds its scales to bf16 on some CPUs
        trained = theirs.train()(models.batch()["input_ids"].to(theirs.device)).logits.cpu()
    torch.testing.assert_close(trained, before, rtol=1e-4, atol=1e-3)
    dequantize_(model).save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-3)


def test_one_on_hqq_becomes_a_plain_16_bit_model(tmp_path, monkeypatch):
    models.plain(num_hidden_layers=4, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = expand_blocks(load(tmp_path / "base", "hqq", device="cpu"), every=2)
    nn.init.normal_(model.model.layers[2].mlp.down_proj.weight, std=0.1)
    before = logits(model)
    decoded, whole = [], QuantLinear.dequantize

    def dequantize(layer, *arguments):
        assert not any(weight() is not None for weight in decoded), "two decoded weights at a time"
        made = whole(layer, *arguments)
        decoded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(QuantLinear, "dequantize", dequantize)
    out = save(model, tmp_path / "plain", dequantize=True, max_shard_size="100KB")
    assert len(decoded) == 4 * len(models.LINEARS)
    assert not verify_manifest(out)
    again = transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert not any(isinstance(module, QuantLinear) for module in again.modules())
    assert again.config.num_hidden_layers == 6
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), before)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)  # only read


def test_a_patched_expanded_model_takes_the_same_step():
    model = expand_blocks(quantize_(models.plain()), count=1)
    nn.init.normal_(model.model.layers[2].mlp.down_proj.weight, std=0.1)
    assert_parity(model.train(), models.batch())


def test_mixture_of_experts(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    before = logits(model)
    expand_blocks(model, every=1)
    assert torch.equal(logits(model), before)


def test_bad_input():
    with pytest.raises(OptionError, match="one of them"):
        expand_blocks(models.plain())
    with pytest.raises(OptionError, match="one of them"):
        expand_blocks(models.plain(), every=1, count=1)
    with pytest.raises(OptionError, match="every=3 is impossible with 2 blocks"):
        expand_blocks(models.plain(), every=3)
    with pytest.raises(ModelError, match="no list of"):
        expand_blocks(nn.Linear(2, 2), every=1)
    with pytest.raises(ModelError, match="before adapters"):
        expand_blocks(models.lora(models.plain()), every=1)
    patched = models.plain()
    fastplug.apply(patched)
    with pytest.raises(ModelError, match="before fastplug"):
        expand_blocks(patched, every=1)
    with pytest.raises(ModelError, match="meta device"):
        expand_blocks(models.plain().to("meta"), every=1)


class NotAResidual(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp

    def forward(self, x):
        return self.inner(x) + 0.1 * x


def test_a_block_that_is_no_identity_leaves_the_model_as_it_was():
    model = models.plain(num_hidden_layers=2)
    model.model.layers[1].mlp = NotAResidual(model.model.layers[1].mlp)
    before, config = logits(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ModelError, match="change the outputs"):
        expand_blocks(model, count=1)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert all(p.requires_grad for p in model.parameters())


def test_a_config_that_cannot_describe_the_expanded_model():
    """Sliding windows in every second block, decided by the block's number alone."""
    model = models.plain("qwen2", num_hidden_layers=4)
    model.model.layers[1].self_attn.is_odd = True
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.sliding_window = None if i % 2 else 5
    with pytest.raises(ModelError, match="sliding_window = 5"):
        expand_blocks(model, every=2)
    assert len(model.model.layers) == 4
