"""The large products of a training step in a row, until the GPU's power limit shows: time and energy of each variant.

    python -m benchmarks.products --out benchmarks/results/products-h100.json
    python -m benchmarks.products --only gate_up --seconds 1 --rounds 3

A product alone on a cool GPU runs faster than the hundreds of a step, which share 700 W. So a variant runs for
`--seconds` without a pause after as long a warm-up, all variants take turns in random order, and beside the time of a
call stands its energy: what a step saves is energy, wherever power is the limit. Variants are ways to write the same
product: adding to what is there or not, in parts of the result, with the weight as it lies or transposed. Energy needs
nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import called, hardware, versions
from benchmarks.weights import STD

BF16 = torch.bfloat16
SMALL = 1e-3  # what is added to is scaled down, so that it stays finite over thousands of calls


@dataclass(frozen=True)
class Product:
    """x Wᵀ of a projection or group (``forward``), or g W of its gradient, with W [out, in]."""

    name: str
    out: int
    into: int
    forward: bool


PRODUCTS = [
    Product("qkv", 6144, 4096, True),
    Product("o", 4096, 4096, True),
    Product("gate_up", 28672, 4096, True),
    Product("down", 4096, 14336, True),
    Product("dx qkv", 6144, 4096, False),
    Product("dx o", 4096, 4096, False),
    Product("dx gate_up", 28672, 4096, False),
    Product("dx down", 4096, 14336, False),
]


def variants(
    product: Product, tokens: int, device: torch.device, scale: int = 1
) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to compute it, all into the same result, which they return."""
    out, into = product.out // scale, product.into // scale
    weight = torch.randn(out, into, device=device).mul_(STD).to(BF16)
    x = torch.randn(tokens, into if product.forward else out, device=device).to(BF16)
    y = torch.randn(tokens, out if product.forward else into, device=device).to(BF16)
    right = weight.t() if product.forward else weight
    turned = right.t().contiguous().t()  # the same matrix, the other way round in memory

    def whole(right: torch.Tensor, beta: float) -> torch.Tensor:
        return y.addmm_(x, right, beta=beta)

    def parts(count: int, beta: float) -> torch.Tensor:
        for part, columns in zip(y.chunk(count, 1), right.chunk(count, 1)):
            part.addmm_(x, columns, beta=beta)
        return y

    def rows(count: int) -> torch.Tensor:
        for part, some in zip(y.chunk(count), x.chunk(count)):
            part.addmm_(some, right, beta=0)
        return y

    return {
        "new": partial(whole, right, 0.0),
        "added": partial(whole, right, SMALL),
        "new, weight turned": partial(whole, turned, 0.0),
        "new, 2 parts of the columns": partial(parts, 2, 0.0),
        "added, 2 parts of the columns": partial(parts, 2, SMALL),
        "new, 2 parts of the rows": partial(rows, 2),
    }


class Meter:
    """Joules that the GPU has used, or nothing where NVML is not installed."""

    def __init__(self) -> None:
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle, self._nvml = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device()), pynvml
        except Exception as error:  # not installed, no GPU, or none that counts
            print(f"no energy: {type(error).__name__}: {error}", flush=True)

    def joules(self) -> float | None:
        if self._handle is None:
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sustained(call: Callable[[], object], seconds: float, meter: Meter) -> dict[str, float]:
    """Milliseconds, millijoules and watts of a call, over ``seconds`` after as long a warm-up."""
    call()
    wait()
    started = time.perf_counter()
    call()
    wait()
    count = max(3, int(seconds / max(time.perf_counter() - started, 1e-6)))
    for _ in range(count):
        call()
    wait()
    before, started = meter.joules(), time.perf_counter()
    for _ in range(count):
        call()
    wait()
    took, after = time.perf_counter() - started, meter.joules()
    found = {"ms": 1e3 * took / count}
    if before is not None and after is not None:
        found |= {"mj": 1e3 * (after - before) / count, "watts": (after - before) / took}
    return found


def run(names: list[str], tokens: int, seconds: float, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    meter, results = Meter(), []
    for product in PRODUCTS:
        if product.name not in names:
            continue
        calls = variants(product, tokens, device, 1 if device.type == "cuda" else 64)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
        for i in range(rounds):
            order = list(calls)
            random.Random(i).shuffle(order)
            for name in order:
                found[name].append(sustained(calls[name], seconds, meter))
        flops = 2 * tokens * product.out * product.into
        for name, runs in found.items():
            middle = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            spread = max(one["ms"] for one in runs) - min(one["ms"] for one in runs)
            result = {"product": product.name, "variant": name, **{k: round(v, 4) for k, v in middle.items()}}
            results.append(result | {"spread_ms": round(spread, 4), "tflops": round(flops / middle["ms"] / 1e9, 1)})
            print(line(results[-1]), flush=True)
        del calls
    return results


def line(result: dict[str, Any]) -> str:
    energy = f"{result['mj']:8.1f} mJ {result['watts']:5.0f} W" if "mj" in result else ""
    time_ = f"{result['ms']:8.3f} ms (+-{result['spread_ms'] / 2:.3f})"
    return f"{result['product']:11s} {result['variant']:31s}{time_} {result['tflops']:6.0f} TFLOP/s {energy}"


NAMES = [product.name for product in PRODUCTS]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=NAMES, help="some of the products")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=0.25, help="of each variant in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON")
    return parser


def main() -> None:
    a = arguments().parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = run(
        a.only or NAMES,
        a.tokens if device.type == "cuda" else 64,
        a.seconds,
        a.rounds,
        device,
    )
    if a.out:
        record = {"date": time.strftime("%Y-%m-%d"), "command": called("products"), "hardware": hardware(),
                  "versions": versions(), "results": results}  # fmt: skip
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
