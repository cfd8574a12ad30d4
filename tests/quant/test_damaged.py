"""Damaged quantized layers of a live model: an error that names the layer, before anything is patched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.layers import quantize_
from fastplug.manager import manager
from fastplug.options import Options
from fastplug.patching.sites import Runtime
from fastplug.quant import Damaged, EncodedWeight
from fastplug.quant.bnb4 import BitsAndBytes4
from fastplug.quant.bnb8 import BitsAndBytes8
from fastplug.quant.checking import check_weights
from fastplug.sharding import SHARDED
from tests import models
from tests.quant.cases import CASES, linear, quantized
from tests.quant.test_step import broken

pytest.importorskip("bitsandbytes")


def assert_refused_as_damaged(model: Any, message: str) -> None:
    """Every way into fastplug says so, and leaves the model alone."""
    classes = [type(module) for module in model.modules()]
    for call in (fastplug.apply, fastplug.verify):
        with pytest.raises(fastplug.ModelError, match=message) as caught:
            call(model)
        assert "layers.1.mlp.down_proj" in str(caught.value)
        assert "load or quantize the model again" in str(caught.value)
    assert [type(module) for module in model.modules()] == classes


def damaged_qlora(change: Any, double: bool) -> Any:
    model = models.qlora(double=double)
    change(model.get_base_model().model.layers[1].mlp.down_proj.base_layer)
    return model


def of_state(part: str, change: Any) -> Any:
    """Changes a part of a 4-bit layer's state, such as ``state2.absmax``."""

    def changed(layer: Any) -> None:
        state = layer.weight.quant_state
        owner = state.state2 if part.startswith("state2.") else state
        name = part.rpartition(".")[2]
        setattr(owner, name, change(getattr(owner, name)))

    return changed


def not_finite(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


# down_proj is 64 x 128: 128 blocks of 64, whose scales are one block of 256.
BOTH: list[tuple[str, Any, str]] = [
    ("absmax", lambda t: t[:-1], r"absmax of shape \(127,\) where its own shape and blocks need 128 values"),
    ("absmax", lambda t: torch.cat((t, t)), r"absmax of shape \(256,\)"),
    ("absmax", lambda t: t[:, None], r"absmax of shape \(128, 1\)"),
    ("code", lambda t: t[:15], r"quant_map of shape \(15,\) .* need 16"),
    ("code", not_finite(torch.nan), r"scales that are NaN or infinite \(quant_map\)"),
    ("shape", lambda shape: (32, 256), r"the shape \(32, 256\) in a layer of \(64, 128\)"),
    ("blocksize", lambda size: 128, r"absmax of shape \(128,\) where its own shape and blocks need 64 values"),
    ("blocksize", lambda size: 32, r"absmax of shape \(128,\) where its own shape and blocks need 256 values"),
    ("blocksize", lambda size: 48, "its blocksize is 48, which is no power of two"),
    ("blocksize", lambda size: 0, "its blocksize is 0"),
]
NESTED: list[tuple[str, Any, str]] = [
    ("state2.absmax", not_finite(torch.nan), r"scales that are NaN or infinite \(nested_absmax\)"),
    ("state2.absmax", lambda t: t[:0], r"nested_absmax of shape \(0,\) .* need 1 values"),
    ("state2.code", lambda t: t[:255], r"nested_quant_map of shape \(255,\) .* need 256"),
    ("state2.code", not_finite(torch.inf), r"scales that are NaN or infinite \(nested_quant_map\)"),
    ("state2.blocksize", lambda size: 64, r"nested_absmax of shape \(1,\) .* need 2"),
    ("state2.blocksize", lambda size: 0, "has blocks of 0 values"),
    ("offset", not_finite(torch.nan), r"scales that are NaN or infinite \(nested_offset\)"),
]


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(("part", "change", "message"), BOTH, ids=[f"{b[0]}: {b[2]}" for b in BOTH])
def test_bitsandbytes_4_bit(part: str, change: Any, message: str, double: bool) -> None:
    assert_refused_as_damaged(damaged_qlora(of_state(part, change), double), message)


@pytest.mark.parametrize(("part", "change", "message"), NESTED, ids=[f"{b[0]}: {b[2]}" for b in NESTED])
def test_bitsandbytes_4_bit_with_double_quantization(part: str, change: Any, message: str) -> None:
    assert_refused_as_damaged(damaged_qlora(of_state(part, change), True), message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bitsandbytes_4_bit_without_it(value: float) -> None:
    assert_refused_as_damaged(
        damaged_qlora(of_state("absmax", not_finite(value)), False), r"NaN or infinite \(absmax\)"
    )


def truncate(tensor: Any) -> None:
    tensor.data = tensor.data[:-1]


def test_truncated_codes_of_bitsandbytes() -> None:
    message = r"its 4-bit weight has shape \(4095, 1\), expected \(4096, 1\)"
    assert_refused_as_damaged(damaged_qlora(lambda layer: truncate(layer.weight), True), message)


# --- fastplug's own layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "hqq"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: [p.data.fill_(torch.nan) for p in layer.parameters() if p.is_floating_point()], "NaN"),
        (lambda layer: truncate(layer.weight), "parts of other sizes than those it was made with"),
        (lambda layer: truncate(getattr(layer, layer.parts[1])), "parts of other sizes"),
    ],
    ids=["NaN", "codes", "scales"],
)
def test_quant_linear(kind: str, change: Any, message: str) -> None:
    model = models.lora(quantize_(models.plain(), kind))
    assert fastplug.apply(model).undo() is None
    change(model.get_base_model().model.layers[1].mlp.down_proj.base_layer)
    assert_refused_as_damaged(model, message)


