"""Integer weights: the reference and the kernel give the bits of the formula in the dtype of the scales."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from fastplug.ops.int_weights import Layout, kernel, reference
from tests.quant import encoders

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates instead of rounding
pytestmark = pytest.mark.interpreter

Case = tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def random(shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Codes, scales and zero points of random values, all of which occur."""
    N, K = shape
    groups = -(-K // group)
    codes, zeros = torch.randint(0, 2**bits, (N, K)), torch.randint(0, 2**bits, (N, groups))
    return codes, (torch.randn(N, groups) * 0.01).to(dtype), zeros


def case(name: str, dtype: torch.dtype, shape: tuple[int, int] = (16, 64), group: int = 32, bits: int = 4) -> Case:
    """``(codes, scales, layout), keywords, truth``; the truth has the dtype of the scales."""
    N, K = shape
    codes, scales, zeros = random(shape, bits, group, dtype)
    half = 1 << (bits - 1)
    layout, keywords = Layout(shape, bits, group=group), {}
    wide = [values.repeat_interleave(group, 1)[:, :K] for values in (scales, zeros)]
    truth = codes.to(dtype) * wide[0]
    if name == "unsigned":
        packed = encoders.stream(codes, bits)
    elif name == "offset":
        packed, layout = encoders.stream(codes, bits), layout._replace(sign="offset")
        truth = (codes - half).to(dtype) * wide[0]
    elif name == "twos":
        packed, layout = encoders.stream((codes - half) & (2**bits - 1), bits), layout._replace(sign="twos")
        truth = (codes - half).to(dtype) * wide[0]
    elif name == "row zeros":  # compressed-tensors: zero points packed over the rows
        packed, layout = encoders.stream(codes, bits), layout._replace(packed_zeros=True)
        keywords["zeros"] = encoders.stream(zeros.t(), bits).t()
        truth = (codes - wide[1]).to(dtype) * wide[0]
    elif name in ("gptq", "act-order"):
        packed = encoders.stream(codes, bits).t().contiguous()
        layout = layout._replace(packing="input", packed_zeros=True, zero_plus_one=True)
        keywords["zeros"] = encoders.stream((zeros - 1).t() % 2**bits, bits).t()
        if name == "act-order":
            keywords["g_idx"] = torch.randint(0, scales.shape[1], (K,), dtype=torch.int32)
            wide = [encoders.spread(values, keywords["g_idx"]) for values in (scales, zeros)]
        truth = (codes - wide[1]).to(dtype) * wide[0]
        scales = scales.t().contiguous().t()
    elif name == "act-order, rows":  # compressed-tensors
        packed, layout = encoders.stream(codes, bits), layout._replace(sign="offset")
        keywords["g_idx"] = torch.randint(0, scales.shape[1], (K,), dtype=torch.int32)
        keywords["zeros"] = (zeros - half).to(torch.int8)
        wide = [encoders.spread(values, keywords["g_idx"]) for values in (scales, zeros)]
        truth = (codes - wide[1]).to(dtype) * wide[0]
    elif name == "awq":
        packed, layout = encoders.awq(codes.t()), layout._replace(packing="output", packed_zeros=True)
        keywords["zeros"] = encoders.awq(zeros.t()).t()
        truth = (codes - wide[1]).to(dtype) * wide[0]
        scales = scales.t().contiguous().t()
    elif name in ("split", "split, whole groups"):  # hqq itself cuts the codes into parts of whole groups
        padding = -codes.numel() % (32 // bits * group) if name != "split" else 0
        flat = torch.nn.functional.pad(codes.flatten(), (0, padding))
        packed, layout = encoders.split(flat, bits, 32 if bits == 3 else 8), layout._replace(packing="split")
        keywords["zeros"] = (zeros + torch.rand(zeros.shape)).to(dtype)  # HQQ's are no integers
        truth = (codes.to(dtype) - keywords["zeros"].repeat_interleave(group, 1)) * wide[0]
    elif name == "split, over rows":  # HQQ's axis 0: every column has scales of its own, for rows that lie apart
        packed = encoders.split(codes.flatten(), bits, 32 if bits == 3 else 8)
        layout = layout._replace(packing="split", group=1)
        scales, keywords["zeros"] = ((torch.rand(N // 4, K) + 0.5).to(dtype) for _ in range(2))
        truth = (codes.to(dtype) - keywords["zeros"].repeat(4, 1)) * scales.repeat(4, 1)
    elif name == "added zeros":
        packed, layout = encoders.stream(codes, bits), layout._replace(sign="offset", add_zero=True)
        keywords["zeros"] = torch.randn(scales.shape).to(dtype)
        truth = (codes - half).to(dtype) * wide[0] + keywords["zeros"].repeat_interleave(group, 1)[:, :K]
    else:
        raise AssertionError(name)
    return (packed, scales, layout), keywords, truth


def to(device: torch.device, value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda item: item.to(device) if torch.is_tensor(item) else item, value)


CASES = {
    "unsigned": {}, "offset": {}, "twos": {}, "row zeros": {}, "gptq": {}, "act-order": {}, "awq": {}, "split": {},
    "split, over rows": {}, "added zeros": {}, "act-order, rows": {},
}  # fmt: skip
ODD = [
    ("offset", {"shape": (5, 77), "group": 77}), ("offset", {"shape": (9, 40), "group": 16}),
    ("row zeros", {"shape": (11, 72), "group": 24}), ("gptq", {"shape": (9, 72), "group": 24}),
    ("act-order", {"shape": (3, 136), "group": 34}), ("awq", {"shape": (24, 37), "group": 37}),
    ("split", {"shape": (6, 48), "group": 16}), ("split", {"shape": (5, 48), "group": 16}),
    ("twos", {"shape": (9, 77), "group": 77, "bits": 8}), ("twos", {"shape": (3, 130), "group": 65, "bits": 8}),
    ("gptq", {"bits": 2}), ("gptq", {"bits": 3}), ("gptq", {"bits": 8}), ("row zeros", {"bits": 3, "shape": (9, 50)}),
    ("offset", {"bits": 5, "shape": (4, 50)}), ("offset", {"bits": 7, "shape": (4, 33)}), ("offset", {"bits": 1}),
    ("split", {"bits": 1}), ("split", {"bits": 2}), ("split", {"bits": 3}), ("split", {"bits": 3, "shape": (20, 32)}),
    ("split", {"bits": 8}), ("split, over rows", {"bits": 2}), ("gptq", {"shape": (40, 256), "group": 128}),
    ("awq", {"shape": (72, 256), "group": 128}), ("split", {"shape": (64, 256), "group": 64}),
    ("split", {"bits": 3, "shape": (14, 128), "group": 64}), ("split", {"bits": 3, "shape": (7, 33), "group": 33}),
    ("split, whole groups", {"bits": 3, "shape": (14, 128), "group": 64}),
    ("gptq", {"bits": 3, "shape": (40, 256), "group": 128}), ("act-order", {"bits": 3}), ("act-order", {"bits": 8}),
    ("act-order", {"bits": 2, "shape": (72, 256)}), ("act-order, rows", {"bits": 8, "shape": (40, 77), "group": 11}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("name", CASES)
def test_bit_exact(op: ModuleType, device: torch.device, name: str, dtype: torch.dtype) -> None:
    weight, keywords, truth = to(device, case(name, dtype))
    out = torch.empty_like(truth)
    op.decode(*weight, out, **keywords)
    assert torch.equal(out, truth)


@pytest.mark.parametrize(("name", "form"), ODD, ids=str)
def test_odd_shapes_and_widths(op: ModuleType, device: torch.device, name: str, form: dict[str, Any]) -> None:
    weight, keywords, truth = to(device, case(name, torch.float16, **form))
    out = torch.empty_like(truth)
    op.decode(*weight, out, **keywords)
    assert torch.equal(out, truth)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pad", [1, 8])
def test_row_range_into_strided_rows_of_another_dtype(
    op: ModuleType, device: torch.device, name: str, pad: int
) -> None:
    weight, keywords, truth = to(device, case(name, torch.float16))
    buffer = torch.full((16, 64 + pad), 7.0, device=device)
    for row_start in (3, 8):
        op.decode(*weight, buffer[1:6, :-pad], row_start=row_start, **keywords)
        assert torch.equal(buffer[1:6, :-pad], truth[row_start : row_start + 5].float())
        buffer[1:6, :-pad] = 7.0
        assert (buffer == 7.0).all()
    op.decode(*weight, buffer[:0, :-pad], row_start=16, **keywords)


def test_factor_is_applied_last(op: ModuleType, device: torch.device) -> None:
    """As LLM.int8() does: the scaled value is rounded before."""
    (codes, scales, layout), _, _ = to(device, case("twos", torch.float32, (40, 96), 96, 8))
    out = torch.empty(40, 96, device=device)
    op.decode(codes, scales, layout._replace(factor=7.874015718698502e-3), out)
    assert torch.equal(out, codes.view(torch.int8).view(40, 96) * scales * 7.874015718698502e-3)


def test_what_does_not_fit_is_refused(op: ModuleType, device: torch.device) -> None:
    (codes, scales, layout), keywords, truth = to(device, case("gptq", torch.float16))
    out = torch.empty_like(truth)
    with pytest.raises(ValueError, match="rows 1"):
        op.decode(codes, scales, layout, out, row_start=1, **keywords)
    with pytest.raises(ValueError, match="take 512 bytes, there are 448"):
        op.decode(codes[:-1], scales, layout, out, **keywords)
    with pytest.raises(ValueError, match="do not fit 16 x 64 in groups of 24"):
        op.decode(codes, scales, layout._replace(group=24), out, **keywords)
    with pytest.raises(ValueError, match="zero points of shape"):
        op.decode(codes, scales, layout, out, zeros=keywords["zeros"][:1])
    with pytest.raises(ValueError, match="g_idx has 3 entries for 64 columns"):
        op.decode(codes, scales, layout, out, g_idx=torch.zeros(3, dtype=torch.int32, device=device), **keywords)
    with pytest.raises(ValueError, match="scales have dtype"):
        op.decode(codes, scales.double(), layout, out, **keywords)


def test_custom_op(device: torch.device) -> None:
    (codes, scales, (N, *layout)), keywords, truth = to(device, case("gptq", torch.float16))
    out = torch.empty_like(truth)
    torch.library.opcheck(kernel.int_decode.op, (codes, scales, keywords["zeros"], None, out, N[0], *layout, 0))
