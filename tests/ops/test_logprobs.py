"""The log-probability ops against ``log_softmax`` of logits that are held whole."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastplug.ops.logprobs import chunked, linear_logprobs, logprobs_from_logits, reference
from tests.accuracy import assert_as_accurate

kernel = pytest.importorskip("fastplug.ops.logprobs.kernel", reason="Triton is not installed")
IMPLEMENTATIONS = [
    pytest.param(reference, id="reference"),
    pytest.param(kernel, id="kernel", marks=pytest.mark.interpreter),
]
TRANSFORMS: list[dict[str, float]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"softcap": 30.0, "logit_scale": 0.25, "temperature": 1.5},
]


def full_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy by PyTorch, in fp32 as the trainers compute them (fp64 stays)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    ignored = targets == ignore_index
    logprob = log_p.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return logprob.masked_fill(ignored, 0), -(log_p.exp() * log_p).sum(-1)


def make(
    rows: int, width: int, vocabulary: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) * 3 / width**0.5).to(dtype)
    bias = torch.randn(vocabulary, device=device).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    targets[::3] = -100
    return hidden, weight, bias, targets


def run(
    op: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    leaves: list[Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
    trained: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """Outputs and gradients of an op, run in ``dtype``, for upstream gradients of log-probability and entropy."""
    cast = [None if t is None else t.detach().to(dtype).requires_grad_(g) for t, g in zip(leaves, trained, strict=True)]
    outputs = op(*cast)  # type: ignore[arg-type]
    pairs = [
        (out, up.to(out.dtype)) for out, up in zip(outputs, upstream, strict=True) if out is not None and up is not None
    ]
    torch.autograd.backward([out for out, _ in pairs], [up for _, up in pairs])
    return [*(None if o is None else o.detach() for o in outputs), *(None if t is None else t.grad for t in cast)]


NAMES = ("logprob", "entropy", "dhidden", "dweight", "dbias")
SHAPES = [(13, 24, 97, 5), (7, 33, 1031, 4)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("with_entropy", [None, "reported", "differentiated"])
def test_linear_logprobs_matches_log_softmax(
    implementation: ModuleType,
    shape: tuple[int, int, int, int],
    transform: dict[str, float],
    trained: bool,
    with_entropy: str | None,
    device: torch.device,
) -> None:
    rows, width, vocabulary, chunk = shape
    hidden, weight, bias, targets = make(rows, width, vocabulary, device)
    use_bias = trained or "softcap" in transform
    leaves = [hidden, weight, bias if use_bias else None]
    needs = (True, trained, trained)
    differentiated = with_entropy == "differentiated"
    up = (torch.randn(rows, device=device), torch.randn(rows, device=device) if differentiated else None)
    options = {"entropy": with_entropy is not None, "chunk_size": chunk, "implementation": implementation, **transform}

    def ours(h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found = linear_logprobs(h, w, targets, b, **options)  # type: ignore[arg-type]
        return found.logprob, found.entropy

    def whole(h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # By the same chunks: BLAS sums a product of few rows in another order, with an error of its own.
        parts = zip(h.split(chunk), targets.split(chunk), strict=True)
        pairs = [full_logprobs(torch.nn.functional.linear(x, w, b), t, **transform) for x, t in parts]
        return torch.cat([p for p, _ in pairs]), torch.cat([e for _, e in pairs]) if with_entropy else None

    truth = run(whole, leaves, up, torch.float64, needs)
    theirs = run(whole, leaves, up, torch.float32, needs)
    assert_as_accurate(run(ours, leaves, up, torch.float32, needs), theirs, truth, NAMES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_argmax_and_default_results(implementation: ModuleType, device: torch.device) -> None:
    hidden, weight, _, targets = make(9, 16, 5000, device)
    found = linear_logprobs(hidden, weight, targets, implementation=implementation)
    assert found.entropy is None
    assert found.logprob.dtype == torch.float32
    assert not found.logprob.requires_grad
    torch.testing.assert_close(found.argmax, (hidden @ weight.t()).argmax(1))
    assert bool((found.logprob[targets == -100] == 0).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocabulary", [7, 1024, 1031, 4097])
def test_argmax_takes_the_first_of_equals(implementation: ModuleType, vocabulary: int, device: torch.device) -> None:
    logits = torch.zeros(3, vocabulary, device=device)
    logits[1, vocabulary // 2] = logits[1, -1] = 2
    logits[2, -1] = 1
    found = logprobs_from_logits(
        logits, torch.zeros(3, dtype=torch.int64, device=device), implementation=implementation
    )
    assert found.argmax.tolist() == [0, vocabulary // 2, vocabulary - 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_rows_without_a_target(implementation: ModuleType, trained: bool, device: torch.device) -> None:
    hidden, weight, _, targets = make(6, 8, 50, device)
    weight.requires_grad_(trained)
    for rows in (0, 6):
        part = hidden[:rows].clone().requires_grad_()
        ignored = torch.full_like(targets[:rows], -100)
        found = linear_logprobs(part, weight, ignored, entropy=True, chunk_size=4, implementation=implementation)
        assert found.logprob.shape == found.argmax.shape == (rows,)
        assert not found.logprob.any()
        assert found.entropy is not None
        assert bool((found.entropy > 0).all())
        found.logprob.sum().backward()
        assert part.grad is not None
        assert part.grad.shape == part.shape
        assert not part.grad.any()
        if trained:
            assert weight.grad is not None
            assert not weight.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("strided", [False, True])
def test_logprobs_from_logits(
    implementation: ModuleType, transform: dict[str, float], strided: bool, device: torch.device
) -> None:
    logits = torch.randn(2, 6, 301, device=device) * 4
    targets = torch.randint(0, 301, (2, 5), device=device)
    targets[0, 1] = -100
    kept = logits.clone()
    up = (torch.randn(2, 5, device=device), torch.randn(2, 5, device=device))

    def view(x: Tensor) -> Tensor:
        return x[:, :-1] if strided else x[:, :-1].contiguous()

    def ours(x: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
        found = logprobs_from_logits(view(x), targets, entropy=True, implementation=implementation, **transform)
        return found.logprob, found.entropy

    def whole(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return full_logprobs(view(x), targets, **transform)

    leaves: list[Tensor | None] = [logits]
    truth = run(whole, leaves, up, torch.float64, (True,))  # type: ignore[arg-type]
    theirs = run(whole, leaves, up, torch.float32, (True,))  # type: ignore[arg-type]
    assert_as_accurate(run(ours, leaves, up, torch.float32, (True,)), theirs, truth, NAMES)  # type: ignore[arg-type]
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_logits(implementation: ModuleType, device: torch.device) -> None:
    """fp16: the interpreter truncates fp32 to bf16, so bf16 is for the GPU tests."""
    logits = torch.randn(8, 777, device=device).half() * 4
    targets = torch.randint(0, 777, (8,), device=device)
    up = (torch.randn(8, device=device), torch.randn(8, device=device))

    def ours(x: Tensor) -> tuple[Tensor, Tensor | None]:
        found = logprobs_from_logits(x, targets, entropy=True, implementation=implementation)
        return found.logprob, found.entropy

    def whole(x: Tensor) -> tuple[Tensor, Tensor]:
        return full_logprobs(x, targets)

    truth = run(whole, [logits], up, torch.float64, (True,))  # type: ignore[arg-type]
    theirs = run(whole, [logits], up, torch.float16, (True,))  # type: ignore[arg-type]
    assert_as_accurate(run(ours, [logits], up, torch.float16, (True,)), theirs, truth, NAMES)  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", [{}, {"softcap": 5.0}])
def test_extreme_logits(implementation: ModuleType, transform: dict[str, float], device: torch.device) -> None:
    """Masked (-inf) entries are exact; a NaN, or a row of nothing but -inf, gives NaN and touches no other row."""
    logits = torch.randn(5, 4200, device=device)
    logits[0, :4100] = -float("inf")
    logits[1, 7] = float("nan")
    logits[2] = -float("inf")
    logits[3] *= 1000
    targets = torch.tensor([4150, 3, 3, 4, 5], device=device)
    leaf, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = logprobs_from_logits(leaf, targets, entropy=True, implementation=implementation, **transform)
    assert found.entropy is not None
    expected, _ = full_logprobs(plain, targets, **transform)
    good = torch.tensor([0, 3, 4] if not transform else [0, 2, 3, 4], device=device)
    torch.testing.assert_close(found.logprob[good], expected[good].float())
    assert bool(found.logprob[1].isnan())
    assert bool(found.entropy[1].isnan())
    assert bool(found.logprob[2].isnan()) == (not transform)
    assert bool(found.entropy[good].isfinite().all())
    torch.autograd.backward([found.logprob, found.entropy], [torch.ones(5, device=device)] * 2)
    assert leaf.grad is not None
    finite = [3, 4] if transform else [0, 3, 4]  # tanh at -inf has the slope 0 in closed form
    assert bool(leaf.grad[finite].isfinite().all())
    assert bool(leaf.grad[1].isnan().all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_target_outside_the_vocabulary(implementation: ModuleType, device: torch.device) -> None:
    hidden, weight, _, targets = make(4, 8, 50, device)
    targets = torch.tensor([1, 50, -1, -100], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"2 targets lie outside the vocabulary of 50 \(the first is 50\)"):
            linear_logprobs(hidden, weight, targets, implementation=implementation)
    rows = chunked.Rows.empty(4, hidden, chunked.Settings())
    logits = hidden @ weight.t()
    arguments = chunked.Settings().arguments
    implementation.token_logprobs_and_gradient(
        logits, targets, rows.logprob, rows.statistics, rows.argmax, None, *arguments
    )
    assert rows.logprob.isnan().tolist() == [False, True, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, True, False]
    again = hidden @ weight.t()
    implementation.token_logprobs_backward(
        again, targets, rows.statistics, None, torch.ones_like(rows.logprob), None, *arguments
    )
    assert again.isnan().all(1).tolist() == [False, True, True, False]
    assert not again[3].any()


def test_wrong_arguments_say_why(device: torch.device) -> None:
    hidden, weight, bias, targets = make(4, 8, 50, device)
    with pytest.raises(ValueError, match="flatten batch and sequence"):
        linear_logprobs(hidden.unsqueeze(0), weight, targets)
    with pytest.raises(ValueError, match=r"expected hidden \[T, H\]"):
        linear_logprobs(hidden, weight, targets, bias[:-1])
    with pytest.raises(ValueError, match="int64"):
        linear_logprobs(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprobs(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="softcap must be positive"):
        linear_logprobs(hidden, weight, targets, softcap=0.0)
    with pytest.raises(ValueError, match="chunk_size"):
        linear_logprobs(hidden, weight, targets, chunk_size=0)
    with pytest.raises(ValueError, match="targets must be int64"):
        logprobs_from_logits(hidden, targets[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_strided_hidden_and_same_bits_twice(implementation: ModuleType, trained: bool, device: torch.device) -> None:
    hidden, weight, _, targets = make(10, 16, 200, device)
    weight.requires_grad_(trained)
    wide = torch.zeros(10, 32, device=device)
    wide[:, ::2] = hidden
    results = []
    for source in (hidden, wide[:, ::2], hidden):
        leaf = source.detach().requires_grad_()
        found = linear_logprobs(leaf, weight, targets, entropy=True, chunk_size=4, implementation=implementation)
        assert found.entropy is not None
        inputs = [leaf, weight] if trained else [leaf]
        grads = torch.autograd.grad(found.logprob.sum() + found.entropy.sum(), inputs)
        results.append([found.logprob, found.entropy, *grads])
    for first, strided, again in zip(*results, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, strided)


def test_only_the_gradients_that_are_wanted(device: torch.device) -> None:
    hidden, weight, bias, targets = make(6, 8, 50, device)
    weight.requires_grad_()
    linear_logprobs(hidden, weight, targets, bias, chunk_size=4).logprob.sum().backward()
    assert weight.grad is not None
    assert hidden.grad is None
    found = linear_logprobs(hidden, weight.detach(), targets, bias.requires_grad_(), entropy=True)
    assert found.entropy is not None
    found.entropy.sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets).logprob.requires_grad


def test_frozen_head_makes_no_product_in_backward(device: torch.device) -> None:
    hidden, weight, _, targets = make(12, 8, 300, device)
    hidden.requires_grad_()
    found = linear_logprobs(hidden, weight, targets, chunk_size=4)
    seen = Recorder()
    with seen:
        (found.logprob * torch.randn(12, device=device)).sum().backward()
    assert not {"mm", "addmm", "addmm_"} & seen.names


class Recorder(TorchDispatchMode):
    """The names of the operators that ran, and the most elements that any of their results has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [8, None])
