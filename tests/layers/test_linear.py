"""QuantLinear: alone, in a model, under PEFT, patched."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastplug
from fastplug.errors import ModelError, OptionError
from fastplug.layers import LoRALinear, QuantLinear, dequantize_, quantize, quantize_
from tests import models
from tests.accuracy import assert_as_accurate
from tests.engine.step import assert_equal, assert_parity, fallbacks, patched, step

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def batch():
    return models.batch()


def linear(out_features=48, in_features=64, bias=True, dtype=torch.float32, device="cpu"):
    return nn.Linear(in_features, out_features, bias, dtype=dtype, device=device)


def test_it_holds_the_weight_of_bitsandbytes(device):
    plain = linear(device=device)
    layer = quantize(plain)
    packed, state = bnb.functional.quantize_4bit(plain.weight.data, compress_statistics=True, quant_type="nf4")
    assert torch.equal(layer.weight, packed.flatten())
    assert torch.equal(layer.dequantize(), bnb.functional.dequantize_4bit(packed, state))
    assert layer.dequantize(torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_forward_and_gradients(device, dtype, double):
    layer = quantize(linear(dtype=dtype, device=device).requires_grad_(False))
    if not double:
        layer = quantize_(nn.Sequential(linear(dtype=dtype, device=device)), double_quant=False)[0]
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 5, 64, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(2, 5, 48, device=device, dtype=dtype)

    def run(kind, weight):
        y = nn.functional.linear(x.to(kind), weight.to(kind), layer.bias.to(kind))
        return y, *torch.autograd.grad(y, (x, layer.bias), g.to(kind))

    weight = layer.dequantize()
    y = layer(x)
    ours = (y, *torch.autograd.grad(y, (x, layer.bias), g))
    assert_as_accurate(ours, run(dtype, weight), run(torch.float64, weight), ["y", "dx", "dbias"])


def test_nothing_decoded_is_saved(device):
    layer = quantize(linear(device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(3, 64, device=device, requires_grad=True))
    assert (48, 64) not in saved


def test_autocast(device):
    layer = quantize(linear(device=device))
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(torch.randn(3, 64, device=device)).dtype == torch.bfloat16


def test_state_dict_and_moves_keep_the_bits(device):
    layer, other = quantize(linear(device=device)), quantize(linear(device=device))
    before = layer.dequantize()
    assert not torch.equal(other.dequantize(), before)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), before)
    moved = copy.deepcopy(layer).to(torch.bfloat16).half().double().cpu()
    assert torch.equal(moved.dequantize(torch.float32), before.cpu())
    assert moved.bias.dtype == torch.float64
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).dequantize(), before)


def test_a_sharded_weight_is_not_read():
    layer = quantize(linear())
    layer.weight.data = layer.weight.data[:5]
    assert "sharded" in layer.read()
    with pytest.raises(RuntimeError, match="sharded and not gathered"):
        layer(torch.randn(2, 64))


def test_quantize_a_model_in_place():
    model = models.plain()
    head = model.lm_head.weight
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    assert quantize_(model) is model
    kinds = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(kinds) == 14
    assert model.lm_head.weight is head
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, quantize_(_only(weight))[0].weight)
    dense = dequantize_(copy.deepcopy(model))
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    with torch.no_grad():
        ids = models.batch()["input_ids"]
        torch.testing.assert_close(model(ids).logits, dense(ids).logits)


def _only(weight):
    made = linear(*weight.shape, bias=False)
    made.weight.data = weight
    return nn.Sequential(made)


def test_what_is_skipped():
    model = quantize_(models.plain(), skip=["q_proj", "model.layers.1", "lm_head"])
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert "model.layers.0.self_attn.q_proj" in left
    assert "model.layers.1.mlp.up_proj" in left
    assert "lm_head" in left
    assert "model.layers.0.mlp.up_proj" not in left
    tied = quantize_(models.plain(tie_word_embeddings=True), skip=[])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_bad_input():
    with pytest.raises(OptionError, match="no format 'nf5'"):
        quantize_(models.plain(), "nf5")
    with pytest.raises(OptionError, match="blocksize 48"):
        quantize_(models.plain(), blocksize=48)
    with pytest.raises(OptionError, match="skip names 'head'"):
        quantize_(models.plain(), skip=["head"])
    with pytest.raises(ModelError, match="meta device"):
        quantize_(models.plain().to("meta"))
    with pytest.raises(ModelError, match="no linear layers"):
        quantize_(nn.ReLU())
    with pytest.raises(ModelError, match=r"torch\.float64"):
        quantize(linear().double())


def test_the_same_training_step_as_bitsandbytes(batch):
    theirs = models.lora(models.quantized(models.plain()))
    ours = models.lora(quantize_(models.plain()))
    assert_equal(step(ours, batch), step(theirs, batch))


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"use_rslora": True}, {"target_modules": "all-linear"}])
def test_a_patched_model_takes_it_as_base(batch, options):
    model = models.lora(quantize_(models.plain("qwen2")), **options)
    assert_parity(model, batch)


def test_a_patched_model_can_be_quantized(batch):
    model = models.lora(models.plain())
    twin = patched(model)
    quantize_(twin)
    quantize_(model)
    assert_equal(step(twin, batch), step(model, batch))
    assert not fallbacks(twin)


def test_peft_dora_finds_the_matrix(batch):
    theirs = models.lora(models.quantized(models.plain()), use_dora=True)
    ours = models.lora(quantize_(models.plain()), use_dora=True)
    assert_equal(step(ours, batch), step(theirs, batch))


def test_verify_judges_it(batch):
    model = models.lora(quantize_(models.plain()))
    fastplug.apply(model)
    assert fastplug.verify(model, batch).ok


def test_peft_does_not_merge_into_it(batch):
    model = models.lora(quantize_(models.plain()))
    with pytest.raises(RuntimeError):
        model.merge_adapter()
    with pytest.raises(RuntimeError):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("base", ["plain", "quantized"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_linear(device, base, rslora):
    inner = linear(device=device)
    inner = quantize(inner) if base == "quantized" else inner
    layer = LoRALinear(inner, 4, alpha=12, rslora=rslora)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    weight = inner.dequantize() if base == "quantized" else inner.weight

    def run(kind):
        wide = [t.detach().to(kind).requires_grad_() for t in inputs]
        y = nn.functional.linear(wide[0], weight.to(kind), inner.bias.to(kind))
        y = y + (wide[0] @ wide[1].T @ wide[2].T) * (12 / (2 if rslora else 4))
        return y, *torch.autograd.grad(y.sum(), wide)

    y = layer(x)
    ours = (y, *torch.autograd.grad(y.sum(), inputs))
    assert_as_accurate(ours, run(torch.float32), run(torch.float64), ["y", "dx", "dA", "dB"])
    torch.testing.assert_close(layer.merged()(x), y, rtol=1e-4, atol=1e-4)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_lora_linear_refuses():
    with pytest.raises(ModelError, match="not Embedding"):
        LoRALinear(nn.Embedding(3, 4))
    with pytest.raises(OptionError, match="rank 0"):
        LoRALinear(linear(), 0)
