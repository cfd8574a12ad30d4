"""Each op against the measured ceiling of this GPU: copy bandwidth for what moves bytes, cuBLAS for what multiplies.

    python -m benchmarks.ops --out benchmarks/results/ops-h100.json

Bytes are counted once per tensor read and once per tensor written. A device-to-device copy sets the ceiling, counted
the same way. Inputs rotate, so that nothing stays in the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastplug.ops.glu import kernel as glu
from fastplug.ops.logprobs import kernel as logprobs
from fastplug.ops.nf4 import kernel as nf4
from fastplug.ops.rms_norm import kernel as rms_norm
from fastplug.ops.rope import kernel as rope

BF16 = torch.bfloat16
TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 8192, 4096, 14336, 32, 8, 128, 128256
SETS = 3  # of inputs, each several times the L2


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def milliseconds(calls: list[Callable[[], Any]], repeats: int = 30) -> float:
    """Median over ``repeats`` calls, cycling through ``calls`` (same work, different tensors)."""
    for call in calls:
        call()
    times = []
    cycle = itertools.cycle(calls)
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # hides the launch overhead: the GPU is still busy when the kernels are queued
        call = next(cycle)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """TB/s of a device-to-device copy, bytes read plus bytes written."""
    buffers = [torch.empty(2**29, device="cuda", dtype=torch.uint8) for _ in range(4)]
    pairs = list(zip(buffers[::2], buffers[1::2]))
    return 2 * 2**29 / milliseconds([lambda a=a, b=b: b.copy_(a) for a, b in pairs]) / 1e9


def nf4_inputs(rows: int, columns: int) -> tuple[tuple[Any, ...], torch.Tensor]:
    blocks = rows * columns // 64
    packed = torch.randint(0, 256, (rows * columns // 2,), device="cuda", dtype=torch.uint8)
    absmax = torch.randint(0, 256, (blocks,), device="cuda", dtype=torch.uint8)
    nested = (random(256, dtype=torch.float32), random((blocks + 255) // 256, dtype=torch.float32),
              random(1, dtype=torch.float32)[0], 256)  # fmt: skip
    code = random(16, dtype=torch.float32)
    return (packed, absmax, code, 64, nested), torch.empty(rows, columns, device="cuda", dtype=BF16)


def cases() -> list[tuple[str, int, list[Callable[[], Any]]]]:
    """(name, bytes moved at least, calls)."""
    found: list[tuple[str, int, list[Callable[[], Any]]]] = []
    stream = TOKENS * HIDDEN * 2
    xs = [random(TOKENS, HIDDEN) for _ in range(3 * SETS)]
    weight = random(HIDDEN)
    found.append(("rms_norm forward", 2 * stream, [lambda x=x: rms_norm.forward(x, weight, 1e-5) for x in xs]))
    pairs = list(zip(xs[::2], xs[1::2]))
    found.append((
        "rms_norm forward + residual", 4 * stream,
        [lambda x=x, r=r: rms_norm.forward(x, weight, 1e-5, residual=r) for x, r in pairs],
    ))  # fmt: skip
    rstd = rms_norm.forward(xs[0], weight, 1e-5)[2]
    triples = list(zip(xs[::3], xs[1::3], xs[2::3]))
    found.append((
        "rms_norm backward + residual gradient", 4 * stream,
        [lambda d=d, h=h, s=s: rms_norm.backward(d, h, rstd, weight, dh=s) for d, h, s in triples],
    ))  # fmt: skip
    wide = (HEADS + 2 * KV_HEADS) * HEAD
    buffers = [random(TOKENS, wide) for _ in range(SETS)]
    cos, sin = random(1, TOKENS // 4, HEAD), random(1, TOKENS // 4, HEAD)

    def rotate(buffer: torch.Tensor) -> None:
        parts = buffer.view(4, TOKENS // 4, HEADS + 2 * KV_HEADS, HEAD).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        rope.forward(parts[0], parts[1], cos, sin, parts[0], parts[1])

    found.append(
        ("rope in place", 2 * TOKENS * (HEADS + KV_HEADS) * HEAD * 2, [lambda b=b: rotate(b) for b in buffers])
    )
    inner = TOKENS * INNER * 2
    gates = [random(TOKENS, 2 * INNER) for _ in range(2)]
    outs = [random(TOKENS, INNER) for _ in range(2)]
    found.append((
        "swiglu forward", 3 * inner,
        [lambda g=g, o=o: glu.forward(g[:, :INNER], g[:, INNER:], "silu", o) for g, o in zip(gates, outs)],
    ))  # fmt: skip
    grads = random(TOKENS, 2 * INNER)
    found.append((
        "swiglu backward + activation", 6 * inner,
        [lambda g=g, o=o: glu.backward(o, g[:, :INNER], g[:, INNER:], "silu", grads[:, :INNER], grads[:, INNER:],
                                       outs[1] if o is outs[0] else outs[0]) for g, o in zip(gates, outs)],
    ))  # fmt: skip
    for rows, columns in ((INNER, HIDDEN), (HIDDEN, INNER), (1024, HIDDEN)):
        sets = [nf4_inputs(rows, columns) for _ in range(2 * SETS if rows == 1024 else SETS)]
        moved = rows * columns // 2 + rows * columns // 64 + rows * columns * 2
        found.append((
            f"nf4 decode {rows}x{columns}, nested", moved,
            [lambda a=a, o=o: nf4.decode(a[0], a[1], a[2], a[3], o, nested=a[4]) for a, o in sets],
        ))  # fmt: skip
    rows = 1024
    logits = [random(rows, VOCABULARY) for _ in range(SETS)]
    targets = torch.randint(0, VOCABULARY, (rows,), device="cuda")
    outputs = (torch.empty(rows, device="cuda"), torch.empty(rows, 2, device="cuda"),
               torch.empty(rows, device="cuda", dtype=torch.int64), None)  # fmt: skip
    found.append((
        "log-probabilities and gradient (2 reads, 1 write)", 3 * rows * VOCABULARY * 2,
        [lambda z=z: logprobs.token_logprobs_and_gradient(z, targets, *outputs, 1.0, 0.0, 1.0, -100) for z in logits],
    ))  # fmt: skip
    found.append((
        "log-probabilities", rows * VOCABULARY * 2,
        [lambda z=z: logprobs.token_logprobs(z, targets, *outputs, 1.0, 0.0, 1.0, -100) for z in logits],
    ))  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    ceiling = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {ceiling:.2f} TB/s")
    results = []
    for name, moved, calls in cases():
        ms = milliseconds(calls)
        rate = moved / ms / 1e9
        results.append(
            {"op": name, "ms": round(ms, 4), "tb_per_s": round(rate, 3), "of_copy": round(rate / ceiling, 3)}
        )
        print(f"{name:52s}{ms:9.4f} ms {rate:6.2f} TB/s {rate / ceiling:6.0%} of copy", flush=True)
    if a.out:
        from benchmarks.step import versions

        record = {"gpu": torch.cuda.get_device_name(), "copy_tb_per_s": ceiling, "versions": versions(), "ops": results}
        a.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
