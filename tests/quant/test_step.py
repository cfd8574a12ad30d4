"""Training steps over bases of every format: the fused path alone gives the gradients of the decoded weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from tests import models
from tests.accuracy import assert_as_accurate
from tests.engine.step import assert_equal, fallbacks, step
from tests.quant.cases import CASES, linear, quantized

pytest.importorskip("peft")

WHOLE = {
    "bitsandbytes int8", "fp8 blocks", "fp8 rows, compressed", "compressed w8a8", "compressed int4 zeros",
    "compressed mxfp4", "compressed nvfp4", "gptq, act-order", "awq", "hqq", "hqq axis 0", "torchao int8",
    "torchao float8",
}  # fmt: skip


def pair(name: str, change: Any = None) -> tuple[Any, Any]:
    """A LoRA model over quantized linears, and one with the same adapters over their decoded weights.

    ``change`` is done to one quantized layer, before PEFT sees it.
    """
    case = CASES[name]
    base = models.plain()
    plain = copy.deepcopy(base)
    packed = {}
    for path, module in list(base.named_modules()):
        if path.rpartition(".")[2] in models.LINEARS:
            layer = quantized(case, module)
            dense = linear((module.out_features, module.in_features))
            dense.weight.data = case.truth(layer).float()
            plain.set_submodule(path, dense)
            if change is not None and path.endswith("layers.1.mlp.down_proj"):
                change(layer)
            if hasattr(layer, "weight") or hasattr(layer, "W_q"):
                base.set_submodule(path, layer)
            else:  # PEFT cannot put an adapter on a layer without a weight
                packed[path] = layer
    for part in (base, plain):
        part.requires_grad_(False)
    model, oracle = models.lora(base), models.lora(plain)
    for path, layer in packed.items():
        model.base_model.model.get_submodule(path).base_layer = layer
    adapters = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    oracle.load_state_dict(adapters, strict=False)  # PEFT rounds those over FP8 weights to FP8 first
    return model, oracle


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_gradients_are_those_of_the_decoded_weights(name: str) -> None:
    model, oracle = pair(name)
    applied = fastplug.apply(model)
    assert not applied.report.refused, applied.report.summary()
    ours, truth = step(model, models.batch()), step(oracle, models.batch())
    assert not fallbacks(model), fallbacks(model)
    assert ours.gradients
    assert all("lora_" in key for key in ours.gradients)
    assert_equal(ours, truth)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.forward])
def test_as_accurate_as_the_library(name: str) -> None:
    model, oracle = pair(name)
    library = step(model, models.batch())
    fastplug.apply(model)
    ours, truth = step(model, models.batch()), step(oracle.double(), models.batch())
    keys = list(truth.gradients)
    results = ([each.logits, *(each.gradients[key] for key in keys)] for each in (ours, library, truth))
    assert_as_accurate(*results, ["logits", *keys])


def test_undo_gives_the_library_back() -> None:
    model, _ = pair("bitsandbytes int8")
    before = step(model, models.batch())
    fastplug.apply(model).undo()
    assert_equal(step(model, models.batch()), before, bound=0)


def test_the_report_says_what_the_library_would_round() -> None:
    report = fastplug.apply(pair("bitsandbytes int8")[0]).report
    assert any("bitsandbytes rounds the activations to 8 bits" in note for note in report.notes)
    assert "rounds the activations" in str(report)


def test_verify_accepts_every_format() -> None:
    for name in ("bitsandbytes int8", "gptq"):
        result = fastplug.verify(pair(name)[0], models.batch())
        assert result.ok, str(result)


# --- what is wrong is said before the first step ----------------------------------------------------------------------


def broken(name: str, change: Any) -> Any:
    """A patched model, one layer of which was changed before."""
    return fastplug.apply(pair(name, change)[0])


def nan(tensor: torch.Tensor) -> None:
    tensor.data.view(-1)[3] = torch.nan


def test_scales_that_are_not_finite() -> None:
    for name, change in {
        "bitsandbytes int8": lambda layer: nan(layer.weight.SCB),
        "fp8 small blocks": lambda layer: nan(layer.weight_scale_inv),
        "gptq": lambda layer: nan(layer.scales),
        "compressed nvfp4": lambda layer: layer.weight_global_scale.data.zero_(),
        "compressed mxfp4": lambda layer: layer.weight_scale.data.view(torch.uint8).fill_(255),
    }.items():
        with pytest.raises(fastplug.ModelError, match=r"layers\.1\.mlp\.down_proj\S* has .*(NaN|zero).*damaged"):
            broken(name, change)


def test_columns_in_groups_that_do_not_exist() -> None:
    with pytest.raises(fastplug.ModelError, match=r"down_proj\S* has columns in groups \(g_idx\) beyond the 4"):
        broken("gptq, act-order", lambda layer: layer.g_idx[5:6].fill_(4))
    with pytest.raises(fastplug.ModelError, match="though it was made without"):
        broken("gptq", lambda layer: layer.g_idx.copy_(layer.g_idx.flip(0)))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gptq", lambda layer: setattr(layer, "pack_dtype", torch.int16), "not in 32-bit words"),
        ("gptq", lambda layer: setattr(layer, "bits", 16), "no codes of 16 bits"),
        ("gptq", lambda layer: setattr(layer, "scales", layer.scales.double()), "dtype torch.float64"),
        ("gptq", lambda layer: setattr(layer, "g_idx", layer.g_idx[:0]), "does not say which columns are a group"),
        ("awq", lambda layer: setattr(layer, "w_bit", 3), "3 bits"),
        (
            "fp8 small blocks",
            lambda layer: setattr(layer, "weight_scale_inv", nn.Parameter(layer.weight_scale_inv.flatten(), False)),
            "scales of shape (16,) do not fit",
        ),
        ("hqq", lambda layer: layer.meta.update(packing="4bit_tiles"), "packing is '4bit_tiles'"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_another_layout_is_left_to_the_library(name: str, change: Any, reason: str) -> None:
    """A layer that may be sound, though it cannot be read, is refused with the reason, and the rest is patched."""
    report = broken(name, change).report
    refused = [decision for decision in report.refused if reason in str(decision.reason)]
    assert refused, report.summary()
    assert all("layers.1" in decision.name for decision in refused)
    assert any("layers.0" in decision.name for decision in report.patched)


def test_another_kernel_of_the_library_is_refused() -> None:
    def rearranged(layer: Any) -> None:
        layer.__class__ = type("MarlinLinear", (type(layer),), {"__module__": "gptqmodel.nn_modules.qlinear.marlin"})

    reasons = {str(decision.reason) for decision in broken("gptq", rearranged).report.refused}
    assert any("a MarlinLinear keeps its weight in an order of its own" in reason for reason in reasons), reasons


def test_a_module_of_two_formats_is_read_by_the_format_it_has_now() -> None:
    """compressed-tensors decompresses layers in place: the same module is a plain layer then."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import decompress_module

    model, oracle = pair("compressed w8a8")
    fastplug.apply(model)
    truth = step(oracle, models.batch())
    assert_equal(step(model, models.batch()), truth)
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            decompress_module(module)
    assert_equal(step(model, models.batch()), truth)
    assert not fallbacks(model), fallbacks(model)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_folder_of_compressed_tensors_stays_compressed(form: str, tmp_path: Path) -> None:
    """As transformers loads it, with the library's forwards on the layers, once its hook is gone."""
    pytest.importorskip("compressed_tensors")
    import transformers
    from compressed_tensors.compressors.base import decompress_module

    fastplug.export(models.plain(), tmp_path / "base", form, verify=False)
    load = transformers.AutoModelForCausalLM.from_pretrained
    base, plain = (load(tmp_path / "base", dtype=torch.float32).requires_grad_(False) for _ in range(2))
    for part in (base, plain):
        part.ct_decompress_hook.remove()
    for module in plain.modules():
        decompress_module(module)
        if hasattr(module, "quantization_scheme"):
            module.__dict__.pop("forward")  # which would round the activations
    model, oracle = models.lora(base), models.lora(plain)
    adapters = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    oracle.load_state_dict(adapters, strict=False)
    fastplug.apply(model, strict=True)
    assert_equal(step(model, models.batch(), logits=False), step(oracle, models.batch(), logits=False))
    assert not fallbacks(model), fallbacks(model)
    assert base.model.layers[0].mlp.up_proj.weight.element_size() == 1
