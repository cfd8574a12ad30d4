"""Everything that fastplug is held to on a GPU, stage by stage within a time: first whether it is right, then how fast.

    python -m benchmarks.acceptance --list
    python -m benchmarks.acceptance --minutes 9 --out results
    python -m benchmarks.acceptance --minutes 9 --out results --from budgets

A stage is a few commands, each with its time. One is begun only if its time is left, and ended when it is over; what a
benchmark has written by then counts. `STAGE.json` or `STAGE-NUMBER.json` are the results, `log.txt` has all that was
said, and at the end stands how each command went. Peers that are not installed are left out by the benchmarks.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.hardware import ROOT

ORACLE = "benchmarks/results/2026-11-21-h100-llama-3.1-8b-final.json"
FP8 = "fastplug+compute=fp8"
FP8_BACKWARD = "fastplug+compute=fp8_backward"
OTHERS = "benchmarks.step --systems hf,unsloth,fastplug --row qlora:4x2048 --row qlora:2x512"


@dataclass(frozen=True)
class Stage:
    """Commands that belong together: ``python -m`` with these words, each within so many seconds."""

    name: str
    commands: tuple[tuple[int, str], ...]

    @property
    def seconds(self) -> int:
        return sum(seconds for seconds, _ in self.commands)


STAGES = (
    Stage("kernels", (
        (200, "pytest -q -n8 tests/ops/test_adapted_glu.py tests/ops/test_nf4.py tests/ops/test_fp8_share.py "
              "tests/ops/test_low_rank.py tests/ops/test_adapter_matrices.py tests/ops/test_adapter_gradients.py "
              "tests/ops/test_adapted_rope.py tests/ops/test_linear_cross_entropy.py "
              "tests/engine/test_graphs.py tests/engine/test_compiling.py tests/memory/test_decoded_weights.py "
              "tests/gpu/test_step.py --deselect=tests/gpu/test_step.py::test_generation_is_not_slower"),
        (240, "pytest -q tests/gpu/test_first_step.py"),
    )),
    Stage("verify", (
        (150, "benchmarks.verifying"),
    )),
    Stage("ops", (
        (90, "benchmarks.ops --only adapted_glu --only adapted_rope --only formats --only quantize_4bit"),
        (60, "benchmarks.products"),
    )),
    Stage("llama", (
        (420, f"benchmarks.step --oracle {ORACLE} --systems unsloth,axolotl,fastplug,{FP8_BACKWARD},{FP8} "
              "--row qlora:4x2048 --row qlora:4x2048:checkpointed --row lora:4x2048"),
    )),
    Stage("prompts", (
        (90, "benchmarks.step --layers 8 --systems hf,unsloth,fastplug --row qlora:4x2048:prompts --row qlora:4x2048"),
    )),
    Stage("small", (
        (180, f"benchmarks.step --oracle {ORACLE} "
              "--systems unsloth,fastplug,fastplug-graphs-off,fastplug+base_weights=kept "
              "--row qlora:2x512 --row lora:2x512 --row qlora:2x512:checkpointed"),
    )),
    Stage("budgets", (
        (170, "benchmarks.memory --budgets 9GiB,10GiB,12GiB,16GiB,24GiB,40GiB,80GiB"),
        (100, "benchmarks.memory --row qlora:2x512 --budgets 9GiB,12GiB,24GiB"),
    )),
    Stage("long", (
        (160, "benchmarks.memory --row qlora:1x65536 --budgets 23GiB --warmup 2 --steps 1"),
        (180, "benchmarks.step --run unsloth-offload=qlora:1x65536:checkpointed --warmup 1 --steps 2 --no-profile"),
        (180, "benchmarks.longest --card 79.2 --run fastplug+memory=76GiB=344064,393216 "
              "--run unsloth-offload=262144,294912"),
    )),
    Stage("tests", (
        (300, "pytest -q tests/gpu tests/memory/test_allocator.py tests/engine/test_base_weights.py"),
    )),
    Stage("random", (
        (240, "benchmarks.step --layers 8 --lengths random --steps 200 --systems hf,liger,unsloth,fastplug "
              "--row qlora:2x1024"),
    )),
    Stage("shapes", (
        (150, f"{OTHERS} --shape qwen3-8b --layers 8"),
        (150, f"{OTHERS} --shape mistral-7b --layers 8"),
        (150, f"{OTHERS} --shape qwen3-0.6b"),
    )),
    Stage("types", (
        (240, "benchmarks.training_types --seconds 220"),
    )),
    Stage("planning", (
        (300, "benchmarks.planning"),
    )),
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the stages with their commands and seconds")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", action="append", choices=names, help="some of them, in the order of the list")
    parser.add_argument("--from", dest="first", choices=names, default=names[0], help="the first one (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all that is begun (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("acceptance-out"), help="folder (default: acceptance-out)")
    return parser


def words(command: str, out: Path) -> list[str]:
    """The command line; a benchmark's with ``--out``."""
    module, *rest = command.split()
    return [sys.executable, "-m", module, *rest, *(["--out", str(out)] if module != "pytest" else [])]


def run(command: list[str], seconds: float, log: IO[str]) -> str:
    """``ok``, ``failed (code)`` or ``out of time``; what it says goes to the log and to the terminal.

    It is a process group of its own, all of which ends with it: benchmarks have workers that hold the GPU's memory.
    """
    print(f"\n$ {' '.join(command[1:])}", file=log, flush=True)
    began = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            for text in process.stdout:
                print(text, end="", flush=True)
                print(text, end="", file=log, flush=True)
            code = process.wait()
        finally:
            late.cancel()
    if code == -signal.SIGKILL and time.monotonic() - began >= seconds:
        return "out of time"
    return "ok" if code == 0 else f"failed ({code})"


def main() -> int:
    a = arguments().parse_args()
    if a.list:
        for stage in STAGES:
            print(f"{stage.name} ({stage.seconds} s)", *(f"  {command}" for _, command in stage.commands), sep="\n")
        return 0
    first = [stage.name for stage in STAGES].index(a.first)
    chosen = [stage for stage in STAGES[first:] if a.stage is None or stage.name in a.stage]
    a.out.mkdir(parents=True, exist_ok=True)
    deadline, summary, failed = time.monotonic() + 60 * a.minutes, [], False
    with (a.out / "log.txt").open("a") as log:
        for stage in chosen:
            for number, (seconds, command) in enumerate(stage.commands, 1):
                left = deadline - time.monotonic()
                name = stage.name if len(stage.commands) == 1 else f"{stage.name}-{number}"
                if left < seconds:
                    summary.append(f"{name:20s} not begun: {left:.0f} s are left, it has {seconds}")
                    continue
                began = time.monotonic()
                how = run(words(command, a.out / f"{name}.json"), seconds, log)
                summary.append(f"{name:20s} {how} in {time.monotonic() - began:.0f} s")
                failed |= how != "ok"
        print("", *summary, sep="\n")
        print("", *summary, sep="\n", file=log)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
