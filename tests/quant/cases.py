"""Linear layers of every format, quantized by the library that owns it or, without it, by an encoder of the tests.

A case makes a quantized module of a plain linear layer and says, by the library's own decoding or by the documented
formula, which weight that module stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tests.quant import encoders


@dataclass(frozen=True)
class Case:
    """One format.

    Attributes:
        make: A quantized module of a plain layer (weights in fp32), on its device.
        truth: The weight that the module stands for, in the dtype in which the library gives it.
        codec: The name of the codec that is to read it.
        needs: The package without which there is no such module.
        forward: Whether the module itself can run on a CPU.
        shapes: Shapes of odd sizes that the format can hold.
    """

    make: Callable[[nn.Linear], nn.Module]
    truth: Callable[[Any], torch.Tensor]
    codec: str
    needs: str | None = None
    forward: bool = False
    shapes: tuple[tuple[int, int], ...] = field(default=((40, 64), (8, 192)))


def bias_of(linear: nn.Linear) -> nn.Parameter | None:
    return None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def bnb8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(linear.weight.device)


def bnb8_truth(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return int8_vectorwise_dequant(layer.weight.data, scales)


# --- FP8 as transformers holds it -------------------------------------------------------------------------------------


def to_fp8(weight: torch.Tensor, high: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and the scales of blocks, which multiply."""
    N, K = weight.shape
    padded = nn.functional.pad(weight, (0, -K % wide, 0, -N % high))
    blocks = padded.view(padded.shape[0] // high, high, -1, wide)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:N, :K].to(torch.float8_e4m3fn)
    return values.contiguous(), scales


def fine_grained(linear: nn.Linear, block: tuple[int, int] | None) -> nn.Module:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = module.FP8Linear(linear.in_features, linear.out_features, block_size=block)
    high, wide = block or linear.weight.shape
    values, scales = to_fp8(linear.weight.detach(), high, wide)
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales if block else scales.reshape(()), requires_grad=False)
    layer.bias = bias_of(linear)
    return layer.to(linear.weight.device)


def blocks_truth(layer: Any) -> torch.Tensor:
    """transformers' own: ``Fp8Dequantize`` multiplies in fp32."""
    scale, (N, K) = layer.weight_scale_inv.float(), layer.weight.shape
    if scale.dim():
        scale = scale.repeat_interleave(layer.block_size[0], 0)[:N].repeat_interleave(layer.block_size[1], 1)[:, :K]
    return layer.weight.float() * scale


def rows_fp8(linear: nn.Linear, module: str, name: str) -> nn.Module:
    kind = getattr(pytest.importorskip(f"transformers.integrations.{module}"), name, None)
    if kind is None:
        pytest.skip(f"this version of transformers has no {name}")
    layer = kind(linear.in_features, linear.out_features, False)
    values, scales = to_fp8(linear.weight.detach(), 1, linear.in_features)
    layer.weight = nn.Parameter(values, requires_grad=False)
    scales = scales.t().contiguous() if name.startswith("Compressed") else scales
    layer.weight_scale = nn.Parameter(scales, requires_grad=False)
    layer.bias = bias_of(linear)
    return layer.to(linear.weight.device)


def rows_truth(layer: Any) -> torch.Tensor:
    return layer.weight.float() * layer.weight_scale.reshape(-1, 1)


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def compressed(linear: nn.Linear, activations: bool = False, **arguments: Any) -> nn.Module:
    """Quantized by minimum and maximum and compressed by the library, with 8-bit activations or without."""
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    layer = copy.deepcopy(linear).requires_grad_(False)
    args = QuantizationArgs(**arguments)
    rounded = QuantizationArgs(num_bits=8, type=args.type, strategy="token", dynamic=True) if activations else None
    layer.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=rounded)
    initialize_module_for_quantization(layer, layer.quantization_scheme)
    weight, outer = layer.weight.detach(), None
    if args.strategy == "tensor_group":
        outer = generate_gparam(weight.min(), weight.max())
        layer.weight_global_scale.data.copy_(outer)
    if args.strategy == "block":
        high, wide = args.block_structure
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % wide, 0, -weight.shape[0] % high))
        grouped = padded.view(padded.shape[0] // high, high, -1, wide).transpose(1, 2).flatten(2)
    elif args.strategy in ("group", "tensor_group"):
        grouped = weight.unflatten(1, (-1, args.group_size))
    else:
        grouped = weight[:, None] if args.strategy == "channel" else weight.flatten()[None, None]
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=outer)
    layer.weight_scale.data = scale.reshape(layer.weight_scale.shape).to(layer.weight_scale.dtype)
    if args.symmetric:
        layer.weight_zero_point.data.zero_()
    else:
        layer.weight_zero_point.data = zero.round().reshape(layer.weight_zero_point.shape).to(torch.int8)
    compress_module(layer)
    layer.__dict__.pop("forward", None)
    return layer


