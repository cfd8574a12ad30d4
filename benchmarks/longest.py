"""The longest sequence that trains on this GPU: one QLoRA step of batch 1 at one length after another, until one fails.

    python -m benchmarks.longest --run unsloth-offload=262144,327680 --run fastplug+memory=0.97=327680,458752 --layers 2
    python -m benchmarks.longest --run hf=64 --run fastplug+memory=full=64,128 --shape tiny --device cpu

With offloading, what a GPU holds hardly depends on the number of layers, but for their weights. So few of a shape's
layers do (`--layers`), and as many bytes as the others' weights, gradients and optimizer states would take are held
beside them. The host then gets as few of the layers' inputs: the memory that all of them need there is not measured.
`--card 79.2` makes a larger GPU one of 80 GB for all systems: a process holds the rest (budgets in GiB then).
Each system is a process of its own. A length counts if loss and gradients are finite and no LoRA tensor is without one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.hardware import ROOT, called, hardware, versions
from benchmarks.rows import Row
from benchmarks.shapes import SHAPES, config
from benchmarks.smaller_card import held_by_others, smaller_card
from benchmarks.systems import FROM_FOLDER, System

STATES = 4 + 8  # bytes of a trained fp32 parameter's gradient and AdamW moments


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", default=[], metavar="SYSTEM=LENGTHS", help="lengths rise")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=2, help="that do, of the shape's (default: 2)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--card", type=float, metavar="GIB", help="as if the GPU had no more memory than that")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one system, loading included")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--path", default="", help=argparse.SUPPRESS)
    return parser


def parse(run: str) -> tuple[System, list[int]]:
    name, _, lengths = run.rpartition("=")
    return System.parse(name), sorted(int(length) for length in lengths.split(","))


def missing(model: Any, layers: int, of: int) -> int:
    """The bytes that the weights, gradients and optimizer states of the layers left out would take."""
    total = 0
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            total += parameter.untyped_storage().nbytes() + STATES * parameter.numel() * parameter.requires_grad
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                inner = [state.absmax, *([state.state2.absmax] if state.nested else [])]
                total += sum(tensor.untyped_storage().nbytes() for tensor in inner)
    return total // layers * (of - layers)


def child(a: argparse.Namespace) -> None:
    """Try the lengths of one system and print a line of JSON for each."""
    import torch

    if a.device == "cpu":
        torch.cuda.is_available = lambda: False  # type: ignore[assignment]
    from benchmarks.measure import reset_peak, synchronize
    from benchmarks.memory import peaks
    from benchmarks.systems import load, preload
    from benchmarks.weights import device

    system, lengths = parse(a.run[0])
    preload(system, a.shape)
    quantization = "qlora" if device().type == "cuda" else "lora"
    model = load(system, a.shape, a.layers, Row(quantization, 1, lengths[-1], checkpointed=True), a.path).train()
    left_out = missing(model, a.layers, config(a.shape).num_hidden_layers)
    kept = torch.empty(left_out, dtype=torch.uint8, device=device())
    for length in lengths:
        reset_peak()
        result: dict[str, Any] = {"system": system.name, "length": length, "ballast_gib": round(left_out / 2**30, 2)}
        started = time.perf_counter()
        try:
            result |= attempt(model, Row(quantization, 1, length))
        except (RuntimeError, ValueError) as error:  # out of memory, or a length that something refuses
            result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        synchronize()
        result |= {"seconds": round(time.perf_counter() - started, 1), **peaks(held_by_others(a.card))}
        print("RESULT", json.dumps(result), flush=True)
        if "error" in result:
            break
    del kept


def attempt(model: Any, row: Row) -> dict[str, Any]:
    """One step: its loss, the norm of all gradients, and how many LoRA tensors have none."""
    import torch

    from benchmarks.measure import Loop

    loop = Loop(model, row, 1)
    found = loop.gradients()
    loop.optimizer.step()
    found["trains"] = found["dead"] == 0 and bool(
        torch.isfinite(torch.tensor([found["loss"], found["grad_norm"]])).all()
    )
    return found


def main() -> None:
    a = arguments().parse_args()
    if a.child:
        child(a)
        return
    started = time.time()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastplug-longest-") as folder:
        if any(parse(run)[0].base in FROM_FOLDER for run in a.run):
            command = [sys.executable, "-m", "benchmarks.weights", a.shape, folder, "--layers", str(a.layers)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        for run in a.run:
            with smaller_card(a.card):
                results += one_system(a, run, folder)
            if a.out:
                setting = {"shape": a.shape, "layers": a.layers, "card_gib": a.card, "date": time.strftime("%Y-%m-%d")}
                record = {**setting, "command": called("longest"), "hardware": hardware(), "versions": versions()}
                a.out.parent.mkdir(parents=True, exist_ok=True)
                a.out.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")
            print(f"[{time.time() - started:.0f} s]", flush=True)


def one_system(a: argparse.Namespace, run: str, folder: str) -> list[dict[str, Any]]:
    """All lengths of a system, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.longest", "--child", "--run", run, "--shape", a.shape]
    command += ["--layers", str(a.layers), "--device", a.device, "--path", folder]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=a.timeout, cwd=ROOT)
            said, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            said, code = (late.stdout or b"").decode(), -1
        for text in said.splitlines():
            if text.startswith("RESULT "):
                results.append(json.loads(text.removeprefix("RESULT ")))
        if code != 0:
            log.seek(0)
            words = [text for text in log.read().splitlines() if text.strip()] or ["it ended without a word"]
            why = f"no answer in {a.timeout:.0f} s" if code == -1 else words[-1][:300]
            results.append({"system": parse(run)[0].name, "error": why})
    for result in results:
        print(line(result), flush=True)
    return results


def line(result: dict[str, Any]) -> str:
    head = f"{result['system']:24s}{result.get('length', 0):9,d} tokens"
    if "error" in result:
        return f"{head}  {result['error']}"
    peak = result["peak_gib"] or 0.0
    verdict = "trains" if result["trains"] else "DOES NOT TRAIN"
    norm = result["grad_norm"]
    return f"{head}  {verdict} {result['seconds']:7.1f} s  {peak:6.2f} GiB  loss {result['loss']:.5f}  norm {norm:.6g}"


if __name__ == "__main__":
    main()
