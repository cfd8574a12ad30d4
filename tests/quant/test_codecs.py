"""Every codec decodes what the owning library decodes, bit for bit, with the reference and with the kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastplug.manager import manager
from fastplug.ops.float_weights import kernel as float_kernel
from fastplug.ops.float_weights import reference as float_reference
from fastplug.ops.int_weights import kernel as int_kernel
from fastplug.ops.int_weights import reference as int_reference
from fastplug.options import Options
from fastplug.patching.sites import Runtime
from fastplug.quant import EncodedWeight
from tests.quant.cases import CASES, Case, compressed_truth, linear, quantized

pytestmark = pytest.mark.interpreter
OPS: dict[str, Any] = {
    "reference": SimpleNamespace(int_weights=int_reference, float_weights=float_reference),
    "kernel": SimpleNamespace(int_weights=int_kernel, float_weights=float_kernel),
}


def read(module: torch.nn.Module) -> tuple[Any, EncodedWeight]:
    runtime = Runtime(Options(), OPS["reference"], manager(False).collect("fastplug_codecs"))
    codec: Any = runtime.codec(module)
    assert codec is not None
    weight = codec.read(module)
    assert isinstance(weight, EncodedWeight), weight
    return codec, weight


@pytest.fixture(params=OPS)
def ops(request: pytest.FixtureRequest) -> Any:
    return OPS[request.param]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_decodes_to_the_bits_of_the_library(case: Case, ops: Any, device: torch.device) -> None:
    for shape in case.shapes:
        module = quantized(case, linear(shape, device))
        truth = case.truth(module)
        codec, weight = read(module)
        assert codec.name == case.codec
        assert weight.shape == shape == truth.shape
        assert weight.dense(torch.float32) is None
        dtypes = {torch.float32, torch.float16}
        if truth.dtype == torch.bfloat16:  # the library gives no other; what is exact in fp32 rounds to it
            out = torch.empty(shape, device=device)
            weight.decode(out, ops)
            assert torch.equal(out.to(torch.bfloat16), truth)
            continue
        for dtype in dtypes:
            out = torch.empty(shape, dtype=dtype, device=device)
            weight.decode(out, ops)
            assert torch.equal(out, truth.to(dtype))


def test_row_ranges_into_strided_rows(case: Case, ops: Any, device: torch.device) -> None:
    shape = case.shapes[0]
    _, weight = read(quantized(case, linear(shape, device)))
    whole = torch.empty(shape, device=device)
    weight.decode(whole, ops)
    buffer = torch.full((shape[0], shape[1] + 8), 7.0, device=device)
    for start, stop in ((0, 1), (2, 5), (shape[0] - 1, shape[0])):
        weight.decode(buffer[start:stop, :-8], ops, row_start=start)
        assert torch.equal(buffer[start:stop, :-8], whole[start:stop])
        buffer[start:stop, :-8] = 7.0
        assert (buffer == 7.0).all()


def test_reading_costs_no_copy(case: Case, device: torch.device) -> None:
    """A weight is read at every step: what is read are the module's own bytes."""
    module = quantized(case, linear(case.shapes[0], device))
    _, first = read(module)
    _, second = read(module)
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert one.data_ptr() == other.data_ptr()


def test_sound_weights_have_no_problems(case: Case, device: torch.device) -> None:
    module = quantized(case, linear(case.shapes[0], device))
    codec, weight = read(module)
    found = list(codec.problems(weight, module))
    assert found
    assert not any(bool(flag) for flag, _ in found)


def test_nvfp4_is_what_the_library_rounds_to_bf16(ops: Any, device: torch.device) -> None:
    module = quantized(CASES["compressed nvfp4"], linear((24, 96), device))
    out = torch.empty(24, 96, device=device)
    read(module)[1].decode(out, ops)
    assert torch.equal(out.to(torch.bfloat16), compressed_truth(module))
