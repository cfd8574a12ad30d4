"""One model under one memory budget after another: time, planned and measured peak, what layers keep, same gradients.

    python -m benchmarks.memory --shape llama-3.1-8b --row qlora:4x2048 --budgets 9GiB,10GiB,12GiB,16GiB,24GiB,40GiB
    python -m benchmarks.memory --row qlora:1x65536 --budgets full,24GiB,auto --steps 3
    python -m benchmarks.memory --row qlora:1x65536 --budgets auto --search 65536:1048576
    python -m benchmarks.memory --device cpu --toy

The model is built once; each budget is an ``apply(memory=...)``, warmed up until the plan stands, measured and undone.
``keep`` and ``full`` are budgets too: every layer keeps all, or computes all again. A peak is reserved memory plus the
CUDA context, what a budget means. ``same`` says that all gradients have the bits of the first budget's run. The search
looks for the longest context, in steps of 4,096 tokens, that one forward and backward get through.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.hardware import hardware, versions
from benchmarks.measure import BATCHES, IN_A_ROW, Loop, in_a_row, milliseconds, reset_adapters, reset_peak, synchronize
from benchmarks.rows import Row
from benchmarks.shapes import LORA, SHAPES
from benchmarks.weights import build, quantize

GRID = 4096  # tokens: the step of the search
T = TypeVar("T")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--row", default="qlora:4x2048", help="qlora or lora, and BATCHxSEQUENCE")
    parser.add_argument("--budgets", default="keep,9GiB,10GiB,12GiB,16GiB,24GiB,40GiB,full")
    parser.add_argument("--options", default="{}", help="more options of fastplug.apply, as JSON")
    parser.add_argument(
        "--warmup", type=int, default=17, help="steps before the measured ones; every power of two plans anew"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--search", metavar="LOW:HIGH", help="lengths between which to look for the longest")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--toy", action="store_true", help="a two-layer model, to try the benchmark itself")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser


def load(shape: str, layers: int | None, row: Row) -> Any:
    """A PEFT model with LoRA on all linears, its base in bf16 or NF4."""
    from peft import LoraConfig, get_peft_model

    model = build(shape, layers)
    if row.quantization == "qlora":
        model = quantize(model)
    model = get_peft_model(model.requires_grad_(False), LoraConfig(task_type="CAUSAL_LM", **LORA))
    gc.collect()
    return model.train()


def context_bytes() -> int:
    """What the process takes on the GPU beside what PyTorch has reserved; right where it is alone there."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def one_budget(model: Any, row: Row, memory: str, a: argparse.Namespace) -> dict[str, Any]:
    """Apply, warm up, measure, undo."""
    import fastplug
    from fastplug.memory.runtime import planners

    reset_peak()
    result: dict[str, Any] = {"budget": memory, "row": str(row)}
    applied = None
    try:
        applied = fastplug.apply(model, memory=memory, **json.loads(a.options))
        loop = Loop(model, row, BATCHES)
        started = time.perf_counter()
        losses = [float(loop.step(0))]
        result["first_s"] = round(time.perf_counter() - started, 2)
        plans = []
        for i in range(1, a.warmup):
            losses.append(float(loop.step(i)))
            plans.append(str(planners(model)[0].plan))
        result["plans"] = list(dict.fromkeys(plans))
        result["losses"] = [round(loss, 5) for loss in losses]
        gc.collect()  # as in benchmarks.step: all that loading left would be gone through in one of the timed steps
        whole = peaks()  # of warm-up and calibration too: the budget holds from the first step on
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        retries = _retries()
        planner = planners(model)[0]
        assert planner.stock is not None
        compared = planner.stock.calibration.steps  # before it sees that steps are timed one by one
        result["compared_ms"] = {
            name: [round(ms, 1) for found in compared.latest(copies).values() for ms in found]
            for name, copies in (("with copies", True), ("without", False))
        }
        result["steps_ms"] = [round(milliseconds(lambda i=i: loop.step(i)), 2) for i in range(a.steps)]  # type: ignore[misc]
        result["running_ms"] = in_a_row(loop, min(a.steps, IN_A_ROW))
        result["host"] = host_times(loop)
        times = sorted(result["steps_ms"])
        plan, agreed = planner.plan, planner.agreed
        assert plan is not None
        assert agreed is not None
        result |= {
            "ms": round(times[len(times) // 2], 2),
            "ms_min": round(times[0], 2),
            "ms_max": round(times[-1], 2),
            "planned_gib": _gib(plan.total),
            "planned_allocated_gib": _gib(plan.allocated),
            "planned_ms": round(plan.ms, 1),
            "parts_gib": {name: _gib(size) for name, size in plan.parts.items()},
            "moment": plan.moment,
            "policies": {policy.value: count for policy, count in plan.counts().items()},
            "order": [policy.value for policy in plan.policies],
            "tile_rows": plan.tile_rows,
            "agreed": {k: v for k, v in vars(agreed).items() if k not in ("ms", "saved")},
            "ratios_ms": {p.value: round(r, 3) for p, r in agreed.ms.items()},
            "ratios_saved": {p.value: round(r, 3) for p, r in agreed.saved.items()},
            "dropped": planner.room.dropped,
            "retries": _retries() - retries,
            "whole_run": whole,
            **peaks(),
        }
        if len(a.budgets.split(",")) > 1:  # to be compared
            reset_adapters(model)
            result |= loop.gradients()
            result["gradients"] = _gradients(model, loop)
        result["notes"] = fastplug.report(model).notes
    except (RuntimeError, fastplug.FastPlugError) as error:  # a budget that is too small is a result
        result["error"] = str(error).splitlines()[0][:400]
    finally:
        if applied is not None:
            applied.undo()
        model.zero_grad(set_to_none=True)
        gc.collect()
    return result


def host_times(loop: Loop, steps: int = 3) -> dict[str, float]:
    """Milliseconds until a forward and a backward are launched and done, medians: whether the GPU waits for Python."""
    found: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[[], T]) -> T:
        synchronize()
        started = time.perf_counter()
        result = call()
        found[f"{name} launched"].append(1e3 * (time.perf_counter() - started))
        synchronize()
        found[f"{name} done"].append(1e3 * (time.perf_counter() - started))
        return result

    for _ in range(steps):
        timed("backward", timed("forward", lambda: loop.loss(loop.data[0])).backward)
        loop.model.zero_grad(set_to_none=True)
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


def _gradients(model: Any, loop: Loop) -> dict[str, torch.Tensor]:
    """All gradients of the first batch, on the host. FlashAttention's backward adds in any order unless it is told."""
    torch.use_deterministic_algorithms(True)
    try:
        loop.loss(loop.data[0]).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    found = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def peaks(others: int = 0) -> dict[str, float | None]:
    """GiB: the highest allocation, reservation, and reservation plus context; ``others`` have so many bytes."""
    if not torch.cuda.is_available():
        return {"allocated_gib": None, "reserved_gib": None, "peak_gib": None}
    reserved, context = torch.cuda.max_memory_reserved(), context_bytes() - others
    return {
        "allocated_gib": _gib(torch.cuda.max_memory_allocated()),
        "reserved_gib": _gib(reserved),
        "context_gib": _gib(context),
        "peak_gib": _gib(reserved + context),
    }


def _gib(size: float) -> float:
    return round(size / 2**30, 3)


def _retries() -> int:
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if torch.cuda.is_available() else 0


def longest(model: Any, row: Row, memory: str, a: argparse.Namespace, log: Any) -> dict[str, Any]:
    """The longest context that gets through one forward and backward, by doubling and then halving the interval."""
    low, _, high = a.search.partition(":")
    good, bad = 0, int(high) + GRID
    length = int(low)
    tries: list[dict[str, Any]] = []
    while bad - good > GRID:
        found = _try(model, Row(row.quantization, row.batch, length), memory, a)
        tries.append({"length": length, **found})
        log(f"{memory} {length} tokens: {found}")
        if "error" in found:
            bad = length
        else:
            good = length
        length = min(2 * good, bad - GRID) if bad > int(high) else (good + bad) // 2 // GRID * GRID
        if length <= good:
            break
    return {"budget": memory, "longest": good, "tries": tries}


def _try(model: Any, row: Row, memory: str, a: argparse.Namespace) -> dict[str, Any]:
    import fastplug
    from fastplug.memory.runtime import planners

    reset_peak()
    applied = None
    try:
        applied = fastplug.apply(model, memory=memory, **json.loads(a.options))
        loop = Loop(model, row, 1)
        started = time.perf_counter()
        loss = float(loop.step(0))
        synchronize()
        plan = planners(model)[0].plan
        counts = {policy.value: count for policy, count in plan.counts().items()} if plan is not None else {}
        return {
            "seconds": round(time.perf_counter() - started, 1),
            "loss": round(loss, 4),
            "policies": counts,
            **peaks(),
        }
    except (RuntimeError, fastplug.FastPlugError) as error:
        return {"error": str(error).splitlines()[0][:300]}
    finally:
        if applied is not None:
            applied.undo()
        model.zero_grad(set_to_none=True)
        gc.collect()


def line(result: dict[str, Any]) -> str:
    """A result as one row of a table."""
    if "error" in result:
        return f"{result['budget']:>8}  {result['error']}"
    policies = ", ".join(f"{count} {name}" for name, count in result["policies"].items())
    return (
        f"{result['budget']:>8} {result['ms']:9.1f} ms ({result['running_ms']:.1f} in a row)  planned "
        f"{result['planned_gib']:7.2f}  measured "
        f"{result['peak_gib'] or 0:7.2f} (whole run {result['whole_run']['peak_gib'] or 0:7.2f}) GiB  "
        + "".join(f"{name}={result[name]}  " for name in ("same", "loss", "grad_norm") if name in result)
        + f"[{policies}; tiles {result['tile_rows']}; dropped {result['dropped']}]"
    )


def main() -> None:
    a = arguments().parse_args()
    if a.toy:
        a.shape, a.row, a.layers = "tiny", "lora:2x128", 4
        a.budgets = "keep,2500KiB,3MiB,4MiB,auto,full" if a.budgets == arguments().get_default("budgets") else a.budgets
    if a.device == "cpu":
        torch.cuda.is_available = lambda: False  # type: ignore[assignment]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic backward
    row, started = Row.parse(a.row), time.time()

    def log(text: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {text}", flush=True)

    model = load(a.shape, a.layers, row)
    log(f"{a.shape} loaded for {row}")
    results: list[dict[str, Any]] = []
    reference: dict[str, torch.Tensor] | None = None
    for memory in a.budgets.split(","):
        if a.search:
            result = longest(model, row, memory, a, log)
            log(f"{memory}: longest {result['longest']}")
        else:
            result = one_budget(model, row, memory, a)
            gradients = result.pop("gradients", None)
            if gradients is not None:
                reference = reference or gradients
                same = gradients.keys() == reference.keys()
                result["same"] = same and all(torch.equal(gradients[name], reference[name]) for name in reference)
            log(line(result))
        results.append(result)
        if a.out:
            record = {"shape": a.shape, "layers": a.layers, "hardware": hardware(), "versions": versions()}
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")
    if not a.search:
        print("\n".join(line(result) for result in results), flush=True)


if __name__ == "__main__":
    main()
