"""The ops that ``benchmarks.ops`` measures: inputs, calls, the bytes that none can do without, a check."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastplug.ops.adapted_glu import reference
from fastplug.ops.adapted_rope import reference as rope_reference

BF16 = torch.bfloat16
Calls = list[Callable[[], Any]]


@dataclass(frozen=True)
class Sizes:
    """Llama-3.1-8B's by default, at 8,192 tokens: one tensor is larger than the L2 cache of an H100."""

    device: torch.device
    tokens: int = 8192
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128256
    chunk: int = 1024  # rows of logits
    rank: int = 16

    def random(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One op of one library.

    Attributes:
        op: What is computed; cases with the same name do the same work.
        library: ``fastplug``, or whose kernel stands beside.
        bytes: That must be read or written, each tensor once.
        calls: The same work on different tensors.
        check: ``(error, bound)``, run before the timing; None for other libraries.
        flops: Instead of ``bytes`` where the tensor cores are the limit.
        capture: Whether a CUDA graph can hold it.
    """

    op: str
    library: str
    bytes: int
    calls: Calls
    check: Callable[[], tuple[float, float]] | None = None
    flops: int = 0
    capture: bool = True


def functions(op: str, device: torch.device) -> Any:
    """The Triton implementation of an op, or its reference where there is no GPU."""
    return importlib.import_module(f"fastplug.ops.{op}.{'kernel' if device.type == 'cuda' else 'reference'}")


def other(module: str) -> Any:
    """A peer's module, or None if it is not installed or needs a GPU that is not there."""
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """|out - truth| / |truth|; infinite if anything was left unwritten."""
    if not bool(torch.isfinite(out.float()).all()):
        return float("inf")
    return float((out.double() - truth).norm() / truth.norm())


def judged(*pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """The worst of several ``(out, truth in fp64)`` against twice what rounding the truth once would cost."""
    found = [(error(out, truth), 2 * error(truth.to(out.dtype), truth) + 1e-7) for out, truth in pairs]
    return max(found, key=lambda pair: pair[0] / pair[1])


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan"))


def ends(x: torch.Tensor, rows: int = 128) -> torch.Tensor:
    """The first and last rows: the oracle in fp64 need not be as large as the op."""
    return x if len(x) <= 2 * rows else torch.cat((x[:rows], x[-rows:]))


def rms_norm(s: Sizes) -> Iterator[Case]:
    op, liger = functions("rms_norm", s.device), other("liger_kernel.ops.rms_norm")
    stream = s.tokens * s.hidden * 2
    xs = [s.random(s.tokens, s.hidden) for _ in range(9)]
    weight, eps = 1 + 0.1 * s.random(s.hidden), 1e-5
    rstd = op.forward(xs[0], weight, eps)[2]

    def truth(h: torch.Tensor) -> torch.Tensor:
        h = ends(h).double()
        n = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(BF16).double()
        return n * weight.double()

    def check_forward() -> tuple[float, float]:
        y, h, _ = op.forward(xs[0], weight, eps, residual=xs[1], out=poisoned(torch.empty_like(xs[0])))
        plain = op.forward(xs[0], weight, eps, out=poisoned(torch.empty_like(xs[0])))[0]
        total = ends(xs[0]).double() + ends(xs[1]).double()
        return judged((ends(h), total), (ends(y), truth(h)), (ends(plain), truth(xs[0])))

    def check_backward() -> tuple[float, float]:
        dx, dw = op.backward(xs[1], xs[0], rstd, weight, dh=xs[2], weight_grad=True)
        h = xs[0].double().requires_grad_()
        w = weight.double().requires_grad_()
        (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w).backward(xs[1].double())
        return judged((dx, h.grad + xs[2].double()), (dw, w.grad))  # type: ignore[operator, arg-type]

    pairs, triples = list(zip(xs[::2], xs[1::2])), list(zip(xs[::3], xs[1::3], xs[2::3]))
    name = "rms_norm forward"
    yield Case(name, "fastplug", 2 * stream, [lambda x=x: op.forward(x, weight, eps) for x in xs], check_forward)
    if liger:
        yield Case(name, "liger", 2 * stream,
                   [lambda x=x: liger.rms_norm_forward(x, weight, eps, 0.0, "llama", None) for x in xs])  # fmt: skip
    yield Case("rms_norm forward + residual", "fastplug", 4 * stream,
               [lambda x=x, r=r: op.forward(x, weight, eps, residual=r) for x, r in pairs], check_forward)  # fmt: skip
    fused = other("liger_kernel.ops.fused_add_rms_norm")
    if fused:
        yield Case("rms_norm forward + residual", "liger", 4 * stream,
                   [lambda x=x, r=r: fused.fused_add_rms_norm_forward(x, r, weight, eps, 0.0, "llama")
                    for x, r in pairs])  # fmt: skip
    name = "rms_norm backward, frozen weight"
    yield Case(name, "fastplug", 3 * stream,
               [lambda d=d, h=h: op.backward(d, h, rstd, weight) for d, h in pairs], check_backward)  # fmt: skip
    yield Case("rms_norm backward + residual gradient", "fastplug", 4 * stream,
               [lambda d=d, h=h, r=r: op.backward(d, h, rstd, weight, dh=r) for d, h, r in triples],
               check_backward)  # fmt: skip
    name = "rms_norm backward + weight gradient"
    yield Case(name, "fastplug", 3 * stream,
               [lambda d=d, h=h: op.backward(d, h, rstd, weight, weight_grad=True) for d, h in pairs],
               check_backward)  # fmt: skip
    if liger:
        saved = liger.rms_norm_forward(xs[0], weight, eps, 0.0, "llama", None)
        _, _, liger_rstd, block, warps, mode = saved
        yield Case(name, "liger", 3 * stream,
                   [lambda d=d, h=h: liger.rms_norm_backward(d, h, weight, liger_rstd, 0.0, mode, block, warps, False,
                                                             None) for d, h in pairs])  # fmt: skip


def rope(s: Sizes) -> Iterator[Case]:
    op, liger = functions("rope", s.device), other("liger_kernel.ops.rope")
    batch, length = (4, s.tokens // 4) if s.tokens % 4 == 0 else (1, s.tokens)
    wide = (s.heads + 2 * s.kv_heads) * s.head
    angle = torch.rand(1, length, s.head // 2, device=s.device) * 6.3
    angle = torch.cat((angle, angle), -1)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    buffers = [s.random(s.tokens, wide) for _ in range(4)]
    heads = [s.heads, s.kv_heads, s.kv_heads]

    def parts(buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return buffer.view(batch, length, sum(heads), s.head).split(heads, dim=2)

    def turn(buffer: torch.Tensor, back: bool = False) -> None:
        q, k, _ = parts(buffer)
        (op.backward if back else op.forward)(q, k, cos, sin, q, k)

    def check() -> tuple[float, float]:
        found = []
        for back in (False, True):
            q, k, _ = (part.clone() for part in parts(buffers[0][: s.tokens]))
            (op.backward if back else op.forward)(q, k, cos, sin, q, k)
            for out, x in zip((q, k), parts(buffers[0])):
                a, b = x[:1].double().chunk(2, -1)
                c, t = (y.double()[:, :, None, : s.head // 2] for y in (cos, -sin if back else sin))
                found.append((out[:1], torch.cat((a * c - b * t, b * c + a * t), -1)))
        return judged(*found)

    moved = 2 * s.tokens * (s.heads + s.kv_heads) * s.head * 2
    yield Case("rope forward, in place", "fastplug", moved, [lambda b=b: turn(b) for b in buffers], check)
    yield Case("rope backward, in place", "fastplug", moved, [lambda b=b: turn(b, True) for b in buffers], check)
    if liger:
        pairs = [(s.random(batch, length, s.heads, s.head).transpose(1, 2),
                  s.random(batch, length, s.kv_heads, s.head).transpose(1, 2)) for _ in range(4)]  # fmt: skip
        yield Case("rope forward, in place", "liger", moved,
                   [lambda q=q, k=k: liger.rope_forward(q, k, cos, sin) for q, k in pairs])  # fmt: skip
    weight = 1 + 0.1 * s.random(s.head)

    def normed(buffer: torch.Tensor) -> None:
        q, k, _ = parts(buffer)
        op.forward(q, k, cos, sin, q, k, q_weight=weight, k_weight=weight, eps=1e-6)

    yield Case("rope forward + head norms (Qwen3)", "fastplug", moved, [lambda b=b: normed(b) for b in buffers])


def adapted_rope(s: Sizes) -> Iterator[Case]:
    """The adapters' shares of q, k and v, and RoPE, in one pass and one by one; a base product's own share of the
    latter, that it adds to what is there, is not in it."""
    op, plain = functions("adapted_rope", s.device), functions("rope", s.device)
    heads = rope_reference.Heads(s.heads, s.kv_heads, s.head)
    widths = [s.head * count for count in (s.heads, s.kv_heads, s.kv_heads)]
    angle = (torch.rand(1, s.tokens, s.head // 2, device=s.device) * 6.3).repeat(1, 1, 2)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    b = torch.block_diag(*(0.3 * s.random(width, s.rank) for width in widths))
    adapted = rope_reference.Adapted(s.random(s.tokens, 3 * s.rank), b, (s.rank, 2 * s.rank, 3 * s.rank))
    buffers = [s.random(s.tokens, sum(widths)) for _ in range(4)]

    def check() -> tuple[float, float]:
        found, truth = buffers[0].clone(), buffers[0].double()
        op.forward(found, adapted, heads, cos, sin)
        wide = adapted._replace(xa=adapted.xa.double(), b=b.double())
        rope_reference.forward(truth, wide, heads, cos.double(), sin.double())
        return judged((found, truth))

    def one_by_one(buffer: torch.Tensor) -> None:
        torch.mm(adapted.xa, b.t(), out=buffer)
        q, k, _ = buffer.view(1, s.tokens, -1, s.head).split([s.heads, s.kv_heads, s.kv_heads], dim=2)
        plain.forward(q, k, cos, sin, q, k)

    moved, name = 2 * s.tokens * sum(widths) * 2, "q, k and v with adapters and rope, in place"
    yield Case(name, "fastplug", moved, [lambda x=x: op.forward(x, adapted, heads, cos, sin) for x in buffers], check)
    yield Case(name, "one by one", moved, [lambda x=x: one_by_one(x) for x in buffers])


def glu(s: Sizes) -> Iterator[Case]:
    op, liger = functions("glu", s.device), other("liger_kernel.ops.swiglu")
    inner = s.tokens * s.inner * 2
    both = [s.random(s.tokens, 2 * s.inner) for _ in range(2)]
    outs = [s.random(s.tokens, s.inner) for _ in range(2)]
    grads = s.random(s.tokens, 2 * s.inner)
    n = s.inner

    def check() -> tuple[float, float]:
        gate, up, out = both[0][:, :n], both[0][:, n:], poisoned(torch.empty_like(outs[0]))
        op.forward(gate, up, "silu", out)
        dgate, dup, again = (poisoned(torch.empty_like(out)) for _ in range(3))
        op.backward(outs[1], gate, up, "silu", dgate, dup, again)
        g, u = ends(gate).double().requires_grad_(), ends(up).double().requires_grad_()
        truth = torch.nn.functional.silu(g) * u
        truth.backward(ends(outs[1]).double())
        assert g.grad is not None
        assert u.grad is not None
        return judged((ends(out), truth.detach()), (ends(again), truth.detach()), (ends(dgate), g.grad),
                      (ends(dup), u.grad))  # fmt: skip

    pairs = list(zip(both, outs))
    yield Case("swiglu forward", "fastplug", 3 * inner,
               [lambda g=g, o=o: op.forward(g[:, :n], g[:, n:], "silu", o) for g, o in pairs], check)  # fmt: skip
    if liger:
        split = [tuple(part.contiguous() for part in g.chunk(2, 1)) for g in both]
        yield Case("swiglu forward", "liger", 3 * inner,
                   [lambda g=g, u=u: liger.swiglu_forward(g, u) for g, u in split])  # fmt: skip
    yield Case("swiglu backward", "fastplug", 5 * inner,
               [lambda g=g, o=o: op.backward(o, g[:, :n], g[:, n:], "silu", grads[:, :n], grads[:, n:])
                for g, o in pairs], check)  # fmt: skip
    yield Case("swiglu backward + activation", "fastplug", 6 * inner,
               [lambda g=g, o=o, b=b: op.backward(o, g[:, :n], g[:, n:], "silu", grads[:, :n], grads[:, n:], b)
                for (g, o), b in zip(pairs, outs[::-1])], check)  # fmt: skip
    if liger:
        yield Case("swiglu backward", "liger", 5 * inner,
                   [lambda g=g, u=u, o=o: liger.swiglu_backward(g, u, o)
                    for (g, u), o in zip(split, outs)])  # fmt: skip


def adapted_glu(s: Sizes) -> Iterator[Case]:
    """The gated unit with the adapters around it, in one pass and one by one; a base product's own share of the latter,
    that it adds to what is there, is not in it."""
    op, plain = functions("adapted_glu", s.device), functions("glu", s.device)
    inner, n, rank = s.tokens * s.inner * 2, s.inner, s.rank
    both, grads = s.random(s.tokens, 2 * n), s.random(s.tokens, 2 * n)
    outs, xa = [s.random(s.tokens, n) for _ in range(2)], s.random(s.tokens, 2 * rank)
    a, gb = 0.3 * s.random(rank, n), s.random(s.tokens, rank)
    b = torch.zeros(2 * n, 2 * rank, device=s.device, dtype=BF16)
    b[:n, :rank], b[n:, rank:] = 0.3 * s.random(n, rank), 0.3 * s.random(n, rank)
    adapted = reference.Adapted(xa, b, (slice(0, rank), slice(rank, 2 * rank)), a)

    def check() -> tuple[float, float]:
        rows = slice(0, min(s.tokens, 256))
        few = adapted._replace(xa=xa[rows])
        wide = reference.Adapted(few.xa.double(), b.double(), few.columns, a.double())
        out, grad = poisoned(torch.empty_like(outs[0][rows])), poisoned(torch.empty_like(both[rows]))
        true, true_grad = torch.empty_like(out, dtype=torch.float64), torch.empty_like(grad, dtype=torch.float64)
        through = op.forward(both[rows], few, "silu", out)
        exact = reference.forward(both[rows].double(), wide, "silu", true)
        thin = op.backward(outs[1][rows], gb[rows], both[rows], few, "silu", grad)
        upstream = outs[1][rows].double(), gb[rows].double()
        truth = reference.backward(*upstream, both[rows].double(), wide, "silu", true_grad)
        own = [(part.to(BF16), other) for part, other in zip(thin.b, truth.b)]
        return judged((out, true), (grad, true_grad), (through, exact), (thin.gb, truth.gb),
                      (thin.a.to(BF16), truth.a), *own)  # fmt: skip

    def forward(out: torch.Tensor) -> None:
        torch.mm(xa, b.t(), out=grads)
        plain.forward(both[:, :n], both[:, n:], "silu", out)
        torch.mm(out, a.t())

    def backward(d: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(gb, a, out=out)
        plain.backward(d, both[:, :n], both[:, n:], "silu", grads[:, :n], grads[:, n:], out)
        torch.mm(grads, b)
        torch.mm(grads[:, :n].t(), xa[:, :rank])
        torch.mm(grads[:, n:].t(), xa[:, rank:])
        torch.mm(gb.t(), out)

    name = "adapted swiglu forward"
    yield Case(name, "fastplug", 3 * inner, [lambda o=o: op.forward(both, adapted, "silu", o) for o in outs], check)
    yield Case(name, "one by one", 3 * inner, [lambda o=o: forward(o) for o in outs])
    name = "adapted swiglu backward"
    yield Case(name, "fastplug", 5 * inner,
               [lambda o=o: op.backward(o, gb, both, adapted, "silu", grads) for o in outs], check)  # fmt: skip
    yield Case(name, "one by one", 5 * inner, [lambda d=d, o=o: backward(d, o) for d, o in (outs, outs[::-1])])


def dora(s: Sizes) -> Iterator[Case]:
    scaling, dots = functions("scaling", s.device), functions("column_dots", s.device)
    x, y, out = (s.random(s.tokens, 2 * s.inner) for _ in range(3))
    scale = torch.rand(2 * s.inner, device=s.device) + 0.5

    def check() -> tuple[float, float]:
        scaling.scale_columns(x, scale, poisoned(out))
        return judged((ends(out), ends(x).double() * scale.double()))

    def check_dots() -> tuple[float, float]:
        few = x[:, : s.hidden], y[:, : s.hidden]
        truth = (few[0].double() * few[1].double()).sum(0)
        return error(dots.column_dots(*few), truth), 2 * error((few[0].float() * few[1].float()).sum(0), truth) + 1e-7

    yield Case("scaled columns", "fastplug", 2 * 2 * x.numel(),
               [lambda x=x: scaling.scale_columns(x, scale, out) for x in (x, y)], check)  # fmt: skip
    yield Case("dot products of columns", "fastplug", 2 * 2 * x.numel(),
               [lambda x=x: dots.column_dots(x, y) for x in (x, out)], check_dots)  # fmt: skip


def logprobs(s: Sizes) -> Iterator[Case]:
    op, liger = functions("logprobs", s.device), other("liger_kernel.ops.cross_entropy")
    rows, size = s.chunk, s.chunk * s.vocabulary * 2
    logits = [s.random(rows, s.vocabulary) for _ in range(3)]
    targets = torch.randint(0, s.vocabulary, (rows,), device=s.device)
    targets[:3] = -100
    out = (torch.empty(rows, device=s.device), torch.empty(rows, 2, device=s.device),
           torch.empty(rows, device=s.device, dtype=torch.int64), None)  # fmt: skip
    rest = (1.0, 0.0, 1.0, -100)

    def check() -> tuple[float, float]:
        changed = logits[0].clone()
        poisoned(out[0]), poisoned(out[1])
        op.token_logprobs_and_gradient(changed, targets, *out, *rest)
        z = ends(logits[0]).double().requires_grad_()
        t = ends(targets)
        truth = -torch.nn.functional.cross_entropy(z, t, ignore_index=-100, reduction="none")
        truth.sum().neg().backward()
        assert z.grad is not None
        own = torch.nn.functional.cross_entropy(ends(logits[0]).float(), t, ignore_index=-100, reduction="none")
        exact, bound = error(ends(out[0]), truth.detach()), 2 * error(-own, truth.detach()) + 1e-7
        gradient = judged((ends(changed), z.grad))
        return max([(exact, bound), gradient], key=lambda pair: pair[0] / pair[1])

    yield Case("log-probabilities", "fastplug", size,
               [lambda z=z: op.token_logprobs(z, targets, *out, *rest) for z in logits], check)  # fmt: skip
    name = "cross entropy and its gradient"
    yield Case(name, "fastplug", 3 * size,
               [lambda z=z: op.token_logprobs_and_gradient(z, targets, *out, *rest) for z in logits],
               check)  # fmt: skip
    statistics = torch.stack((logits[1].float().amax(1), torch.full((rows,), 5.0, device=s.device)), 1)
    upstream = torch.ones(rows, device=s.device)
    yield Case("log-probabilities backward", "fastplug", 2 * size,
               [lambda z=z: op.token_logprobs_backward(z, targets, statistics, None, upstream, None, *rest)
                for z in logits])  # fmt: skip
    if liger:
        for z in logits:
            z.requires_grad_()
        yield Case(name, "liger", 3 * size,
                   [lambda z=z: liger.cross_entropy_forward(z, targets, None, -100, 0.0, 0.0, "mean", None, False)
                    for z in logits], capture=False)  # fmt: skip
