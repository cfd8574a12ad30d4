"""4-bit decoding: bit for bit what bitsandbytes decodes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.nf4 import kernel, nf4_linear, reference

bnb = pytest.importorskip("bitsandbytes.functional")

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates instead of rounding
DTYPES = [torch.float32, torch.float16, BF16]
SHAPES = [(6, 128), (10, 72), (5, 77), (33, 2), (1, 1), (3, 448)]

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def quantize(shape, device, dtype=torch.float32, quant_type="nf4", blocksize=64, double=True):
    """``(packed, absmax, code, blocksize), nested, truth``, quantized and decoded by bitsandbytes."""
    weight = torch.randn(shape, device=device, dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, None, None, blocksize, double, quant_type)
    nested = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if double else None
    # One long row: the CPU kernel of bitsandbytes 0.50 takes wrong scales where a block spans two rows.
    state.shape = torch.Size([weight.numel()])
    truth = bnb.dequantize_4bit(packed, state).reshape(shape)
    return (packed, state.absmax, state.code, blocksize), nested, truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_exact(op, device, dtype, quant_type, double, blocksize, shape):
    weight, nested, truth = quantize(shape, device, dtype, quant_type, blocksize, double)
    out = torch.empty(shape, device=device, dtype=dtype)
    op.decode(*weight, out, nested=nested)
    assert torch.equal(out, truth)


def test_reference_is_exact_in_bf16(device):
    weight, nested, truth = quantize((10, 72), device, torch.bfloat16)
    out = torch.empty_like(truth)
    reference.decode(*weight, out, nested=nested)
    assert torch.equal(out, truth)
    packed, absmax, code, blocksize = weight
    definition = reference.decode_weight(packed, absmax, code, blocksize, (10, 72), torch.bfloat16, nested)
    assert torch.equal(definition, truth)


@pytest.mark.parametrize("pad", [1, 8, 16])
@pytest.mark.parametrize("shape", [(40, 128), (9, 77), (20, 72)], ids=str)
def test_row_range_into_strided_rows(op, device, pad, shape):
    weight, nested, truth = quantize(shape, device)
    buffer = torch.full((shape[0], shape[1] + pad), 7.0, device=device)
    op.decode(*weight, buffer[1:5, :-pad], nested=nested, row_start=3)
    assert torch.equal(buffer[1:5, :-pad], truth[3:7])
    buffer[1:5, :-pad] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("row_start", [0, 1, 8])
def test_last_row(op, device, row_start):
    weight, nested, truth = quantize((9, 77), device, double=False)
    out = torch.empty(9 - row_start, 77, device=device)
    op.decode(*weight, out, nested=nested, row_start=row_start)
    assert torch.equal(out, truth[row_start:])


def test_more_blocks_than_one_nested_block(op, device):
    weight, nested, truth = quantize((300, 64), device)
    assert nested[1].numel() == 2
    out = torch.empty_like(truth)
    op.decode(*weight, out, nested=nested)
    assert torch.equal(out, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("rows", [(40, 9), (40, 1, 9), (3, 70, 40), (300, 300)], ids=str)
def test_several_weights_at_once(op, device, dtype, double, rows):
    """Blocks may span rows, and the last program of each weight has less to do."""
    made = [quantize((count, 72), device, dtype, double=double) for count in rows]
    stored = [reference.Stored(*weight[:3], nested, len(truth)) for weight, nested, truth in made]
    out = torch.full((sum(rows), 72), float("nan"), device=device, dtype=dtype)
    assert op.decode_all(stored, 64, out)
    assert torch.equal(out, torch.cat([truth for _, _, truth in made]))


def test_several_weights_that_one_launch_cannot_decode(device):
    weight, nested, _ = quantize((6, 128), device)
    stored = reference.Stored(*weight[:3], nested, 6)
    single, _, _ = quantize((6, 128), device, double=False)
    shifted = torch.cat((stored.packed.new_zeros(1), stored.packed.flatten()))[1:]
    for others in (
        [],
        [stored] * 3,
        [stored._replace(absmax=single[1], nested=None)],
        [stored._replace(nested=(*nested[:3], 128))],
        [stored._replace(packed=shifted)],
    ):
        out = torch.full((6 * (1 + len(others)), 128), 7.0, device=device)
        assert not kernel.decode_all([stored, *others], 64, out)
        assert (out == 7.0).all()
    assert not kernel.decode_all([stored, stored], 64, torch.empty(12, 144, device=device)[:, :128])
    with pytest.raises(ValueError, match="need 512 packed bytes, there are 384"):
        kernel.decode_all([stored, stored._replace(rows=8)], 64, torch.empty(14, 128, device=device))


def test_packed_bytes_at_an_odd_address(op, device):
    (packed, *rest), nested, truth = quantize((6, 128), device)
    shifted = torch.cat((packed.new_zeros(1), packed.flatten()))[1:]
    out = torch.empty_like(truth)
    op.decode(shifted, *rest, out, nested=nested)
    assert torch.equal(out, truth)


def test_empty(op, device):
    weight, nested, _ = quantize((6, 128), device)
    op.decode(*weight, torch.empty(0, 128, device=device), nested=nested, row_start=6)


def test_what_does_not_fit_is_refused(op, device):
    (packed, absmax, code, blocksize), nested, truth = quantize((6, 128), device)
    out = torch.empty_like(truth)
    with pytest.raises(ValueError, match="need 448 packed bytes, there are 384"):
        op.decode(packed, absmax, code, blocksize, out, nested=nested, row_start=1)
    with pytest.raises(ValueError, match=r"expected torch\.float32 without double quantization"):
        op.decode(packed, absmax, code, blocksize, out)
    with pytest.raises(ValueError, match="do not cover 768 elements"):
        op.decode(packed, absmax[:3], code, blocksize, out, nested=nested)
    with pytest.raises(ValueError, match=r"view it as torch\.uint8"):
        op.decode(packed.view(torch.int8), absmax, code, blocksize, out, nested=nested)


def test_linear_keeps_no_weight(op, device):
    (packed, absmax, code, blocksize), nested, truth = quantize((24, 64), device)
    x = torch.randn(2, 5, 64, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    dy = torch.randn(2, 5, 24, device=device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = nf4_linear(x, packed, absmax, code, blocksize, (24, 64), nested=nested, bias=bias, implementation=op)
    y.backward(dy)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, truth, bias))
    torch.testing.assert_close(x.grad, dy @ truth)
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))
    assert all(t.shape != truth.shape for t in saved)


def test_custom_op(device):
    (packed, absmax, code, blocksize), nested, truth = quantize((4, 128), device)
    out = torch.empty_like(truth)
    arguments = (packed.flatten(), absmax, code, out, *nested[:3], blocksize, nested[3], 0)
    torch.library.opcheck(kernel.nf4_decode.op, arguments)