def compressed_truth(layer: Any) -> torch.Tensor:
    from compressed_tensors.compressors.base import decompress_module

    twin = copy.deepcopy(layer)
    decompress_module(twin)
    return twin.weight.detach()


def nvfp4_truth(layer: Any) -> torch.Tensor:
    """By the library's functions in fp32; :func:`compressed_truth` is the same, rounded to bf16."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    values = unpack_fp4_from_uint8(layer.weight_packed, layer.out_features, layer.in_features, torch.float32)
    return dequantize(
        values,
        layer.weight_scale.float(),
        args=layer.quantization_scheme.weights,
        global_scale=layer.weight_global_scale,
        dtype=torch.float32,
    )


def ct(**arguments: Any) -> Callable[[nn.Linear], nn.Module]:
    return lambda x: compressed(x, **arguments)


# --- GPTQ and AWQ: stand-ins for the layers of GPTQModel and AutoAWQ, packed as their formats are documented ----------


class Integers(nn.Linear):
    """What GPTQModel's and AutoAWQ's layers have in common, with a forward by the formula of their documentation."""

    def __init__(self, linear: nn.Linear, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.bias = bias_of(linear)
        self.known = (codes, zeros, scales)
        self.adapter = None

    @property
    def weight(self) -> Any:
        return self.qweight

    def dense(self) -> torch.Tensor:
        codes, zeros, scales = self.known
        group: Any = self.g_idx.cpu() if hasattr(self, "g_idx") else self.group_size
        values = (codes - encoders.spread(zeros, group)).to(scales.dtype) * encoders.spread(scales, group)
        return values.to(self.qweight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


class TorchLinear(Integers):
    def qzero_format(self) -> int:
        return self.version


class WQLinear_GEMM(Integers):
    pass


TorchLinear.__module__ = "gptqmodel.nn_modules.qlinear.torch"
WQLinear_GEMM.__module__ = "awq.modules.linear.gemm"


def gptq(linear: nn.Linear, bits: int = 4, group: int = 32, version: int = 1, act_order: bool = False) -> nn.Module:
    weight = linear.weight.detach().cpu().half()
    order = torch.randperm(weight.shape[1]) if act_order else torch.arange(weight.shape[1])
    codes, scales, zeros = encoders.choose(weight[:, order], bits, group)
    back = torch.argsort(order)
    layer = TorchLinear(linear, codes[:, back], zeros, scales)
    layer.bits, layer.group_size, layer.version, layer.pack_dtype = bits, group, version, torch.int32
    layer.desc_act = act_order
    layer.qweight = nn.Buffer(encoders.stream(codes[:, back], bits).t().contiguous())
    layer.qzeros = nn.Buffer(encoders.stream((zeros.t() - int(version == 1)) % 2**bits, bits))
    layer.scales = nn.Buffer(scales.t().contiguous())
    layer.g_idx = nn.Buffer((back // group).int())
    return layer.to(linear.weight.device)


def awq(linear: nn.Linear, group: int = 32) -> nn.Module:
    codes, scales, zeros = encoders.choose(linear.weight.detach().cpu().half(), 4, group)
    layer = WQLinear_GEMM(linear, codes, zeros, scales)
    layer.w_bit, layer.group_size = 4, group
    layer.qweight = nn.Buffer(encoders.awq(codes.t()))
    layer.qzeros = nn.Buffer(encoders.awq(zeros.t()))
    layer.scales = nn.Buffer(scales.t().contiguous())
    return layer.to(linear.weight.device)


def gptqmodel(linear: nn.Linear, bits: int, act_order: bool) -> nn.Module:
    """The library's own layer, packed by itself."""
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    weight, group = linear.weight.detach().cpu(), 32
    (N, K), half = weight.shape, copy.deepcopy(linear).cpu().half()
    order = torch.randperm(K) if act_order else torch.arange(K)
    _, scales, zeros = encoders.choose(half.weight.detach()[:, order], bits, group)
    layer = module.TorchLinear(
        bits, group, False, act_order, in_features=K, out_features=N, bias=False, register_buffers=True
    )
    layer.pack_original(half, scales.float(), zeros.float(), (torch.argsort(order) // group).int())
    layer.qzero_format(2)
    return layer.to(linear.weight.device)


# --- HQQ and torchao --------------------------------------------------------------------------------------------------


def hqq(linear: nn.Linear, nbits: int = 4, group: int = 32, axis: int = 1, **options: Any) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=nbits, group_size=group, axis=axis, **options)
    dtype = linear.weight.dtype
    return quantize.HQQLinear(
        copy.deepcopy(linear), config, compute_dtype=dtype, device=str(linear.weight.device), del_orig=False
    )


def torchao(linear: nn.Linear, config: str, **options: Any) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = copy.deepcopy(linear).requires_grad_(False)
    if "group" in options:
        options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(options["group"])}
    quantization.quantize_(layer, getattr(quantization, config)(**options))
    if type(layer.weight).__name__ == "AffineQuantizedTensor":
        pytest.skip(f"this torchao still makes its former kind of tensors of {config}, which are refused by name")
    return layer


