"""Whole training steps of fastplug and its peers on one GPU, in one run.

    python -m benchmarks.step --shape llama-3.1-8b --row qlora:4x2048 --row qlora:4x2048:checkpointed

Every system loads the same random weights, sees the same tokens and runs the same loop: forward, backward, fused AdamW
on the LoRA weights. A process loads one system once, for all of its rows that differ in batch and length only, larger
ones first. Before a ratio is printed, each system's first losses, gradient norm
and number of LoRA tensors without a gradient are compared with those of transformers + PEFT.

A row is ``qlora`` or ``lora``, then BATCHxSEQUENCE, then any of ``checkpointed``, ``prepared`` (PEFT's k-bit
preparation: an fp32 residual stream), ``autocast``. Peers that are not installed are left out, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, write

SYSTEMS = ("hf", "liger", "axolotl", "unsloth", "fastplug")


@dataclass(frozen=True)
class Row:
    """One setting that all systems run."""

    quantization: str
    batch: int
    sequence: int
    checkpointed: bool = False
    prepared: bool = False
    autocast: bool = False

    @classmethod
    def parse(cls, text: str) -> Row:
        kind, size, *flags = text.split(":")
        batch, sequence = size.split("x")
        if kind not in ("qlora", "lora") or set(flags) - {"checkpointed", "prepared", "autocast"}:
            raise argparse.ArgumentTypeError(f"{text!r}: see python -m benchmarks.step --help")
        return cls(
            kind, int(batch), int(sequence), *(flag in flags for flag in ("checkpointed", "prepared", "autocast"))
        )

    @property
    def loading(self) -> tuple[Any, ...]:
        """What a model has to be loaded anew for."""
        return self.quantization, self.checkpointed, self.prepared

    def __str__(self) -> str:
        flags = [flag for flag in ("checkpointed", "prepared", "autocast") if getattr(self, flag)]
        return ":".join([self.quantization, f"{self.batch}x{self.sequence}", *flags])


def worker(system: str, path: str, rows: list[Row], warmup: int, steps: int) -> None:
    """Load one system and print a line of JSON for each of its rows."""
    from benchmarks.systems import load

    first, started = rows[0], time.time()
    model = load(
        system, path, qlora=first.quantization == "qlora", checkpointing=first.checkpointed,
        sequence=max(row.sequence for row in rows), prepared=first.prepared,
    )  # fmt: skip
    load_s = round(time.time() - started, 1)
    for row in rows:
        result = {"system": system, "row": str(row), "load_s": load_s, **measure(model.train(), row, warmup, steps)}
        print("RESULT " + json.dumps(result), flush=True)


def measure(model: Any, row: Row, warmup: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step (median, by CUDA events), peak GiB, losses and gradients of one row."""
    import torch

    torch.cuda.empty_cache()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # B starts at zero, which makes every gradient of A zero and proves nothing
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad and "lora_" in name:
                generator = torch.Generator().manual_seed(sum(map(ord, name.split("layers.")[-1])))
                p.copy_(torch.randn(p.shape, generator=generator) * (0.01 if "lora_A" in name else 0.005))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    torch.manual_seed(1)
    vocabulary = model.config.vocab_size
    data = [torch.randint(4, vocabulary - 100, (row.batch, row.sequence), device="cuda") for _ in range(4)]

    def loss_of(i: int) -> torch.Tensor:
        x = data[i % 4]
        with torch.autocast("cuda", torch.bfloat16, enabled=row.autocast):
            return model(input_ids=x, labels=x).loss  # type: ignore[no-any-return]

    def step(i: int) -> torch.Tensor:
        loss = loss_of(i)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    loss = loss_of(0)  # a fast step without a gradient is not fast
    loss.backward()
    norms = torch.stack(
        [torch.zeros((), device="cuda") if p.grad is None else p.grad.float().norm() for p in parameters]
    )
    grad_norm, dead, first_loss = float(norms.norm()), int((norms == 0).sum()), float(loss)
    optimizer.zero_grad(set_to_none=True)
    del loss
    started = time.time()
    losses = [float(step(i)) for i in range(warmup)]
    torch.cuda.synchronize()
    warm_s = time.time() - started
    torch.cuda.reset_peak_memory_stats()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
    for i, (start, end) in enumerate(events):
        start.record()
        step(i)
        end.record()
        torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    peak = torch.cuda.max_memory_allocated() / 2**30
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(0)
        torch.cuda.synchronize()
    kernels = [e for e in profiled.key_averages() if e.self_device_time_total]
    busy = sum(e.self_device_time_total for e in kernels) / 1e3
    top = sorted(kernels, key=lambda e: -e.self_device_time_total)[:30]
    return {
        "ms": round(times[len(times) // 2], 1), "ms_min": round(times[0], 1),
        "busy_ms": round(busy, 1), "tokens_per_s": round(row.batch * row.sequence / times[len(times) // 2] * 1e3),
        "peak_gib": round(peak, 2), "loss": round(first_loss, 5), "later_losses": [round(x, 4) for x in losses],
        "grad_norm": round(grad_norm, 6), "dead": dead, "warm_s": round(warm_s, 1),
        "gpu": torch.cuda.get_device_name(),
        "kernels": [(e.key[:90], e.count, round(e.self_device_time_total / 1e3, 2)) for e in top],
    }  # fmt: skip


def check(result: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """Why a result does not count, or an empty string. The oracle is the unpatched model in the same run."""
    if result.get("error"):
        return str(result["error"])
    if result["dead"]:
        return f"{result['dead']} LoRA tensors got no gradient"
    if reference is None or reference.get("error"):
        return ""
    if abs(result["loss"] - reference["loss"]) > 5e-3 * reference["loss"]:
        return f"loss {result['loss']} against {reference['loss']}"
    if abs(result["grad_norm"] - reference["grad_norm"]) > 0.03 * reference["grad_norm"]:
        return f"gradient norm {result['grad_norm']} against {reference['grad_norm']}"
    return ""


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "axolotl", "unsloth"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found["fastplug"] = os.environ.get("FASTPLUG_COMMIT") or commit.stdout.strip() or "unknown"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--row", dest="rows", type=Row.parse, action="append")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument(
        "--run", action="append", default=[], metavar="SYSTEM=ROW", help="single runs instead of a grid"
    )
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--path", default=os.path.join(tempfile.gettempdir(), "fastplug-bench"))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.worker[0], a.path, [Row.parse(row) for row in a.worker[1:]], a.warmup, a.steps)
        return
    path = f"{a.path}-{a.shape}-{a.layers or 'all'}"
    if not os.path.exists(os.path.join(path, "config.json")):
        write(a.shape, path, a.layers)
    runs = [(text.split("=")[0], Row.parse(text.split("=")[1])) for text in a.run] or [
        (system, row) for row in a.rows or [Row("qlora", 4, 2048)] for system in a.systems.split(",")
    ]
    results: list[dict[str, Any]] = []
    for (system, _), group in itertools.groupby(runs, key=lambda run: (run[0], run[1].loading)):
        rows = sorted((str(row) for _, row in group), key=lambda row: -Row.parse(row).batch * Row.parse(row).sequence)
        command = [sys.executable, "-m", "benchmarks.step", "--worker", system, *rows, "--path", path]
        command += ["--warmup", str(a.warmup), "--steps", str(a.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
        found += [{"system": system, "row": row, "error": tail[:300]} for row in rows[len(found) :]]
        results += found
        for result in found:
            print({k: v for k, v in result.items() if k != "kernels"}, flush=True)
        if a.out:
            record = {"shape": a.shape, "layers": a.layers, "versions": versions(), "results": results}
            a.out.write_text(json.dumps(record, indent=1))
    report(results)


def report(results: list[dict[str, Any]]) -> None:
    """One line a run: milliseconds, GPU-busy milliseconds, GiB, and how many times slower than fastplug it is."""
    print(f"\n{'row':34s}{'system':18s}{'ms':>9s}{'busy':>9s}{'GiB':>8s}{'x fastplug':>12s}")
    for result in results:
        same = {r["system"]: r for r in results if r["row"] == result["row"] and not r.get("error")}
        trouble = check(result, same.get("hf"))
        if result.get("error"):
            print(f"{result['row']:34s}{result['system']:18s} left out: {trouble}")
            continue
        ratio = f"{result['ms'] / same['fastplug']['ms']:.2f}" if "fastplug" in same else "-"
        print(
            f"{result['row']:34s}{result['system']:18s}{result['ms']:9.1f}{result['busy_ms']:9.1f}"
            f"{result['peak_gib']:8.2f}{ratio if not trouble else 'invalid':>12s} {trouble}"
        )


if __name__ == "__main__":
    main()
