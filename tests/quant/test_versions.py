"""Layers of another version of their library: refused with its version and what is odd, never decoded by guess."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.quant import EncodedWeight
from fastplug.quant.bnb4 import BitsAndBytes4
from fastplug.quant.bnb8 import BitsAndBytes8
from fastplug.quant.gptq import GPTQ
from fastplug.quant.hqq import HQQ
from fastplug.quant.versions import version
from tests import models
from tests.quant.cases import CASES, gptq, linear, quantized

bitsandbytes = pytest.importorskip("bitsandbytes")


class Absent:
    """Stands for an attribute that is not there; pytest names parameters by it."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def down_proj(double: bool = True) -> Any:
    return models.quantized(models.plain(), double=double).model.layers[1].mlp.down_proj


def with_state(layer: Any, **changes: Any) -> None:
    """Another class of state on a 4-bit layer, with the same attributes but for the changes."""
    state = layer.weight.quant_state
    inner = {name.removeprefix("state2."): changes.pop(name) for name in list(changes) if name.startswith("state2.")}
    if inner:
        changes["state2"] = namespace(vars(state.state2), inner)
    layer.weight.quant_state = namespace(vars(state), changes)


def namespace(values: dict[str, Any], changes: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: value for name, value in {**values, **changes}.items() if value is not ABSENT})


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        *[({name: ABSENT}, name) for name in ("shape", "absmax", "code", "blocksize", "nested", "state2", "offset")],
        *[({f"state2.{name}": ABSENT}, name) for name in ("absmax", "code", "blocksize")],
        ({"shape": None}, "NoneType"),
        ({"shape": 8192}, "int"),
        ({"blocksize": "64"}, "str"),
        ({"blocksize": None}, "NoneType"),
        ({"absmax": None}, "NoneType"),
        ({"absmax": torch.zeros(128)}, "it holds absmax torch.float32"),
        ({"code": torch.zeros(16, dtype=torch.float16)}, "quant_map torch.float16"),
        ({"state2.absmax": torch.zeros(1, dtype=torch.bfloat16)}, "nested_absmax torch.bfloat16"),
        ({"offset": 0.25}, "float"),
    ],
    ids=str,
)
def test_bitsandbytes_4_bit(changes: dict[str, Any], odd: str) -> None:
    layer = down_proj()
    with_state(layer)
    assert isinstance(BitsAndBytes4().read(layer), EncodedWeight)
    with_state(layer, **changes)
    reason = BitsAndBytes4().read(layer)
    assert isinstance(reason, str)
    assert f"its Linear4bit is not as it is known here, in bitsandbytes {bitsandbytes.__version__}: " in reason
    assert odd in reason


def test_bitsandbytes_4_bit_without_double_quantization() -> None:
    layer = down_proj(double=False)
    with_state(layer, absmax=torch.zeros(128, dtype=torch.uint8))
    assert "it holds absmax torch.uint8, quant_map torch.float32" in str(BitsAndBytes4().read(layer))


def test_the_report_has_the_reason_and_the_rest_is_patched() -> None:
    model = models.qlora()
    with_state(model.get_base_model().model.layers[1].mlp.down_proj.base_layer, nested=ABSENT)
    report = fastplug.apply(model).report
    assert {decision.name.rpartition("layers.")[2] for decision in report.refused} == {"1", "1.mlp"}
    assert all(f"in bitsandbytes {bitsandbytes.__version__}: " in str(decision.reason) for decision in report.refused)
    assert any("layers.0" in decision.name for decision in report.patched)


@pytest.mark.parametrize(
    ("change", "odd"),
    [
        (lambda layer: setattr(layer, "state", SimpleNamespace()), "SCB"),
        (lambda layer: delattr(layer, "state"), "state"),
        (lambda layer: setattr(layer.weight, "SCB", [1.0, 2.0]), "list"),
        (lambda layer: setattr(layer.weight, "SCB", 3.0), "float"),
    ],
)
def test_bitsandbytes_8_bit(change: Any, odd: str) -> None:
    layer = quantized(CASES["bitsandbytes int8"], linear((64, 128)))
    assert isinstance(BitsAndBytes8().read(layer), EncodedWeight)
    layer.weight.SCB = None
    change(layer)
    reason = str(BitsAndBytes8().read(layer))
    assert f"its Linear8bitLt is not as it is known here, in bitsandbytes {bitsandbytes.__version__}: " in reason
    assert odd in reason


class HQQLinear(nn.Module):
    """A stand-in for hqq's layer, 8 x 64 in groups of 32."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        meta = {
            "packing": "4bit_u8", "shape": (8, 64), "axis": 1, "group_size": 32, "scale": torch.ones(16, 1),
            "zero": torch.zeros(16, 1),
        }  # fmt: skip
        values = {
            "W_q": torch.zeros(8, 32, dtype=torch.uint8), "ready": True, "compute_dtype": torch.float32,
            "meta": {k: v for k, v in {**meta, **changes.pop("meta", {})}.items() if v is not ABSENT},
        }  # fmt: skip
        for name, value in {**values, **changes}.items():
            if value is not ABSENT:
                setattr(self, name, value)


HQQLinear.__module__ = "hqq.core.quantize"


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        *[({"meta": {name: ABSENT}}, name) for name in ("packing", "shape", "axis", "group_size")],
        ({"meta": {"shape": None}}, "NoneType"),
        ({"meta": {"axis": "columns"}}, "columns"),
        ({"meta": {"scale": 1.0}}, "float"),
        ({"meta": {"zero": None}}, "NoneType"),
        ({"compute_dtype": ABSENT}, "compute_dtype"),
        ({"compute_dtype": "float16"}, "its compute_dtype is 'float16'"),
        ({"W_q": [1, 2]}, "list"),
    ],
    ids=str,
)
def test_hqq(changes: dict[str, Any], odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq", SimpleNamespace(__version__="9.1"))
    assert isinstance(HQQ().read(HQQLinear()), EncodedWeight)
    layer = HQQLinear(**changes)
    assert HQQ().matches(layer)
    reason = str(HQQ().read(layer))
    assert "its HQQLinear is not as it is known here, in hqq 9.1: " in reason
    assert odd in reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"W_q": torch.zeros(8, 32, dtype=torch.int16)}, "its codes have dtype torch.int16, not torch.uint8"),
        ({"meta": {"packing": None}}, "its packing is None"),
        ({"meta": {"scale": torch.ones(1), "zero": torch.ones(1)}}, "do not fit"),
        ({"meta": {"group_size": 128}}, "groups of 128 do not divide its columns"),
    ],
    ids=str,
)
def test_other_layouts_of_hqq(changes: dict[str, Any], reason: str) -> None:
    found = HQQ().read(HQQLinear(**changes))
    assert type(found) is str
    assert reason in found


def test_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", SimpleNamespace(__version__="7.0"))
    layer: Any = gptq(linear((64, 128)))
    del layer.pack_dtype
    reason = str(GPTQ().read(layer))
    assert "its TorchLinear is not as it is known here, in gptqmodel 7.0: " in reason
    assert "pack_dtype" in reason


def test_versions() -> None:
    assert version("torch") == torch.__version__
    assert version("pluggy")[0].isdigit()  # which is known to the package manager alone
    assert version("no_such_package") == "of an unknown version"
