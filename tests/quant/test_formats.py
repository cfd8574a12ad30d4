"""Weights read from the tensors of files: what the libraries decode, and clear errors for what is damaged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastplug.errors import ModelError
from fastplug.ops.float_weights import reference as float_reference
from fastplug.ops.int_weights import reference as int_reference
from fastplug.quant.formats import encoded_from_tensors, quantized_weights
from tests.quant import encoders
from tests.quant.cases import CASES, COMPRESSED, linear, quantized

NAME = "model.layers.0.mlp.up_proj"
OPS: Any = SimpleNamespace(int_weights=int_reference, float_weights=float_reference)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def config(case: str) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose layers are like those of a case."""
    if case.startswith("compressed"):
        arguments = dict(COMPRESSED[case.removeprefix("compressed ")][0])
        arguments = {key: value for key, value in arguments.items() if key not in ("scale_dtype", "activations")}
        group = {"targets": ["re:.*up_proj"], "weights": {"type": "int", "symmetric": True, **arguments}}
        other = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 2, "type": "int", "group_size": 8}}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": other, "group_1": group}}
    return {
        "bitsandbytes int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8 small blocks": {"quant_method": "fp8", "weight_block_size": [16, 32]},
        "fp8 tensor": {"quant_method": "fp8", "weight_block_size": None},
        "fp8 rows, fbgemm": {"quant_method": "fbgemm_fp8"},
        "gptq": GPTQ,
        "gptq v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
        "gptq 2 bits": {**GPTQ, "bits": 2},
        "gptq 3 bits": {**GPTQ, "dynamic": {r"-:.*down": {}, r"+:.*up_proj": {"bits": 3}}},
        "gptq 8 bits": {**GPTQ, "bits": 8, "group_size": 64},
        "gptq, act-order": {**GPTQ, "desc_act": True},
        "awq": AWQ,
        "hqq": {"quant_method": "hqq"},
        "hqq axis 0": {"quant_method": "hqq"},
        "hqq 3 bits": {"quant_method": "hqq"},
        "hqq as floats": {"quant_method": "hqq"},
        "torchao int8": {"quant_method": "torchao"},
        "torchao intx": {"quant_method": "torchao"},
        "torchao float8": {"quant_method": "torchao"},
    }[case]


def stored(case: str, shape: tuple[int, int] | None = None) -> tuple[dict[str, Any], dict[str, str], torch.Tensor]:
    """``(tensors, metadata, truth)`` of a layer in a file, beside a tensor of another one."""
    made = CASES[case]
    layer = quantized(made, linear(shape or made.shapes[0]))
    if case.startswith("torchao"):
        support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
        tensors, metadata = support.flatten_tensor_state_dict({f"{NAME}.weight": layer.weight.data})
    else:
        tensors = {f"{NAME}.{key}": value for key, value in layer.state_dict().items() if torch.is_tensor(value)}
        metadata = {}
    return {**tensors, f"{NAME}s.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}, metadata, made.truth(layer)


NAMES = [
    name for name in CASES
    if name not in ("fp8 rows, compressed", "hqq 8 bits", "hqq 3 bits, axis 0", "hqq 2 bits", "hqq 1 bit")
    and not name.startswith("gptqmodel")
]  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_a_file_holds_what_the_library_decodes(case: str) -> None:
    for shape in CASES[case].shapes:
        tensors, metadata, truth = stored(case, shape)
        found = quantized_weights(tensors, config(case))
        assert list(found) == [NAME]
        needed = {key: tensors[key] for key in found[NAME]}
        weight = encoded_from_tensors(NAME, needed, config(case), metadata)
        assert weight.shape == shape
        out = torch.empty(shape)
        weight.decode(out, OPS)
        assert torch.equal(out.to(truth.dtype), truth)
        assert all(any(part.data_ptr() == given.data_ptr() for given in tensors.values()) for part in weight.tensors)


def test_mxfp4_is_what_transformers_decodes() -> None:
    """gpt-oss: blocks and scales of an expert, whose matrix transformers gives transposed."""
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (24, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (24, 3), dtype=torch.uint8)
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
    assert quantized_weights(tensors, {"quant_method": "mxfp4"}) == {NAME: sorted(tensors)}
    weight = encoded_from_tensors(NAME, tensors, {"quant_method": "mxfp4"})
    out = torch.empty(24, 96)
    weight.decode(out, OPS)
    truth = module.convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].t()
    assert torch.equal(out, truth)
    with pytest.raises(ModelError, match=r"give one expert's \[rows, groups, 16\]"):
        encoded_from_tensors(NAME, {f"{NAME}_blocks": blocks[None], f"{NAME}_scales": scales[None]},
                             {"quant_method": "mxfp4"})  # fmt: skip