def gptqmodel_truth(layer: Any) -> torch.Tensor:
    layer._init_wf_unsqueeze_buffers()
    return layer.dequantize_weight().t()


def dequantized(layer: Any) -> torch.Tensor:
    return (layer if hasattr(layer, "W_q") else layer.weight).dequantize()


CASES = {
    "bitsandbytes int8": Case(bnb8, bnb8_truth, "bitsandbytes-8bit", "bitsandbytes", True, ((9, 77), (40, 64))),
    "fp8 blocks": Case(lambda x: fine_grained(x, (128, 128)), blocks_truth, "fp8", shapes=((9, 77), (200, 300))),
    "fp8 small blocks": Case(lambda x: fine_grained(x, (16, 32)), blocks_truth, "fp8", shapes=((9, 77), (64, 64))),
    "fp8 tensor": Case(lambda x: fine_grained(x, None), blocks_truth, "fp8", shapes=((9, 77),)),
    "fp8 rows, fbgemm": Case(
        lambda x: rows_fp8(x, "fbgemm_fp8", "FbgemmFp8Linear"), rows_truth, "fp8", shapes=((9, 77),)
    ),
    "fp8 rows, compressed": Case(
        lambda x: rows_fp8(x, "compressed_tensors", "CompressedTensorsFP8Linear"), rows_truth, "fp8", shapes=((9, 77),)
    ),
    "gptq": Case(gptq, Integers.dense, "gptq", forward=True, shapes=((40, 64), (24, 192))),
    "gptq v2": Case(lambda x: gptq(x, version=2), Integers.dense, "gptq"),
    "gptq 2 bits": Case(lambda x: gptq(x, 2), Integers.dense, "gptq"),
    "gptq 3 bits": Case(lambda x: gptq(x, 3), Integers.dense, "gptq", shapes=((32, 64), (64, 96))),
    "gptq 8 bits": Case(lambda x: gptq(x, 8, 64), Integers.dense, "gptq"),
    "gptq, act-order": Case(lambda x: gptq(x, act_order=True), Integers.dense, "gptq", forward=True),
    "gptqmodel": Case(lambda x: gptqmodel(x, 4, False), gptqmodel_truth, "gptq", "gptqmodel"),
    "gptqmodel, act-order": Case(lambda x: gptqmodel(x, 4, True), gptqmodel_truth, "gptq", "gptqmodel"),
    "gptqmodel 3 bits": Case(lambda x: gptqmodel(x, 3, True), gptqmodel_truth, "gptq", "gptqmodel", shapes=((32, 64),)),
    "awq": Case(awq, Integers.dense, "awq", forward=True),
    "hqq": Case(hqq, dequantized, "hqq", "hqq", True),
    "hqq axis 0": Case(lambda x: hqq(x, group=16, axis=0), dequantized, "hqq", "hqq", True, ((16, 64), (48, 40))),
    "hqq 8 bits": Case(lambda x: hqq(x, 8), dequantized, "hqq", "hqq"),
    "hqq 3 bits": Case(lambda x: hqq(x, 3), dequantized, "hqq", "hqq"),
    "hqq 3 bits, axis 0": Case(lambda x: hqq(x, 3, 16, 0), dequantized, "hqq", "hqq", shapes=((16, 64), (48, 40))),
    "hqq 2 bits": Case(lambda x: hqq(x, 2, 16), dequantized, "hqq", "hqq"),
    "hqq 1 bit": Case(lambda x: hqq(x, 1, 32), dequantized, "hqq", "hqq"),
    "hqq as floats": Case(lambda x: hqq(x, view_as_float=True), dequantized, "hqq", "hqq"),
    "torchao int8": Case(
        lambda x: torchao(x, "Int8WeightOnlyConfig"), dequantized, "torchao", "torchao", True, ((9, 77),)
    ),
    "torchao intx": Case(lambda x: torchao(x, "IntxWeightOnlyConfig", group=32), dequantized, "torchao", "torchao"),
    "torchao float8": Case(
        lambda x: torchao(x, "Float8WeightOnlyConfig"), dequantized, "torchao", "torchao", True, ((9, 77),)
    ),
}
COMPRESSED: dict[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "w8a8": ({"num_bits": 8, "strategy": "channel", "activations": True}, ((9, 77),)),
    "w8a8 zeros": ({"num_bits": 8, "strategy": "channel", "activations": True, "symmetric": False}, ((9, 77),)),
    "int8 rows": ({"num_bits": 8, "strategy": "channel"}, ((9, 77),)),
    "int8 tensor": ({"num_bits": 8, "strategy": "tensor"}, ((9, 77),)),
    "int4 groups": ({"num_bits": 4, "strategy": "group", "group_size": 32}, ((5, 96),)),
    "int4 rows": ({"num_bits": 4, "strategy": "channel"}, ((5, 77),)),
    "int4 zeros": ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, ((11, 96),)),
    "int3 groups": ({"num_bits": 3, "strategy": "group", "group_size": 32}, ((5, 96),)),
    "fp8 tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, ((9, 77),)),
    "fp8 rows": ({"num_bits": 8, "type": "float", "strategy": "channel"}, ((9, 77),)),
    "fp8 blocks": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}, ((9, 77), (200, 300)),
    ),
    "mxfp8": (
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}, ((5, 96),),
    ),
    "mxfp4": (
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}, ((5, 96),),
    ),
    "nvfp4": (
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": torch.float8_e4m3fn}, ((5, 96),),
    ),
}  # fmt: skip
for _name, (_arguments, _shapes) in COMPRESSED.items():
    _truth = nvfp4_truth if _name == "nvfp4" else compressed_truth
    _case = Case(ct(**_arguments), _truth, "compressed-tensors", "compressed_tensors", shapes=_shapes)
    CASES[f"compressed {_name}"] = _case


def quantized(case: Case, linear: nn.Linear) -> Any:
    """The module of a case; skips the test where its library is not installed."""
    if case.needs is not None:
        pytest.importorskip(case.needs)
    return case.make(linear)


def linear(shape: tuple[int, int], device: torch.device | str = "cpu", bias: bool = False) -> nn.Linear:
    """A plain layer with random weights, a few rows of which are much larger."""
    layer = nn.Linear(shape[1], shape[0], bias=bias, device=device)
    with torch.no_grad():
        layer.weight.normal_().mul_(0.05)
        layer.weight[::7] *= 20
    return layer
