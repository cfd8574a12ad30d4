"""Layers that libraries made themselves, as dense copies: the weight is the library's own, bit for bit.

The formats of ``tests.quant.cases``, whose GPTQ and AWQ layers are stand-ins, and beside them AWQ layers of AutoAWQ and
GPTQModel: real ones have no ``weight`` where a stand-in has one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.layers.dense import dense_copy
from tests.quant import encoders
from tests.quant.cases import CASES, linear, quantized

SHAPE, GROUP = (64, 96), 32


def autoawq(half: nn.Linear, scales: torch.Tensor, zeros: torch.Tensor) -> Any:
    module = pytest.importorskip("awq.modules.linear.gemm")
    return module.WQLinear_GEMM.from_linear(half, 4, GROUP, False, scales.t().contiguous(), zeros.t().contiguous())


def gptqmodel(half: nn.Linear, scales: torch.Tensor, zeros: torch.Tensor) -> Any:
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    layer = module.AwqTorchLinear(
        4, GROUP, False, False, in_features=SHAPE[1], out_features=SHAPE[0], bias=False, register_buffers=True
    )
    layer.pack(half, scales, zeros)
    return layer


@pytest.mark.parametrize("make", [autoawq, gptqmodel])
def test_awq(make: Any) -> None:
    half = linear(SHAPE).half()
    _, scales, zeros = encoders.choose(half.weight.detach(), 4, GROUP)
    layer = make(half, scales, zeros)
    unpacked = pytest.importorskip("awq.utils.packing_utils").dequantize_gemm
    truth = unpacked(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).t()
    assert truth.dtype == torch.float16
    (made,) = dense_copy(nn.Sequential(layer), torch.float16)
    assert type(made) is nn.Linear
    assert torch.equal(made.weight, truth)


@pytest.mark.parametrize("name", CASES)
def test_every_format(name: str) -> None:
    case = CASES[name]
    layer = quantized(case, linear(case.shapes[0]))
    truth = case.truth(layer)
    (made,) = dense_copy(nn.Sequential(layer), torch.float32)
    assert type(made) is nn.Linear
    assert type(made.weight) is nn.Parameter
    assert torch.equal(made.weight.to(truth.dtype), truth)


def test_codes_that_no_codec_reads() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qweight = nn.Buffer(torch.ones(8, 8, dtype=torch.int32))

    with pytest.raises(ModelError, match=r"0 is a Unknown, which no codec decodes"):
        dense_copy(nn.Sequential(Unknown()))
