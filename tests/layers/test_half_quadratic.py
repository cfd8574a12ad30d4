"""HQQ: the fit, and layers of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.layers import QuantLinear, expand_blocks, load, quantize, quantize_, save
from fastplug.layers.half_quadratic import HalfQuadratic
from tests import models
from tests.engine.step import assert_parity


def heavy_tailed(rows, columns, device="cpu"):
    """Weights of which a few are outliers."""
    weight = torch.randn(rows, columns, device=device)
    return weight * torch.where(torch.rand_like(weight) < 0.01, 6.0, 1.0)


def decoded(weight, **options):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return quantize(linear, HalfQuadratic(**options)).dequantize()


def plain_rounding(weight, group):
    """To the nearest of 16 steps between the least and the largest weight of a group."""
    parts = weight.view(-1, group)
    low = parts.amin(1, keepdim=True)
    step = (parts.amax(1, keepdim=True) - low) / 15
    return (((parts - low) / step).round() * step + low).view(weight.shape)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_it_fits_better_than_rounding(device, group):
    weight = heavy_tailed(64, 256, device)
    error = (weight - decoded(weight, group=group)).abs().mean()
    assert error < 0.999 * (weight - plain_rounding(weight, group)).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_further_off_than_a_step(device, dtype):
    weight = torch.rand(32, 128, device=device).to(dtype)
    error = (weight.float() - decoded(weight).float()).abs().max()
    assert error <= 1 / 15


def test_groups_of_equal_weights(device):
    weight = torch.full((4, 64), 0.5, device=device)
    weight[2] = 0
    torch.testing.assert_close(decoded(weight), weight, atol=1e-3, rtol=1e-3)


def test_it_is_as_good_as_the_package(device):
    package = pytest.importorskip("hqq.core.quantize")
    weight = heavy_tailed(64, 256)
    linear = nn.Linear(256, 64, bias=False)
    linear.weight.data = weight.clone()
    config = package.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    theirs = package.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False).dequantize()
    assert (weight - decoded(weight)).abs().mean() <= 1.02 * (weight - theirs).abs().mean()


def test_training_on_it():
    model = quantize_(models.plain("qwen2"), "hqq", blocksize=32)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    assert set(layer.state_dict()) == {"weight", "scale", "zero"}
    assert_parity(models.lora(model), models.batch())


def test_expansion_and_loading(tmp_path):
    plain = models.plain().eval()
    plain.save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", "hqq", device="cpu")
    quantize_(plain, "hqq")
    ids = models.batch()["input_ids"]
    with torch.no_grad():
        before = plain(ids).logits
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(expand_blocks(model, count=1)(ids).logits, before)
    with pytest.raises(ModelError, match=r"stored as hqq, which bitsandbytes does not have; save\(.*dequantize=True"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_groups():
    with pytest.raises(ModelError, match="groups of 48 do not divide rows of 64"):
        quantize_(models.plain(), "hqq", blocksize=48)
    with pytest.raises(OptionError, match="no multiple of 8"):
        quantize_(models.plain(), "hqq", blocksize=12)