def test_the_logits_are_never_held(
    trained: bool, chunk: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocabulary = 64, 2000
    monkeypatch.setattr(chunked, "CPU_BYTES", 8 * vocabulary * 4)
    monkeypatch.setattr(chunked, "GPU_BYTES", 8 * vocabulary * 4)
    hidden, weight, _, targets = make(rows, 4, vocabulary, device)
    seen = Recorder()
    with seen:
        found = linear_logprobs(
            hidden.requires_grad_(), weight.requires_grad_(trained), targets, entropy=True, chunk_size=chunk
        )
        assert found.entropy is not None
        (found.logprob.sum() + found.entropy.sum()).backward()
    assert "addmm_" in seen.names
    assert seen.largest <= 8 * (vocabulary + 63)


def test_chunks_cover_the_rows_evenly(device: torch.device) -> None:
    for rows in (0, 1, 63, 64, 1000, 8192):
        for vocabulary in (100, 128256, 10_000_000):
            parts = chunked.chunks(rows, vocabulary, torch.bfloat16, device, None)
            assert [r for part in parts for r in range(part.start, part.stop)] == list(range(rows))
            budget = chunked.CPU_BYTES if device.type == "cpu" else chunked.GPU_BYTES
            assert all((p.stop - p.start) * vocabulary * 2 <= budget or p.stop - p.start == 1 for p in parts)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "lengths"),
    [(1023, 128256, [1023]), (1024, 128256, [512] * 2), (2000, 128256, [1024, 976]), (8192, 32000, [4096] * 2),
     (8192, 128256, [2048] * 4)],
)  # fmt: skip
def test_short_batches_go_through_a_frozen_head_in_halves(rows: int, vocabulary: int, lengths: list[int]) -> None:
    gpu = torch.device("cuda")
    parts = chunked.chunks(rows, vocabulary, torch.bfloat16, gpu, None, halves=True)
    assert [part.stop - part.start for part in parts] == lengths
    for device, halves in ((gpu, False), (torch.device("cpu"), True)):
        whole = chunked.chunks(1024, 4000, torch.bfloat16, device, None, halves=halves)
        assert [part.stop - part.start for part in whole] == [1024]


