"""Cross entropy of a linear head against ``F.cross_entropy`` of logits that are held whole."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastplug.ops.linear_cross_entropy import linear_cross_entropy
from fastplug.ops.linear_cross_entropy.reference import linear_cross_entropy as held_whole
from fastplug.ops.logprobs import chunked, reference
from tests.accuracy import assert_as_accurate, error
from tests.ops.test_logprobs import IMPLEMENTATIONS, Recorder, make

NAMES = ("loss", "dhidden", "dweight", "dbias")
TRANSFORMS: list[dict[str, float]] = [{}, {"softcap": 4.0}, {"softcap": 30.0, "logit_scale": 0.5}]


def run(
    op: Any,
    leaves: list[Tensor | None],
    targets: Tensor,
    dtype: torch.dtype,
    trained: tuple[bool, ...],
    upstream: Tensor,
    **options: Any,
) -> list[Tensor | None]:
    cast = [None if t is None else t.detach().to(dtype).requires_grad_(g) for t, g in zip(leaves, trained, strict=True)]
    hidden, weight, bias = cast
    loss = op(hidden, weight, targets, bias, **options)
    loss = loss if isinstance(loss, Tensor) else loss.loss
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(None if t is None else t.grad for t in cast)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", 37])
def test_matches_cross_entropy(
    implementation: ModuleType,
    transform: dict[str, float],
    trained: tuple[bool, ...],
    reduction: str | int,
    device: torch.device,
) -> None:
    hidden, weight, bias, targets = make(19, 24, 517, device)
    options: dict[str, Any] = {"reduction": reduction} if isinstance(reduction, str) else {"num_items": reduction}
    upstream = torch.randn(19 if reduction == "none" else (), device=device)
    leaves = [hidden, weight, bias if trained[0] else None]
    arguments = (targets, torch.float64, trained, upstream)
    truth = run(held_whole, leaves, *arguments, **options, **transform)
    arguments = (targets, torch.float32, trained, upstream)
    theirs = run(held_whole, leaves, *arguments, **options, **transform)
    mine = run(
        linear_cross_entropy, leaves, *arguments, **options, **transform, chunk_size=8, implementation=implementation
    )
    assert_as_accurate(mine, theirs, truth, NAMES)


def in_pieces(
    leaves: list[Tensor | None],
    targets: Tensor,
    dtype: torch.dtype,
    trained: tuple[bool, ...],
    upstream: Tensor,
    counted: Tensor,
    size: int,
    **options: Any,
) -> list[Tensor | None]:
    """PyTorch's own results from a few rows at a time: products of a few rows round otherwise than those of many."""
    hidden, weight, bias = leaves
    assert hidden is not None
    if options.get("reduction") is not None:
        options.pop("num_items")
    total: list[Tensor | None] = []
    for rows in counted.split(size):
        part = run(held_whole, [hidden[rows], weight, bias], targets[rows], dtype, trained, upstream, **options)
        if part[1] is not None:
            part[1] = torch.zeros_like(hidden).index_copy(0, rows, part[1])
        total = [None if t is None else t if not total else t + total[i] for i, t in enumerate(part)]  # type: ignore[operator]
    return total


