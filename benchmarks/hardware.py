"""What a result was measured on and with."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "axolotl", "unsloth", "unsloth_zoo",
)  # fmt: skip


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions ("-" for what is not there), and the commit of fastplug."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    found["fastplug"] = os.environ.get("FASTPLUG_COMMIT") or _git("describe", "--always", "--dirty") or "unknown"
    return found


@functools.cache
def hardware() -> dict[str, str | int | float]:
    """GPU, driver, CPU and memory."""
    import torch

    found: dict[str, str | int | float] = {"cpu": _cpu(), "cores": os.cpu_count() or 0}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]),
            "cuda": str(torch.version.cuda),
        }
    return found


def called(benchmark: str) -> str:
    """How a benchmark was called, without the folders of this machine."""
    return " ".join([f"python -m benchmarks.{benchmark}", *(os.path.basename(part) or part for part in sys.argv[1:])])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*words: str) -> str:
    return _output(["git", "-C", str(ROOT), *words])


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