def test_dtypes(device: torch.device) -> None:
    hidden, weight, _, targets = make(6, 8, 50, device)
    half = torch.bfloat16
    assert chunked.compute_dtype(hidden.to(half), weight) == torch.float32
    assert chunked.compute_dtype(hidden, weight.to(half)) == half
    with torch.autocast(device.type, half):
        assert chunked.compute_dtype(hidden, weight) == half
        assert chunked.compute_dtype(hidden.double(), weight.double()) == torch.float64
        hidden.requires_grad_(), weight.requires_grad_()
        ours = linear_logprobs(hidden, weight, targets, implementation=reference)
        theirs, _ = full_logprobs(torch.nn.functional.linear(hidden, weight), targets)
    torch.testing.assert_close(ours.logprob, theirs)
    mine = torch.autograd.grad(ours.logprob.sum(), (hidden, weight))
    expected = torch.autograd.grad(theirs.sum(), (hidden, weight))
    for gradient, other in zip(mine, expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, rtol=2e-2, atol=2e-2)


def test_fp64_gradients_are_exact() -> None:
    hidden, weight, bias, targets = make(4, 3, 6, torch.device("cpu"), torch.float64)

    def op(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        found = linear_logprobs(h, w, targets, b, softcap=4.0, temperature=0.8, entropy=True, chunk_size=3)
        return found.logprob, found.entropy

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in (hidden, weight, bias)])


