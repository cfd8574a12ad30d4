"""Rotary embedding: both implementations against the fp64 definition and transformers' own formula."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastplug.ops.rms_norm.reference import rms_norm
from fastplug.ops.rope import kernel, reference, rope
from tests.accuracy import assert_as_accurate

EPS = 1e-6
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates instead of rounding
DTYPES = [torch.float32, torch.float16, BF16]

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[reference, kernel], ids=["reference", "kernel"])
def op(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def angles(batch: int, S: int, R: int, device: torch.device, dtype: torch.dtype = torch.float32):
    frequencies = torch.outer(torch.arange(S), 100.0 ** (-torch.arange(R // 2) / (R // 2)))
    phase = torch.cat((frequencies, frequencies), dim=-1) + torch.arange(batch)[:, None, None]
    return phase.cos().to(device, dtype), phase.sin().to(device, dtype)


def run(inputs, grads, cos, sin, interleaved, offset, cast_first, dtype):
    """Outputs and gradients by autograd through the definition in ``dtype``."""
    q, k, wq, wk = (None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs)
    outputs = []
    for x, weight in ((q, wq), (k, wk)):
        if weight is not None:
            x = rms_norm(x, weight, EPS, offset, cast_first)
        outputs.append(reference.rotate(x, cos.to(dtype), sin.to(dtype), interleaved))
    torch.autograd.backward(outputs, [g.to(dtype) for g in grads])
    return [*outputs, *(None if t is None else t.grad for t in (q, k, wq, wk))]


CASES = {
    "llama": (4, 2, 16, 16, False, False, (0.0, True)),
    "one kv head": (3, 1, 64, 64, False, False, (0.0, True)),
    "partial": (3, 3, 20, 12, False, False, (0.0, True)),
    "interleaved": (4, 2, 16, 16, True, False, (0.0, True)),
    "interleaved partial": (2, 1, 24, 12, True, False, (0.0, True)),
    "qwen3": (4, 2, 16, 16, False, True, (0.0, True)),
    "gemma3": (5, 1, 32, 32, False, True, (1.0, False)),
    "normed partial": (3, 2, 20, 12, False, True, (0.0, True)),
    "normed interleaved": (3, 2, 20, 16, True, True, (1.0, False)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_accurate_as_pytorch(op, device, dtype, batch, case):
    q_heads, k_heads, D, R, interleaved, normed, (offset, cast_first) = case
    B, S = 2, 3
    cos, sin = angles(batch, S, R, device, dtype)
    q, dq = (torch.randn(B, S, q_heads, D, device=device).to(dtype) for _ in range(2))
    k, dk = (torch.randn(B, S, k_heads, D, device=device).to(dtype) for _ in range(2))
    weights = [torch.randn(D, device=device).to(dtype) if normed else None for _ in range(2)]
    inputs = [q, k, *weights]
    truth = run(inputs, (dq, dk), cos, sin, interleaved, offset, cast_first, torch.float64)
    theirs = run(inputs, (dq, dk), cos, sin, interleaved, offset, cast_first, dtype)
    q, k, wq, wk = (None if t is None else t.requires_grad_() for t in inputs)
    q_out, k_out = rope(q, k, cos, sin, interleaved=interleaved, q_weight=wq, k_weight=wk, eps=EPS, offset=offset,
                        cast_first=cast_first, implementation=op)  # fmt: skip
    torch.autograd.backward([q_out, k_out], [dq, dk])
    ours = [q_out, k_out, *(None if t is None else t.grad for t in (q, k, wq, wk))]
    assert_as_accurate(ours, theirs, truth, ["q", "k", "dq", "dk", "dq_weight", "dk_weight"])


def test_agrees_with_transformers(op, device):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    cos, sin = angles(1, 5, 16, device)
    q, k = torch.randn(2, 5, 4, 16, device=device), torch.randn(2, 5, 2, 16, device=device)
    for module, interleaved in ((llama, False), (glm, True)):
        expected = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        ours = rope(q, k, cos, sin, interleaved=interleaved, implementation=op)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("pad", [3, 8])
@pytest.mark.parametrize("interleaved", [True, False])
def test_in_place_in_one_buffer(op, device, normed, pad, interleaved):
    """q and k are views of one [B * S, Nqkv] product; v and the padding beside them stay as they are."""
    B, S, q_heads, k_heads, D, R = 2, 3, 4, 2, 24, 16
    buffer = torch.randn(B * S, (q_heads + 2 * k_heads) * D + pad, device=device)
    q = buffer[:, : q_heads * D].unflatten(-1, (q_heads, D)).unflatten(0, (B, S))
    k = buffer[:, q_heads * D : (q_heads + k_heads) * D].unflatten(-1, (k_heads, D)).unflatten(0, (B, S))
    others = buffer[:, (q_heads + k_heads) * D :].clone()
    cos, sin = angles(1, S, R, device)
    options = {"interleaved": interleaved}
    if normed:
        options |= {"q_weight": torch.randn(D, device=device), "k_weight": torch.randn(D, device=device), "eps": EPS}
    expected = rope(q.clone(), k.clone(), cos, sin, implementation=reference, **options)
    op.forward(q, k, cos, sin, q, k, **options)
    torch.testing.assert_close((q, k), expected)
    assert torch.equal(buffer[:, (q_heads + k_heads) * D :], others)


@pytest.mark.parametrize("normed", [True, False])
def test_gradients_as_attention_returns_them(op, device, normed):
    """dq and dk arrive as transposed [B, H, S, D]; their results go into one buffer. One weight of two is enough."""
    B, S, q_heads, k_heads, D = 2, 5, 3, 1, 16
    cos, sin = angles(B, S, D, device)
    q, k = torch.randn(B, S, q_heads, D, device=device), torch.randn(B, S, k_heads, D, device=device)
    weight = torch.randn(D, device=device) if normed else None
    dq = torch.randn(B, q_heads, S, D, device=device).transpose(1, 2)
    dk = torch.randn(B, k_heads, S, D, device=device).transpose(1, 2)
    buffer = torch.full((B, S, (q_heads + k_heads) * D + 5), 7.0, device=device)
    dq_out = buffer[..., : q_heads * D].unflatten(-1, (q_heads, D))
    dk_out = buffer[..., q_heads * D : -5].unflatten(-1, (k_heads, D))
    options = {"q": q, "k": k, "q_weight": weight, "eps": EPS, "weight_grad": True}
    dweights = op.backward(dq, dk, cos, sin, dq_out, dk_out, **options)
    expected = run([q, k, weight, None], (dq, dk), cos, sin, False, 0.0, True, torch.float32)
    torch.testing.assert_close((dq_out, dk_out), (expected[2], expected[3]))
    if normed:
        torch.testing.assert_close(dweights[0], expected[4], rtol=1e-4, atol=1e-5)
    assert dweights[1] is None
    assert (buffer[..., -5:] == 7.0).all()


def test_many_heads_in_several_tiles(op, device):
    q, k = torch.randn(1, 2, 70, 64, device=device), torch.randn(1, 2, 0, 64, device=device)
    cos, sin = angles(1, 2, 64, device)
    q_out, k_out = rope(q, k, cos, sin, implementation=op)
    torch.testing.assert_close(q_out, reference.rotate(q, cos, sin))
    assert k_out.shape == k.shape


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy's, for those heads
def test_masked_heads_do_not_poison_the_weight_gradient(op, device):
    q, dq = torch.randn(1, 2, 3, 16, device=device), torch.randn(1, 2, 3, 16, device=device)
    cos, sin = angles(1, 2, 16, device)
    weight = torch.ones(16, device=device)
    out = torch.empty_like(q)
    dweight, _ = op.backward(dq, dq, cos, sin, out, torch.empty_like(q), q=q, q_weight=weight, weight_grad=True)
    assert dweight.isfinite().all()
    assert out.isfinite().all()


def test_empty(op, device):
    q = torch.randn(0, 4, 2, 8, device=device)
    cos, sin = angles(1, 4, 8, device)
    op.forward(q, q, cos, sin, q, q)
    weight = torch.ones(8, device=device)
    dweight, _ = op.backward(q, q, cos, sin, q, q, q=q, q_weight=weight, weight_grad=True)
    assert torch.equal(dweight, torch.zeros(8, device=device))


def test_norm_gradient_without_its_input(op, device):
    q = torch.randn(1, 2, 2, 8, device=device)
    cos, sin = angles(1, 2, 8, device)
    with pytest.raises(ValueError, match="q_weight was given without q"):
        op.backward(q, q, cos, sin, q, q, q_weight=torch.ones(8, device=device))


def test_custom_ops(device):
    q, q_out = (torch.randn(1, 2, 3, 16, device=device) for _ in range(2))
    k, k_out = (torch.randn(1, 2, 1, 16, device=device) for _ in range(2))
    cos, sin = angles(1, 2, 16, device)
    weight, partial = torch.ones(16, device=device), torch.zeros(2, 2, 16, device=device)
    forward, backward = kernel.rope_forward.op, kernel.rope_backward.op
    torch.library.opcheck(forward, (q, k, cos, sin, q_out, k_out, weight, None, EPS, 0.0, True, False))
    torch.library.opcheck(backward, (q, k, cos, sin, q_out, k_out, q, None, weight, None, partial, EPS, 0.0, False))