def less_accurate(
    one: list[Tensor | None], other: list[Tensor | None], truth: list[Tensor | None]
) -> list[Tensor | None]:
    """Of two results, the one with the larger error, tensor by tensor."""
    found: list[Tensor | None] = []
    for a, b, true in zip(one, other, truth, strict=True):
        if a is None or b is None or true is None:
            found.append(a)
        else:
            found.append(a if error(a, true) >= error(b, true) else b)
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items": 37}], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 16])
def test_rows_that_count(
    implementation: ModuleType,
    transform: dict[str, float],
    trained: tuple[bool, ...],
    options: dict[str, Any],
    rows: int,
    device: torch.device,
) -> None:
    """The other rows are not read: they may hold anything."""
    hidden, weight, bias, targets = make(19, 24, 517, device)
    targets = targets.abs()
    counted = torch.randperm(19, device=device)[:rows].sort().values
    out = torch.ones(19, dtype=torch.bool, device=device)
    out[counted] = False
    targets[out] = -100
    leaves = [hidden, weight, bias if trained[0] else None]
    upstream = torch.randn((), device=device)
    truth = run(held_whole, leaves, targets, torch.float64, trained, upstream, **options, **transform)
    arguments = (targets, torch.float32, trained, upstream)
    theirs = run(held_whole, leaves, *arguments, **options, **transform)
    for size in (1, 4) if rows else ():
        pieces = in_pieces(leaves, *arguments, counted, size, **{"num_items": rows, **options}, **transform)
        theirs = less_accurate(theirs, pieces, truth)
    hidden[out] = torch.nan
    chosen = {"counted": counted, "chunk_size": 4, "implementation": implementation}
    mine = run(linear_cross_entropy, leaves, *arguments, **options, **transform, **chosen)
    if rows == 0 and not options:
        assert bool(mine[0].isnan() & truth[0].isnan())  # type: ignore[union-attr]
        mine, theirs, truth = mine[1:], theirs[1:], truth[1:]
        assert not any(gradient is not None and bool(gradient.any()) for gradient in mine)
    else:
        assert_as_accurate(mine, theirs, truth, NAMES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_count_are_those_reported(implementation: ModuleType, device: torch.device) -> None:
    hidden, weight, _, targets = make(11, 16, 300, device)
    counted = (targets != -100).nonzero()[:, 0]
    chosen = {"entropy": True, "implementation": implementation}
    every = linear_cross_entropy(hidden, weight, targets, **chosen)  # type: ignore[arg-type]
    found = linear_cross_entropy(hidden, weight, targets, **chosen, counted=counted)  # type: ignore[arg-type]
    torch.testing.assert_close(found.loss, every.loss)
    assert torch.equal(found.argmax, every.argmax[counted])
    assert torch.equal(found.correct, every.correct[counted])
    assert every.entropy is not None
    torch.testing.assert_close(found.entropy, every.entropy[counted])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_can_be_reported(implementation: ModuleType, device: torch.device) -> None:
    hidden, weight, _, targets = make(11, 16, 300, device)
    logits = hidden @ weight.t()
    targets[1] = logits[1].argmax()
    found = linear_cross_entropy(
        hidden.requires_grad_(), weight, targets, entropy=True, chunk_size=4, implementation=implementation
    )
    assert torch.equal(found.argmax, logits.argmax(1))
    assert torch.equal(found.correct, logits.argmax(1) == targets)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert not found.entropy.requires_grad
    assert found.loss.dtype == torch.float32
    plain = linear_cross_entropy(hidden, weight, targets, reduction="none", implementation=implementation)
    assert plain.entropy is None
    assert torch.equal(plain.argmax, found.argmax)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_most_likely_tokens_may_be_left_out(
    implementation: ModuleType, reduction: str, device: torch.device
) -> None:
    """Same loss and gradient, to the last bit."""
    hidden, weight, _, targets = make(11, 16, 300, device)
    found = []
    for argmax in (True, False):
        leaf = hidden.clone().requires_grad_()
        result = linear_cross_entropy(
            leaf, weight, targets, reduction=reduction, implementation=implementation, argmax=argmax
        )
        assert (result.argmax is None, result.correct is None) == (not argmax, not argmax)
        found.append((result.loss, torch.autograd.grad(result.loss.sum(), leaf)[0]))
        with torch.no_grad():
            alone = linear_cross_entropy(
                leaf, weight, targets, reduction=reduction, implementation=implementation, argmax=argmax
            )
        torch.testing.assert_close(alone.loss, result.loss)
    assert all(torch.equal(mine, other) for mine, other in zip(*found))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_token_has_a_loss(implementation: ModuleType, rows: int, trained: bool, device: torch.device) -> None:
    """The mean over nothing is NaN and its gradient 0, as in PyTorch; a given number of items gives 0."""
    hidden, weight, _, _ = make(5, 8, 40, device)
    targets = torch.full((rows,), -100, device=device)
    for options in ({}, {"num_items": 3}, {"num_items": torch.tensor(3)}, {"reduction": "sum"}, {"num_items": 0}):
        grads = []
        for op in (linear_cross_entropy, held_whole):
            leaf = hidden[:rows].clone().requires_grad_()
            head = weight.clone().requires_grad_(trained)
            extra = {"implementation": implementation} if op is linear_cross_entropy else {}
            result: Any = op(leaf, head, targets, **options, **extra)  # type: ignore[operator]
            loss = result if isinstance(result, Tensor) else result.loss
            loss.backward()
            assert leaf.grad is not None
            grads.append((loss.detach(), leaf.grad, head.grad))
        (loss, dhidden, dweight), (expected, *_) = grads
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert dhidden.shape == (rows, 8)
        assert not dhidden.any()
        assert (dweight is not None) == trained
        assert dweight is None or not dweight.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulation_over_uneven_batches(implementation: ModuleType, as_tensor: bool, device: torch.device) -> None:
    hidden, weight, _, targets = make(20, 16, 120, device)
    items = (targets != -100).sum()
    whole_h, whole_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    whole = held_whole(whole_h, whole_w, targets)
    whole.backward()
    head, total = weight.clone().requires_grad_(), torch.zeros((), device=device)
    parts = []
    for rows in (slice(0, 3), slice(3, 16), slice(16, 20)):
        leaf = hidden[rows].clone().requires_grad_()
        number = items if as_tensor else int(items)
        found = linear_cross_entropy(
            leaf, head, targets[rows], num_items=number, chunk_size=8, implementation=implementation
        )
        found.loss.backward()
        total += found.loss.detach()
        parts.append(leaf.grad)
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(torch.cat(parts), whole_h.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(head.grad, whole_w.grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_bits_twice_and_strided(implementation: ModuleType, device: torch.device) -> None:
    hidden, weight, _, targets = make(12, 16, 200, device)
    wide = torch.zeros(12, 32, device=device)
    wide[:, 1::2] = hidden
    results = []
    for source in (hidden, hidden, wide[:, 1::2]):
        leaf, head = source.detach().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(leaf, head, targets, chunk_size=5, implementation=implementation).loss
        results.append([loss, *torch.autograd.grad(loss, (leaf, head))])
    for first, again, strided in zip(*results, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, strided)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_one_pass_over_the_vocabulary(trained: bool, device: torch.device) -> None:
    """Per chunk: logits, dhidden and, for a trained head alone, dweight. Backward has no product at all."""
    rows, vocabulary, chunk = 64, 2000, 16
    hidden, weight, bias, targets = make(rows, 4, vocabulary, device)
    forward, backward = Counter(), Counter()
    with forward:
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(trained), targets, chunk_size=chunk)
    with backward:
        loss.loss.backward()
    assert forward.products == rows // chunk * (3 if trained else 2)
    assert backward.products == 0
    assert max(forward.largest, backward.largest) <= max(chunk * (vocabulary + 63), vocabulary * 4)
    with torch.no_grad(), Counter() as silent:
        linear_cross_entropy(hidden, weight, targets, bias, chunk_size=chunk)
    assert silent.products == rows // chunk


class Counter(Recorder):
    """How many matrix products ran, besides what :class:`Recorder` sees."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_second_backward(device: torch.device) -> None:
    hidden, weight, _, targets = make(6, 8, 50, device)
    frozen = linear_cross_entropy(hidden.requires_grad_(), weight, targets).loss
    first = torch.autograd.grad(frozen, hidden, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(frozen, hidden)[0])
    trained = linear_cross_entropy(hidden, weight.requires_grad_(), targets).loss
    torch.autograd.grad(trained, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="can go backward once"):
        trained.backward()


def test_16_bit_gradients_are_scaled_after_the_products() -> None:
    """fp16: divided by the items before the products, gradients of p·1e-6 would vanish."""
    hidden, weight, _, targets = make(16, 8, 40, torch.device("cpu"), torch.float16)
    leaf, plain = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    linear_cross_entropy(leaf, weight, targets, num_items=10**6).loss.backward(torch.tensor(65536.0))
    held_whole(plain, weight.double(), targets, num_items=10**6).backward(torch.tensor(65536.0))
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=5e-3, atol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [None, 8])
def test_bf16_weight_gradient_is_summed_in_fp32(chunk: int | None) -> None:
    hidden, weight, bias, targets = make(64, 16, 300, torch.device("cpu"), torch.bfloat16)
    leaves = [hidden, weight, bias]
    arguments = ((True, True, True), torch.ones(()))
    truth = run(held_whole, leaves, targets, torch.float64, *arguments)
    theirs = run(held_whole, leaves, targets, torch.bfloat16, *arguments)
    mine = run(linear_cross_entropy, leaves, targets, torch.bfloat16, *arguments, chunk_size=chunk)
    assert all(g is not None and g.dtype == torch.bfloat16 for g in mine[1:])
    assert_as_accurate(mine, theirs, truth, NAMES)


def test_autocast_and_mixed_dtypes(device: torch.device) -> None:
    hidden, weight, _, targets = make(12, 16, 60, device)
    for h, w, autocast in (
        (hidden, weight, True),
        (hidden.bfloat16(), weight, False),
        (hidden, weight.bfloat16(), False),
        (hidden.bfloat16(), weight, True),
    ):
        leaf, head = h.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(leaf, head, targets, chunk_size=8, implementation=reference).loss
        loss.backward()
        plain_h, plain_w = h.double().requires_grad_(), w.double().requires_grad_()
        expected = held_whole(plain_h, plain_w, targets)
        expected.backward()
        assert leaf.grad is not None
        assert head.grad is not None
        assert (leaf.grad.dtype, head.grad.dtype) == (h.dtype, w.dtype)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=1e-2)
        for gradient, truth in ((leaf.grad, plain_h.grad), (head.grad, plain_w.grad)):
            assert truth is not None
            assert float((gradient.double() - truth).norm() / truth.norm()) < 2e-2


def test_wrong_arguments_say_why(device: torch.device) -> None:
    hidden, weight, _, targets = make(4, 8, 50, device)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(hidden, weight, targets, reduction="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_items divides the loss"):
        linear_cross_entropy(hidden, weight, targets, reduction="sum", num_items=3)
    with pytest.raises(ValueError, match="counted leaves rows out"):
        linear_cross_entropy(hidden, weight, targets, reduction="none", counted=targets[:1])
    if device.type == "cpu":
        with pytest.raises(ValueError, match="outside the vocabulary"):
            linear_cross_entropy(hidden, weight, targets + 100)


def test_fp64_is_exact() -> None:
    hidden, weight, bias, targets = make(9, 5, 13, torch.device("cpu"), torch.float64)
    arguments = (targets, torch.float64, (True, True, True), torch.tensor(0.3))
    mine = run(linear_cross_entropy, [hidden, weight, bias], *arguments, softcap=6.0, chunk_size=4)
    expected = run(held_whole, [hidden, weight, bias], *arguments, softcap=6.0)
    for value, truth in zip(mine, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_compiles(trained: bool, device: torch.device) -> None:
    hidden, weight, _, targets = make(6, 8, 50, device)

    def step(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h * 2, w, targets, chunk_size=4).loss

    leaves = [(hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)) for _ in range(2)]
    torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves[0]).backward()
    step(*leaves[1]).backward()
    for compiled, eager in zip(*leaves, strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 256, 32003, 128), (257, 512, 50257, None)])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_16_bit_without_a_sync(
    shape: tuple[int, int, int, int | None], transform: dict[str, float], trained: bool, dtype: torch.dtype
) -> None:
    rows, width, vocabulary, chunk = shape
    hidden, weight, _, targets = make(rows, width, vocabulary, torch.device("cuda"), dtype)
    scale = torch.tensor(64.0, device="cuda")  # a loss scale, or the fp16 gradients of the model in PyTorch vanish
    items = (targets != -100).sum()
    arguments = ((True, trained, False), scale)
    leaves: list[Tensor | None] = [hidden, weight, None]
    truth = run(held_whole, leaves, targets, torch.float64, *arguments, num_items=items, **transform)
    theirs = run(held_whole, leaves, targets, dtype, *arguments, num_items=items, **transform)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (items, None):
            mine = run(
                linear_cross_entropy,
                leaves,
                targets,
                dtype,
                *arguments,
                num_items=number,
                entropy=True,
                chunk_size=chunk,
                **transform,
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_accurate(mine[1:], theirs[1:], truth[1:], NAMES[1:])
    # The loss is a mean over rows that are each rounded on their own: PyTorch's error in it may be zero by luck.
    assert abs(mine[0] - truth[0]) <= 2 * torch.finfo(dtype).eps * truth[0] / rows**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("share", [None, 1, 2, 15])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_gpu_peak_memory(trained: bool, share: int | None) -> None:
    """Where only some sixteenths of the rows count, no step needs more than for all."""
    rows, width, vocabulary = 8192, 512, 128256
    hidden, weight, _, targets = make(rows, width, vocabulary, torch.device("cuda"), torch.bfloat16)
    counted = None if share is None else torch.arange(rows // 16 * share, device="cuda")
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, targets, counted=counted).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    held = chunked.GPU_BYTES + (6 * weight.numel() if trained else 0) + 4 * hidden.numel()
    assert extra < held + 64 * 2**20
    assert extra < rows * vocabulary * 2  # the logits alone, in bf16
