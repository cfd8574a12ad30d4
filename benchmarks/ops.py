"""Each op against the measured ceiling of this GPU: copy bandwidth for what moves bytes, cuBLAS for what multiplies.

    python -m benchmarks.ops --out benchmarks/results/ops-h100.json
    python -m benchmarks.ops --only nf4 --only rope

Bytes are counted once per tensor read and once per tensor written; a device-to-device copy sets the ceiling, counted
the same way. Inputs rotate, so that nothing stays in the L2 cache. Every op of fastplug is checked against fp64 on
fresh random inputs, with outputs that hold NaN before, and is timed only if its error is at most twice that of one
rounding. Kernels of Liger and bitsandbytes stand beside where they are installed. On a CPU the references are run, to
try it out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops_cases, ops_weights
from benchmarks.hardware import hardware, versions
from benchmarks.ops_cases import Case, Sizes
from benchmarks.timing import copy_bandwidth, matmul_rate, milliseconds

GROUPS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "rms_norm": ops_cases.rms_norm,
    "rope": ops_cases.rope,
    "glu": ops_cases.glu,
    "adapted_glu": ops_cases.adapted_glu,
    "adapted_rope": ops_cases.adapted_rope,
    "dora": ops_cases.dora,
    "logprobs": ops_cases.logprobs,
    "nf4": ops_weights.nf4,
    "formats": ops_weights.formats,
    "quantize_4bit": ops_weights.quantize_4bit,
    "fp8": ops_weights.fp8,
    "products": ops_weights.products,
}
ENOUGH = {"nf4 decode": 0.8}  # share of the ceiling that an op should reach; 0.85 for the others
TRIAL = {"tokens": 64, "hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2, "head": 32, "vocabulary": 300,
         "chunk": 16}  # fmt: skip


def measure(case: Case, copy: float, matmul: float) -> dict[str, Any]:
    """One line of the result; ``error`` in place of times where a check failed."""
    result: dict[str, Any] = {"op": case.op, "library": case.library}
    if case.check is not None:
        found, bound = case.check()
        result |= {"relative_error": float(f"{found:.2e}"), "bound": float(f"{bound:.2e}")}
        if not found <= bound:
            return {**result, "error": f"wrong: relative error {found:.2e}, allowed {bound:.2e}"}
    ms = milliseconds(case.calls, capture=case.capture)
    if case.flops:
        rate = case.flops / ms / 1e9
        return {**result, "ms": round(ms, 4), "tflops": round(rate, 1), "of_matmul": share(rate / matmul)}
    rate = case.bytes / ms / 1e9
    return {**result, "ms": round(ms, 4), "tb_per_s": round(rate, 3), "of_copy": share(rate / copy)}


def share(of_ceiling: float) -> float:
    """To four digits, so that a slow op on a busy machine is not rounded to nothing."""
    return float(f"{of_ceiling:.4g}")


def line(result: dict[str, Any]) -> str:
    head = f"{result['op']:46s}{result['library']:14s}"
    if "error" in result:
        return f"{head} {result['error']}"
    if "tflops" in result:
        return f"{head}{result['ms']:9.4f} ms {result['tflops']:7.1f} TFLOP/s {result['of_matmul']:5.0%} of a product"
    enough = next((share for name, share in ENOUGH.items() if result["op"].startswith(name)), 0.85)
    below = "  below" if result["library"] == "fastplug" and result["of_copy"] < enough else ""
    return f"{head}{result['ms']:9.4f} ms {result['tb_per_s']:7.2f} TB/s    {result['of_copy']:5.0%} of copy{below}"


def run(sizes: Sizes, groups: list[str], log: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure groups of ops; the record that is saved."""
    cuda, started = sizes.device.type == "cuda", time.time()
    copy = copy_bandwidth(sizes.device, 2**29 if cuda else 2**22)
    matmul = matmul_rate(sizes.device, 8192 if cuda else 256)
    log(f"{hardware().get('gpu', hardware()['cpu'])}: copy {copy:.2f} TB/s, bf16 product {matmul:.0f} TFLOP/s")
    results = []
    for name in groups:
        try:
            for case in GROUPS[name](sizes):
                results.append(measure(case, copy, matmul))
                log(line(results[-1]))
                del case
        except Exception as error:  # one op, or a peer of another version, must not end the run
            results.append({"op": name, "library": "-", "error": f"{type(error).__name__}: {str(error)[:300]}"})
            log(line(results[-1]))
        if cuda:
            torch.cuda.empty_cache()
    log(f"{time.time() - started:.0f} s")
    return {
        "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions(), "tokens": sizes.tokens,
        "copy_tb_per_s": round(copy, 3), "matmul_tflops": round(matmul, 1), "ops": results,
    }  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=GROUPS, help="some of the groups")
    parser.add_argument("--tokens", type=int, default=Sizes.tokens)
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    a = arguments().parse_args()
    torch.manual_seed(0)
    if torch.cuda.is_available():
        sizes = Sizes(torch.device("cuda"), tokens=a.tokens)
    else:
        sizes = Sizes(torch.device("cpu"), **TRIAL)
    record = run(sizes, a.only or list(GROUPS), lambda text: print(text, flush=True))
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
