"""Cases of ``benchmarks.ops`` that read or write weights: decoding of every format, quantization, thin products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.ops_cases import BF16, Case, Sizes, ends, error, functions, judged, other, poisoned

DECODED = 6  # rotating sets: 4096 x 4096 in bf16 are 34 MB


def shapes(s: Sizes) -> list[tuple[int, int]]:
    return [(s.inner, s.hidden), (s.hidden, s.inner), (s.hidden, s.hidden)]


def nf4(s: Sizes) -> Iterator[Case]:
    op, reference = functions("nf4", s.device), functions("nf4", torch.device("cpu"))
    bnb = other("bitsandbytes")
    code = torch.linspace(-1, 1, 16, device=s.device)
    code2 = torch.linspace(-1, 1, 256, device=s.device)
    for rows, columns in shapes(s):
        blocks, sets = rows * columns // 64, []
        for _ in range(DECODED if rows == columns else 3):
            packed = torch.randint(0, 256, (rows * columns // 2,), device=s.device, dtype=torch.uint8)
            absmax = torch.randint(0, 256, (blocks,), device=s.device, dtype=torch.uint8)
            absmax2 = torch.rand((blocks + 255) // 256, device=s.device)
            offset = torch.tensor(0.5, device=s.device)
            sets.append((packed, absmax, (code2, absmax2, offset, 256)))
        outs = [torch.empty(rows, columns, device=s.device, dtype=BF16) for _ in sets]
        padded = [torch.empty(rows, columns + 16, device=s.device, dtype=BF16)[:, :columns] for _ in sets]

        def check(
            sets: Any = sets, outs: Any = padded, rows: int = rows, columns: int = columns
        ) -> tuple[float, float]:
            packed, absmax, nested = sets[0]
            op.decode(packed, absmax, code, 64, poisoned(outs[0]), nested=nested)
            count = min(rows, 128)
            truth = torch.empty(count, columns, device=s.device, dtype=torch.float32)
            reference.decode(packed, absmax, code, 64, truth, nested=nested, row_start=rows - count)
            exact = torch.equal(outs[0][-count:], truth.to(BF16))
            found = judged((outs[0][-count:], truth.double()))
            return (0.0, found[1]) if exact and error(outs[0], outs[0].double()) == 0 else found

        moved = rows * columns // 2 + blocks + blocks // 64 + rows * columns * 2
        for name, targets in ((f"nf4 decode {rows}x{columns}", outs), (f"nf4 decode {rows}x{columns}, padded", padded)):
            yield Case(name, "fastplug", moved,
                       [lambda a=a, o=o: op.decode(a[0], a[1], code, 64, o, nested=a[2])
                        for a, o in zip(sets, targets)], check)  # fmt: skip
        if bnb:
            weights = [s.random(rows, columns) for _ in range(3)]
            states = [bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in weights]
            del weights
            yield Case(f"nf4 decode {rows}x{columns}", "bitsandbytes", moved,
                       [lambda q=q, st=st: bnb.functional.dequantize_4bit(q, st) for q, st in states])  # fmt: skip


def formats(s: Sizes) -> Iterator[Case]:
    """Decoding of the other weight formats, as far as this version of fastplug has them."""
    rows, columns = s.inner, s.hidden
    N, K = rows, columns

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, device=s.device, dtype=torch.uint8)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, device=s.device, dtype=torch.int32)

    def scales(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.rand(*shape, device=s.device).add_(0.5).to(dtype)

    def small_floats(*shape: int) -> torch.Tensor:
        return s.random(*shape, dtype=torch.float32).clamp_(-3, 3).to(torch.float8_e4m3fn)

    def cases(op_name: str, layouts: dict[str, tuple[Any, Callable[[], tuple[Any, ...]], dict[str, Any], int]]) -> Any:
        op, reference = functions(op_name, s.device), functions(op_name, torch.device("cpu"))
        for name, (layout, make, also, stored) in layouts.items():
            sets = [make() for _ in range(3)]
            outs = [torch.empty(N, K, device=s.device, dtype=BF16) for _ in sets]

            def check(
                sets: Any = sets, outs: Any = outs, layout: Any = layout, also: Any = also
            ) -> tuple[float, float]:
                op.decode(*sets[0], layout, poisoned(outs[0]), **also)
                truth = torch.empty(min(N, 128), K, device=s.device, dtype=torch.float32)
                reference.decode(*sets[0], layout, truth, **also)
                return judged((outs[0][: len(truth)], truth.double()))

            yield Case(f"{name} {N}x{K}", "fastplug", stored + N * K * 2,
                       [lambda a=a, o=o, y=layout, z=also: op.decode(*a, y, o, **z) for a, o in zip(sets, outs)],
                       check)  # fmt: skip

    if importlib.util.find_spec("fastplug.ops.int_weights"):
        from fastplug.ops.int_weights.reference import Layout as Int

        zeros = torch.randint(0, 2**31, (K // 128, N * 4 // 32), device=s.device, dtype=torch.int32).t()
        yield from cases("int_weights", {
            "int8 decode (LLM.int8)": (
                Int((N, K), 8, "row", K, "twos", factor=1 / 127),
                lambda: (codes(N, K).view(torch.int8), scales(N, 1, dtype=torch.float32)), {}, N * K + N * 4,
            ),
            "int4 decode (GPTQ, group 128)": (
                Int((N, K), 4, "input", 128, packed_zeros=True, zero_plus_one=True),
                lambda: (codes(K // 8, N, 4).view(torch.int32).squeeze(-1), scales(K // 128, N).t()),
                {"zeros": zeros}, N * K // 2 + N * K // 128 * 2,
            ),
            "int4 decode (AWQ, group 128)": (
                Int((N, K), 4, "output", 128, packed_zeros=True),
                lambda: (codes(K, N // 8, 4).view(torch.int32).squeeze(-1), scales(K // 128, N).t()),
                {"zeros": zeros}, N * K // 2 + N * K // 128 * 2,
            ),
            "int4 decode (rows, group 128)": (
                Int((N, K), 4, "row", 128, "offset"),
                lambda: (codes(N, K // 8, 4).view(torch.int32).squeeze(-1), scales(N, K // 128)), {},
                N * K // 2 + N * K // 128 * 2,
            ),
            "int4 decode (rows, group 128, zeros in 16 bits)": (
                Int((N, K), 4, "row", 128, "twos", add_zero=True),
                lambda: (codes(N, K // 2), scales(K // 128, N).t()), {"zeros": scales(K // 128, N).t()},
                N * K // 2 + N * K // 128 * 4,
            ),
            "int4 decode (GPTQ in act-order, group 128)": (
                Int((N, K), 4, "input", 128, packed_zeros=True, zero_plus_one=True),
                lambda: (codes(K // 8, N, 4).view(torch.int32).squeeze(-1), scales(K // 128, N).t()),
                {"zeros": zeros, "g_idx": (torch.randperm(K, device=s.device) // 128).int()},
                N * K // 2 + N * K // 128 * 2,
            ),
            **{
                f"int{bits} decode (GPTQ, group 128)": (
                    Int((N, K), bits, "input", 128, packed_zeros=True, zero_plus_one=True),
                    lambda bits=bits: (words(K * bits // 32, N), scales(K // 128, N).t()),
                    {"zeros": words(K // 128, N * bits // 32).t()}, N * K * bits // 8 + N * K // 128 * 2,
                )
                for bits in (2, 3, 8)
            },
            **{
                f"int{bits} decode (HQQ, group 64)": (
                    Int((N, K), bits, "split", 64),
                    lambda bits=bits: (words(-(-N * K // 640) * 64) if bits == 3 else codes(N * bits // 8, K),
                                       scales(N, K // 64)),
                    {"zeros": scales(N, K // 64)}, N * K * bits // 8 + N * K // 64 * 4,
                )
                for bits in (4, 8, 3, 2, 1)
            },
        })  # fmt: skip
    if importlib.util.find_spec("fastplug.ops.float_weights"):
        from fastplug.ops.float_weights.reference import Layout as Float

        yield from cases("float_weights", {
            "fp8 decode (scale a row)": (
                Float((N, K), "e4m3", (1, K)),
                lambda: (small_floats(N, K), scales(N, 1, dtype=torch.float32)), {}, N * K + N * 4,
            ),
            "fp8 decode (128x128 blocks)": (
                Float((N, K), "e4m3", (128, 128)),
                lambda: (small_floats(N, K), scales(-(-N // 128), -(-K // 128), dtype=torch.float32)), {}, N * K,
            ),
            "fp8 decode (one scale)": (
                Float((N, K), "e4m3", (N, K)),
                lambda: (small_floats(N, K), scales(1, 1, dtype=torch.float32)), {}, N * K,
            ),
            "mxfp8 decode": (
                Float((N, K), "e4m3", (1, 32), "e8m0"),
                lambda: (small_floats(N, K),
                         torch.randint(120, 134, (N, K // 32), device=s.device, dtype=torch.uint8)),
                {}, N * K + N * K // 32,
            ),
            "mxfp4 decode": (
                Float((N, K), "e2m1", (1, 32), "e8m0"),
                lambda: (codes(N, K // 2), torch.randint(120, 134, (N, K // 32), device=s.device, dtype=torch.uint8)),
                {}, N * K // 2 + N * K // 32,
            ),
            "nvfp4 decode": (
                Float((N, K), "e2m1", (1, 16), "e4m3"),
                lambda: (codes(N, K // 2), small_floats(N, K // 16)), {"outer": torch.ones(1, device=s.device)},
                N * K // 2 + N * K // 16,
            ),
        })  # fmt: skip


def fp8(s: Sizes) -> Iterator[Case]:
    if not importlib.util.find_spec("fastplug.ops.fp8"):
        return
    op, reference = functions("fp8", s.device), functions("fp8", torch.device("cpu"))
    for width in (s.hidden, s.inner):
        xs = [s.random(s.tokens, width) for _ in range(3)]

        def check(x: torch.Tensor = xs[0]) -> tuple[float, float]:
            (q, scale), (want, factor) = op.quantize_rows(x), reference.quantize_rows(x)
            return error(q.float() * scale[:, None], want.double() * factor[:, None]), 2e-3

        yield Case(f"fp8 quantize rows, width {width}", "fastplug", s.tokens * width * 3 + s.tokens * 4,
                   [lambda x=x: op.quantize_rows(x) for x in xs], check)  # fmt: skip
    N, K = s.inner, s.hidden
    ws = [s.random(N, K) for _ in range(3)]
    scale = op.column_scales(ws[0])
    q = torch.empty(K, N, device=s.device, dtype=torch.float8_e4m3fn)

    def check_columns() -> tuple[float, float]:
        got, want = op.quantize_columns(ws[0], scale), reference.quantize_columns(ws[0], scale)
        return error(got.float(), want.double()), 2e-3

    yield Case(f"fp8 quantize columns {N}x{K}", "fastplug", N * K * 3,
               [lambda w=w: op.quantize_columns(w, scale, q) for w in ws], check_columns)  # fmt: skip
    if s.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        x8, x_scale = op.quantize_rows(s.random(s.tokens, K))
        w8, w_scale = op.quantize_rows(ws[0])
        yield Case(f"fp8 product {s.tokens}x{N}x{K}", "fastplug", 0,
                   [lambda: op.product(x8, x_scale, w8, w_scale, BF16)], flops=2 * s.tokens * N * K)  # fmt: skip


def quantize_4bit(s: Sizes) -> Iterator[Case]:
    if not importlib.util.find_spec("fastplug.ops.quantize_4bit"):
        return
    op, reference = functions("quantize_4bit", s.device), functions("quantize_4bit", torch.device("cpu"))
    N, K = s.inner, s.hidden
    ws = [s.random(N, K) for _ in range(3)]

    def check() -> tuple[float, float]:
        (packed, absmax), (want, scales) = op.quantize(ws[0][:256]), reference.quantize(ws[0][:256])
        return max(error(absmax, scales.double()), float((packed != want).float().mean())), 1e-5

    yield Case(f"nf4 quantize {N}x{K}", "fastplug", N * K * 2 + N * K // 2 + N * K // 16,
               [lambda w=w: op.quantize(w) for w in ws], check)  # fmt: skip
    bnb = other("bitsandbytes")
    if bnb:
        yield Case(f"nf4 quantize {N}x{K}", "bitsandbytes", N * K * 2 + N * K // 2 + N * K // 16,
                   [lambda w=w: bnb.functional.quantize_4bit(w, quant_type="nf4") for w in ws],
                   capture=False)  # fmt: skip


def products(s: Sizes) -> Iterator[Case]:
    """What cuBLAS does with the base products, and with the adapters' thin ones: those should read each tensor once."""
    M, N, K, r = s.tokens, s.inner, s.hidden, s.rank
    x, w, dy, out = s.random(M, K), s.random(N, K), s.random(M, N), torch.empty(M, N, device=s.device, dtype=BF16)

    def check() -> tuple[float, float]:
        torch.mm(x, w.t(), out=poisoned(out))
        truth = ends(x).double() @ w.double().t()
        own = ends(x) @ w.t()
        return error(ends(out), truth), 2 * error(own, truth)

    yield Case(f"base product {M}x{N}x{K}", "torch", 0, [lambda: torch.mm(x, w.t(), out=out)], check,
               flops=2 * M * N * K)  # fmt: skip
    yield Case(f"base product {M}x{K}x{N}, backward", "torch", 0, [lambda: torch.mm(dy, w)], flops=2 * M * N * K)
    wide = K + 64
    xp, wp = s.random(M, wide), s.random(N, wide)
    yield Case(f"base product {M}x{N}x{wide}, adapter beside it", "torch", 0, [lambda: torch.mm(xp, wp.t(), out=out)],
               flops=2 * M * N * K)  # fmt: skip
    a, b, t = s.random(r, K), s.random(N, r), s.random(M, r)
    xs, dys = [x, s.random(M, K), s.random(M, K)], [dy, s.random(M, N)]
    yield Case(f"thin x A', rank {r}", "torch", M * K * 2, [lambda x=x: x @ a.t() for x in xs])
    yield Case(f"thin dA = g' x, rank {r}", "torch", M * K * 2, [lambda x=x: t.t() @ x for x in xs])
    yield Case(f"thin dy B, rank {r}", "torch", M * N * 2, [lambda d=d: d @ b for d in dys])
    yield Case(f"thin dB = dy' t, rank {r}", "torch", M * N * 2, [lambda d=d: d.t() @ t for d in dys])