@pytest.mark.interpreter
def test_opcheck(device: torch.device) -> None:
    logits = torch.randn(3, 20, device=device)
    targets = torch.tensor([1, -100, 19], device=device)
    rows = chunked.Rows.empty(3, logits, chunked.Settings(entropy=True))
    end = (1.0, 5.0, 0.5, -100)
    for argmax, entropy in ((rows.argmax, rows.entropy), (rows.argmax, None), (None, None)):
        for op in (kernel.token_logprobs, kernel.token_logprobs_and_gradient):
            torch.library.opcheck(op.op, (logits, targets, rows.logprob, rows.statistics, argmax, entropy, *end))
    up = torch.randn(3, device=device)
    for grads in ((up, up), (None, up), (up, None)):
        torch.library.opcheck(
            kernel.token_logprobs_backward.op, (logits, targets, rows.statistics, rows.entropy, *grads, *end)
        )


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_compiles_as_one_graph(implementation: ModuleType | None, trained: bool, device: torch.device) -> None:
    hidden, weight, _, targets = make(6, 8, 50, device)

    def step(h: Tensor, w: Tensor) -> Tensor:
        found = linear_logprobs(h * 2, w, targets, chunk_size=4, entropy=True, implementation=implementation)
        again = logprobs_from_logits(h @ w.t(), targets, implementation=implementation)
        assert found.entropy is not None
        return found.logprob.sum() + found.entropy.sum() + again.logprob.sum()

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
def test_gpu_16_bit(
    shape: tuple[int, int, int, int | None], transform: dict[str, float], trained: bool, dtype: torch.dtype
) -> None:
    rows, width, vocabulary, chunk = shape
    device = torch.device("cuda")
    hidden, weight, _, targets = make(rows, width, vocabulary, device, dtype)
    up = (torch.randn(rows, device=device), torch.randn(rows, device=device) if trained else None)
    leaves: list[Tensor | None] = [hidden, weight, None]

    def ours(h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found = linear_logprobs(h, w, targets, b, entropy=True, chunk_size=chunk, **transform)
        return found.logprob, found.entropy

    def whole(h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return full_logprobs(torch.nn.functional.linear(h, w, b), targets, **transform)

    needs = (True, trained, False)
    truth = run(whole, leaves, up, torch.float64, needs)
    theirs = run(whole, leaves, up, dtype, needs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine = run(ours, leaves, up, dtype, needs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_accurate(mine, theirs, truth, NAMES)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_logits() -> None:
    rows, vocabulary = 8300, 262144  # 2.18e9 elements, 4.1 GiB in bf16
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    targets = torch.full((rows,), vocabulary - 1, device="cuda")
    logits[-1, -1] = 4
    found = logprobs_from_logits(logits.requires_grad_(), targets, entropy=True)
    expected, _ = full_logprobs(logits[-1:].detach(), targets[-1:])
    torch.testing.assert_close(found.logprob[-1:], expected)
    assert int(found.argmax[-1]) == vocabulary - 1
    found.logprob[-1].backward()
    assert logits.grad is not None
    assert float(logits.grad[-1, -1]) > 0.99
    assert not logits.grad[-2].any()
