"""Attention within documents: every backend of the device against a plain reference, and what it may not depend on."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch

from fastplug.errors import DataError
from fastplug.ops.document_attention import BACKENDS, DocumentMask, Documents, choose, document_attention
from fastplug.ops.document_attention.reference import document_attention as reference
from tests.accuracy import assert_as_accurate

LENGTHS = (9, 1, 24, 2, 17)


def documents(device: torch.device, lengths: tuple[int, ...] = LENGTHS, rows: int = 1) -> Documents:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return Documents(bounds, rows, sum(lengths) // rows, max(lengths))


def heads(
    device: torch.device, dtype: torch.dtype, rows: int = 1, length: int = sum(LENGTHS), groups: int = 2
) -> list[torch.Tensor]:
    """q, k, v [B, H, S, D] as projections lay them out: [B, S, H, D], transposed."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in (4, 4 // groups, 4 // groups):
        x = torch.randn(rows, length, count, 16, generator=generator).to(device, dtype)
        made.append(x.transpose(1, 2).requires_grad_())
    return made


def backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What can run there; which one is chosen is another matter."""
    half = dtype in (torch.float16, torch.bfloat16)
    varlen = (
        device.type == "cuda"
        and half
        and choose(torch.empty(1, 4, 8, 16, device=device, dtype=dtype), documents(device)) == "varlen"
    )
    return [name for name in BACKENDS if name != "varlen" or varlen]


@pytest.mark.parametrize("window", [None, 5, 24])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_is_accurate(device: torch.device, dtype: torch.dtype, groups: int, window: int | None) -> None:
    where, made = documents(device), heads(device, dtype, groups=groups)
    upstream = torch.randn(1, sum(LENGTHS), 4, 16, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def run(function: object, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [part.detach().requires_grad_() for part in parts]
        out = function(*leaves, where, window, 0.3)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    def pytorchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        attend, mask = torch.nn.functional.scaled_dot_product_attention, where.mask(window)
        return attend(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=groups > 1).transpose(1, 2)

    exact, theirs = run(reference, [part.double() for part in made]), run(pytorchs, made)
    for name in backends(device, dtype):
        ours = run(BACKENDS[name], made)
        assert ours[0].dtype == dtype
        assert_as_accurate(ours, theirs, exact, [f"{name} {label}" for label in ("out", "dq", "dk", "dv")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("deterministic")
def test_no_document_sees_another_to_the_last_bit(device: torch.device, dtype: torch.dtype) -> None:
    where, made = documents(device), heads(device, dtype)
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    others = torch.ones(sum(LENGTHS), dtype=torch.bool, device=device)
    others[start:end] = False
    for name in backends(device, dtype):
        results = []
        for changed in (False, True):
            leaves = [part.detach().clone() for part in made]
            for leaf in leaves:
                leaf[:, :, start + 2] += 3.0 * changed
                leaf.requires_grad_()
            out = BACKENDS[name](*leaves, where, None, None)
            grads = torch.autograd.grad(out.square().sum(), leaves)
            results.append([out[:, others], *(grad[:, :, others] for grad in grads), out[:, ~others]])
        same, other = results
        for label, before, after in zip(("out", "dq", "dk", "dv"), same, other):
            assert torch.equal(before, after), f"{name} {label}"
        assert not torch.equal(same[4], other[4]), name


def test_several_rows_at_once(device: torch.device) -> None:
    lengths = (9, 4, 1, 12, 13)  # rows of 13 tokens: two documents, two documents, one
    where, made = documents(device, lengths, rows=3), heads(device, torch.float32, rows=3, length=13)
    truth = reference(*made, where)
    for name in backends(device, torch.float32):
        torch.testing.assert_close(BACKENDS[name](*made, where, None, None), truth, rtol=1e-5, atol=1e-5)
    alone = [
        document_attention(*(part[i : i + 1] for part in made), one)
        for i, one in enumerate(documents(device, each) for each in (lengths[:2], lengths[2:4], lengths[4:]))
    ]
    torch.testing.assert_close(torch.cat(alone), truth, rtol=1e-5, atol=1e-5)


def test_a_window_of_a_whole_document_is_none(device: torch.device) -> None:
    where, made = documents(device), heads(device, torch.float32)
    assert torch.equal(document_attention(*made, where, max(LENGTHS)), document_attention(*made, where))
    assert where.mask(max(LENGTHS)) is where.mask()


def test_the_backend_follows_the_device(device: torch.device) -> None:
    q = torch.empty(1, 4, 64, 16, device=device)
    if device.type == "cpu":
        assert choose(q, documents(device)) == "loop"
        assert choose(q.bfloat16(), documents(device)) == "loop"
    else:
        assert choose(q, documents(device)) == "mask"
        assert choose(q, documents(device, (10_000, 2_000))) == "loop"  # a mask of 144 MiB
        assert choose(q.bfloat16(), documents(device)) == ("varlen" if torch.__version__ >= "2.10" else "mask")


def test_the_mask(device: torch.device) -> None:
    mask = documents(device, (2, 3)).mask()
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert documents(device, (2, 3)).mask(2)[0, 0, 4].tolist() == [False, False, False, True, True]


def test_documents_by_positions(device: torch.device) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]], device=device)
    found = Documents.from_positions(positions)
    assert found is not None
    assert found.cu_seqlens.tolist() == [0, 3, 5, 10]
    assert (found.lengths, found.max_length) == ((3, 2, 5), 5)
    assert Documents.from_positions(positions[1:]) is None
    assert Documents.from_positions(positions[1:] + 7) is None  # a row that does not begin at 0
    padding = torch.tensor([[4, 5, 0, 0]], device=device)  # each is a document of its own, as for transformers
    assert Documents.from_positions(padding).lengths == (2, 1, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bounds", "longest", "message"),
    [
        ([0, 3, 7], 4, r"must rise from 0 to the 8 tokens of the batch \[1, 8\], not \[0, 3, 7\]"),
        ([0, 5, 3, 8], 5, "must rise from 0 to the 8 tokens"),
        ([1, 8], 7, "must rise from 0"),
        ([0, 2, 8], 5, "the longest document has 6 tokens by cu_seqlens, more than the max_length 5"),
    ],
)
def test_bounds_that_cannot_be(bounds: list[int], longest: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Documents(torch.tensor(bounds), 1, 8, longest)


def test_the_lazy_mask_is_made_only_when_read(device: torch.device) -> None:
    where = documents(device)
    mask = DocumentMask(where)
    assert isinstance(mask, torch.Tensor)
    assert (mask.shape, mask.dtype, mask.dim(), mask.device.type) == ((1, 1, 53, 53), torch.bool, 4, device.type)
    assert not mask.requires_grad
    assert mask.detach() is mask
    assert mask.to(mask.device) is mask
    assert copy.deepcopy([mask])[0] is mask
    assert "documents=5" in repr(mask)
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda x, m: x * (1.0 if type(m) is DocumentMask else 0.0),
        torch.ones(2, requires_grad=True, device=device),
        mask,
        use_reentrant=True,
    )
    checkpointed.sum().backward()
    assert not where._masks  # nobody has read it so far
    assert torch.equal(mask & mask, where.mask())
    assert torch.equal(mask[:, :, 3:9], where.mask()[:, :, 3:9])
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    assert torch.equal(torch.load(file), where.mask())
    q, k, v = heads(device, torch.float32, groups=1)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(theirs.transpose(1, 2), reference(q, k, v, where), rtol=1e-5, atol=1e-5)