# --- the other formats ------------------------------------------------------------------------------------------------


def cut(name: str, size: int) -> Any:
    """Leaves the first ``size`` rows of a tensor."""

    def change(layer: Any) -> None:
        tensor = getattr(layer, name)
        value = tensor.detach()[:size].clone()
        setattr(layer, name, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)

    return change


def torchao_scale(layer: Any) -> None:
    layer.weight.scale = layer.weight.scale[:-1]


DAMAGED: list[tuple[str, Any, str]] = [
    ("bitsandbytes int8", lambda layer: setattr(layer.weight, "SCB", layer.weight.SCB[:-1]), "scales of shape"),
    ("bitsandbytes int8", lambda layer: setattr(layer.weight, "SCB", None), r"has no scales \(SCB\)"),
    ("bitsandbytes int8", lambda layer: truncate(layer.weight), r"shape \(63, 128\), expected \(64, 128\)"),
    ("fp8 blocks", lambda layer: setattr(layer, "block_size", (64, 64)), "64 x 128 in blocks of 64 x 64"),
    ("fp8 small blocks", cut("weight_scale_inv", 3), "scales of shape"),
    ("fp8 small blocks", lambda layer: setattr(layer, "weight_scale_inv", None), "has no scales"),
    ("fp8 small blocks", lambda layer: truncate(layer.weight), r"shape \(63, 128\), expected \(64, 128\)"),
    ("fp8 rows, compressed", lambda layer: setattr(layer.weight_scale, "data", layer.weight_scale.data[:, :63]),
     "neither one nor one for each of 64 rows"),
    ("gptq", cut("scales", 3), "do not fit 64 x 128 in groups of 32"),
    ("gptq", cut("qweight", 15), "take 4096 bytes, there are 3840"),
    ("gptq", cut("qzeros", 3), "zero points of shape"),
    ("gptq", lambda layer: setattr(layer, "group_size", 24), "in groups of 24"),
    ("gptq", lambda layer: setattr(layer, "group_size", -2), "a group of -2 columns"),
    ("gptq, act-order", lambda layer: setattr(layer, "group_size", 33), "groups of 33 do not divide 128 columns"),
    ("gptq, act-order", cut("g_idx", 96), "bytes, there are"),
    ("awq", cut("qzeros", 1), "zero points of shape"),
    ("awq", cut("qweight", 127), "bytes, there are"),
    ("compressed nvfp4", lambda layer: delattr(layer, "weight_scale"), "has no weight_scale"),
    ("compressed w8a8", cut("weight", 63), r"shape \(63, 128\), expected \(64, 128\)"),
    ("compressed w8a8 zeros", cut("weight_zero_point", 63), "63 zero points for 64 scales"),
    ("compressed int4 groups", cut("weight_packed", 63), "bytes, there are"),
    ("hqq", lambda layer: layer.meta.update(scale=layer.meta["scale"][:-1]), "scales and 256 zero points do not fit"),
    ("hqq", lambda layer: layer.meta.update(group_size=24), "groups of 24 do not divide its columns"),
    ("torchao int8", torchao_scale, "63 scales and 64 zero points do not fit|scales of shape"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), DAMAGED, ids=[f"{d[0]}: {d[2]}" for d in DAMAGED])
def test_other_formats(name: str, change: Any, message: str) -> None:
    with pytest.raises(fastplug.ModelError, match=message) as caught:
        broken(name, change)
    assert "the quantized weight of base_model.model.model.layers.1.mlp.down_proj" in str(caught.value)


# --- what is not damage -----------------------------------------------------------------------------------------------


def test_blocks_of_a_size_that_is_not_decoded() -> None:
    model = damaged_qlora(of_state("blocksize", lambda size: 16), True)
    reasons = {str(decision.reason) for decision in fastplug.apply(model).report.refused}
    assert any("blocks of 16 values share a scale, not of 32 to 4096" in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("make", "codec"),
    [
        (lambda: models.quantized(models.plain()).model.layers[1].mlp.down_proj, BitsAndBytes4()),
        (lambda: quantized(CASES["bitsandbytes int8"], linear((64, 128))), BitsAndBytes8()),
    ],
    ids=["4 bits", "8 bits"],
)
def test_a_part_that_somebody_shards_is_no_damage(make: Any, codec: Any) -> None:
    layer: Any = make()
    assert isinstance(codec.read(layer), EncodedWeight)
    truncate(layer.weight)
    assert isinstance(codec.read(layer), Damaged)
    for mark in ("_is_fsdp_managed_module", "_is_hooked"):
        setattr(layer, mark, True)
        reason = codec.read(layer)
        assert not isinstance(reason, Damaged)
        assert reason.endswith(SHARDED)
        delattr(layer, mark)
    layer.weight.ds_id = 3
    assert codec.read(layer).endswith(SHARDED)
    del layer.weight.ds_id
    layer.weight.data = layer.weight.data[:0]  # a placeholder
    assert codec.read(layer).endswith(SHARDED)


def test_one_wait_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, waits = models.qlora(), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor.shape) or tolist(tensor))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: pytest.fail("a wait for one layer"))
    runtime = Runtime(Options(), SimpleNamespace(), manager(False).collect("fastplug_codecs"))  # type: ignore[arg-type]
    assert check_weights(model, runtime.codec) == []
    assert waits == [(14 * 4,)]  # layers and their tensors of floats