def test_modelopt() -> None:
    """NVFP4 multiplies with its second scale; FP8 has one scale."""
    packed = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    scales, outer = (torch.rand(8, 4) * 400).to(torch.float8_e4m3fn), torch.tensor(0.00123)
    tensors = {f"{NAME}.weight": packed, f"{NAME}.weight_scale": scales, f"{NAME}.weight_scale_2": outer}
    weight = encoded_from_tensors(NAME, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    out = torch.empty(8, 64)
    weight.decode(out, OPS)
    values = torch.tensor(float_reference.E2M1)[torch.stack((packed & 15, packed >> 4), -1).flatten(1).int()]
    assert torch.equal(out, values * (scales.float() * outer).repeat_interleave(16, 1))
    fp8 = torch.randn(8, 64).to(torch.float8_e4m3fn)
    tensors = {f"{NAME}.weight": fp8, f"{NAME}.weight_scale": torch.tensor(0.5)}
    encoded_from_tensors(NAME, tensors, {"quant_method": "modelopt", "quant_algo": "FP8"}).decode(out, OPS)
    assert torch.equal(out, fp8.float() * 0.5)


def test_torchao_int4_by_its_formula() -> None:
    """Codes of two's complement times the scale, plus a zero point; torchao itself makes them on GPUs only."""
    codes = torch.randint(-8, 8, (16, 64))
    scales, zeros = torch.rand(2, 16), torch.randn(2, 16)
    tensors = {
        f"{NAME}._weight_qdata": encoders.stream(codes & 15, 4).view(torch.uint8).clone(),
        f"{NAME}._weight_scale": scales, f"{NAME}._weight_zero_point": zeros,
    }  # fmt: skip
    described = {f"{NAME}.weight": '{"_type": "Int4Tensor", "_data": {"block_size": [1, 32]}}'}
    weight = encoded_from_tensors(NAME, tensors, {"quant_method": "torchao"}, described)
    out = torch.empty(16, 64)
    weight.decode(out, OPS)
    wide = [values.t().repeat_interleave(32, 1) for values in (scales, zeros)]
    assert torch.equal(out, codes * wide[0] + wide[1])


# --- what is damaged --------------------------------------------------------------------------------------------------


def cut(key: str, size: int) -> Any:
    return lambda tensors: tensors.update({key: tensors[key][:size]})


def fill(key: str, value: float) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        tensors[key] = tensors[key].clone().fill_(value)

    return change


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("gptq", lambda t: t.pop("scales"), {}, r"there is no scales .*truncated"),
    ("gptq", cut("scales", 1), {}, "do not fit 40 x 64 in groups of 32"),
    ("gptq", cut("qweight", 7), {}, "take 1280 bytes, there are 1120"),
    ("gptq", cut("qzeros", 1), {}, "zero points of shape"),
    ("gptq", fill("scales", torch.nan), {}, "scales that are NaN or infinite: the file is damaged"),
    ("gptq", lambda t: None, {"group_size": 24}, "groups of 24 do not divide"),
    ("gptq", lambda t: None, {"group_size": -2}, "a group of -2 columns"),
    ("gptq", lambda t: None, {"bits": 5}, "bytes, there are"),
    ("gptq", lambda t: None, {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ("gptq", lambda t: t.pop("g_idx"), {"desc_act": True}, "has no g_idx"),
    ("gptq, act-order", lambda t: None, {"group_size": 33}, "groups of 33 do not divide 64 columns"),
    ("gptq, act-order", fill("g_idx", 2), {}, r"groups \(g_idx\) beyond the 2"),
    ("awq", lambda t: None, {"version": "gemv"}, "in version 'gemv'"),
    ("awq", cut("qzeros", 1), {}, "zero points of shape"),
    ("fp8 blocks", cut("weight_scale_inv", 0), {}, "scales of shape"),
    ("fp8 blocks", fill("weight_scale_inv", torch.inf), {}, "NaN or infinite"),
    ("fp8 blocks", lambda t: t.pop("weight_scale_inv"), {}, "there is no weight_scale"),
    ("fp8 blocks", lambda t: t.update(weight=t["weight"].float()), {}, "not FP8"),
    ("fp8 small blocks", lambda t: None, {"weight_block_size": [16, 16]}, "in blocks of 16 x 16"),
    ("fp8 small blocks", lambda t: None, {"weight_block_size": [0, 16]}, "cannot share a scale|in blocks of 0 x 16"),
    ("bitsandbytes int8", cut("SCB", 3), {}, r"with \(3,\) scales are not LLM.int8"),
    ("bitsandbytes int8", lambda t: t.update(weight=t["weight"].float()), {}, "torch.float32"),
    ("compressed int4 groups", cut("weight_packed", 4), {}, "bytes, there are"),
    ("compressed nvfp4", lambda t: t.pop("weight_scale"), {}, "has no weight_scale"),
    ("compressed nvfp4", fill("weight_global_scale", 0.0), {}, "a second scale that is zero"),
    ("compressed mxfp4", lambda t: t.update(weight_scale=t["weight_scale"][:, :1]), {}, "scales of shape"),
    ("compressed int8 rows", lambda t: None, {"sparsity_config": {"format": "sparse-24"}}, "sparse as well"),
    ("compressed int8 rows", lambda t: None, {"config_groups": {}}, "no group of its quantization_config"),
]


@pytest.mark.parametrize(("case", "change", "options", "message"), BAD, ids=[f"{b[0]}: {b[3]}" for b in BAD])
def test_damage_is_named(case: str, change: Any, options: dict[str, Any], message: str) -> None:
    tensors, metadata, _ = stored(case)
    own = {key.removeprefix(f"{NAME}."): value for key, value in tensors.items() if key.startswith(f"{NAME}.")}
    change(own)
    given = {f"{NAME}.{key}": value for key, value in own.items()}
    with pytest.raises(ModelError, match=message) as caught:
        encoded_from_tensors(NAME, given, {**config(case), **options}, metadata)
    assert NAME in str(caught.value)


def test_tensors_that_are_nothing_like_the_format() -> None:
    odd = {f"{NAME}.{key}": torch.ones(()) for key in ("qweight", "qzeros", "scales", "weight", "weight_scale_inv")}
    for options in (GPTQ, AWQ, {"quant_method": "fp8"}):
        with pytest.raises(ModelError, match=NAME):
            encoded_from_tensors(NAME, odd, options)


def test_a_format_that_is_not_read() -> None:
    with pytest.raises(ModelError, match="quantized with aqlm cannot be read from files; these can: bitsandbytes_8bit"):
        quantized_weights([], {"quant_method": "aqlm"})


def test_another_version_of_torchao() -> None:
    described = {f"{NAME}.weight": '{"_type": "Int8Tensor", "_data": {"block_size": [1, 64]}}'}
    tensors = {f"{NAME}._weight_{key}": torch.ones(8, 64, dtype=torch.int8) for key in ("qdata", "scale", "sparsity")}
    with pytest.raises(ModelError, match="Int8Tensor holds qdata, scale, sparsity, which is not known here"):
        encoded_from_tensors(NAME, tensors, {"quant_method": "torchao"}, described)
    with pytest.raises(ModelError, match="pass metadata="):
        encoded_from_tensors(NAME, tensors, {"quant_method": "torchao"})
