"""How long loading a bf16 checkpoint into NF4 takes, and with how much memory: fastplug, and transformers with
bitsandbytes.

    python -m benchmarks.loading --shape llama-3.1-8b --out loading.json
    python -m benchmarks.loading --shape llama-3.1-8b --layers 8 --folder /tmp/llama
    python -m benchmarks.loading --shape tiny --rounds 1

Writes random weights of a shape into ``--folder`` (8 files; kept there for the next time, while a temporary folder is
removed), then loads them in turns, each time in a process of its own, which has imported what it needs and made its
CUDA context before the clock starts. All files are read once before each load, so that both find them in the cache.
Triton compiles fastplug's kernels in the first load on a machine, which counts; the best round of each is compared.

``device_gib`` is ``torch.cuda.max_memory_allocated``, of which ``size_gib`` is the model. ``host_gib`` is how far the
process's *anonymous* memory rose while it loaded, plus the pinned memory that PyTorch allocated, which drivers map in a
way that the kernel may not count. Mapped pages of files are left out: they are the file cache, which the kernel takes
back when it needs it, and would be there without the process. The peak of the whole resident memory (VmHWM) cannot tell
them apart, so the parent samples RssAnon of the child in ``/proc``, every 2 ms.

The packed values, scales and nested scales of a few layers, embeddings and norms are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.hardware import ROOT, called, hardware, versions
from benchmarks.shapes import SHAPES, config

LOADERS = ("transformers", "fastplug")
EVERY = 0.002  # seconds between two looks at a process's memory
SLACK = 1.0  # GiB above the quantized size that a load may take, on the device and on the host


def anonymous(process: int) -> int | None:
    """Bytes of a process's resident memory that no file backs, None where the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        smaps = Path(f"/proc/{process}/smaps").read_text(encoding="utf-8", errors="replace")  # as in some sandboxes
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in smaps.splitlines() if line.startswith("Anonymous:")]
    return sum(found) if found else None


class Peak(threading.Thread):
    """Watches a process's anonymous memory from its creation until :meth:`end`."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.first, self.samples = process, anonymous(process), 0
        self.highest = self.first
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(EVERY):
            now = anonymous(self.process)
            if now is not None and self.highest is not None:
                self.highest, self.samples = max(self.highest, now), self.samples + 1

    def end(self) -> int | None:
        """How many bytes the highest was above the first."""
        self._ended.set()
        self.join()
        return None if self.highest is None or self.first is None else self.highest - self.first


def measured(loader: str, folder: Path, device: str, shape: str, timeout: float) -> dict[str, Any]:
    """One load in a process of its own; ``error`` says why there is none."""
    command = [sys.executable, "-m", "benchmarks.load_worker", loader, str(folder.resolve()), device]
    command += [SHAPES[shape][0].lower()]
    result: dict[str, Any] = {"loader": loader}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
        )
        watch, alarm = None, threading.Timer(timeout, process.kill)
        alarm.start()
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, content = line.partition(" ")
            if kind == "READY":
                watch = Peak(process.pid)
                process.stdin.write("go\n")
                process.stdin.flush()
            elif kind == "LOADED" and watch is not None:
                result |= {**json.loads(content), "anonymous": watch.end(), "samples": watch.samples}
            elif kind == "DIGESTS":
                result["digests"] = json.loads(content)
        code = process.wait()
        alarm.cancel()
        if code != 0 or "digests" not in result:
            log.seek(0)
            words = [text for text in log.read().splitlines() if text.strip()]
            result["error"] = (words or ["it ended without a word"])[-1][:300]
    if watch is not None:
        watch.end()
    return summary(result)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What a worker said, in GiB."""
    for name in ("size", "device", "reserved"):
        if name in result:
            result[f"{name}_gib"] = round(result.pop(name) / 2**30, 3)
    pinned, rise = result.pop("pinned", 0), result.pop("anonymous", None)
    if "seconds" in result:
        result["pinned_gib"] = round(pinned / 2**30, 3)
        result["host_gib"] = None if rise is None else round((rise + pinned) / 2**30, 3)
    return result


def warm(folder: Path) -> int:
    """Read all weights once; returns their bytes."""

    def read(file: Path) -> int:
        buffer, count = bytearray(16 << 20), 0
        with open(file, "rb", buffering=0) as stream:
            while got := stream.readinto(buffer):
                count += got
        return count

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(read, sorted(folder.glob("*.safetensors"))))


def compared(results: list[dict[str, Any]]) -> list[str]:
    """The tensors that are not the same in all results."""
    known = [r["digests"] for r in results if "digests" in r]
    names = {name for one in known for name in one}
    return sorted(name for name in names if len({one.get(name) for one in known}) > 1)


def verdicts(results: list[dict[str, Any]], differ: list[str]) -> list[str]:
    """What the figures say of fastplug, the best round of each loader counting."""
    best = {}
    for result in results:
        if "error" not in result:
            before = best.get(result["loader"])
            best[result["loader"]] = min(before or result, result, key=lambda r: r["seconds"])
    lines = [f"{r['loader']} failed: {r['error']}" for r in results if "error" in r]
    if len(best) == len(LOADERS):
        theirs, mine = (best[name]["seconds"] for name in LOADERS)
        lines.append(f"fastplug takes {mine / theirs:.2f} of the time of transformers")
        lines.append(f"the same bits: {'yes' if not differ else 'NO: ' + ', '.join(differ[:5])}")
    ours = [r for r in results if r["loader"] == "fastplug" and "error" not in r]
    for where in ("device", "host"):
        peaks = [r[f"{where}_gib"] for r in ours if r.get(f"{where}_gib") is not None]
        if peaks:
            over = max(peaks) - ours[0]["size_gib"]
            fits = "within" if over <= SLACK else "BEYOND"
            lines.append(f"fastplug's peak on the {where}: {over:+.2f} GiB from the quantized size, {fits} {SLACK:g}")
    return lines


def table(results: list[dict[str, Any]], stored: int) -> list[str]:
    """One line for each load."""
    lines = [f"  {'loader':14s}{'s':>8s}{'GB/s':>8s}{'size':>8s}{'device':>8s}{'host':>8s}  (GiB)"]
    for r in results:
        if "error" in r:
            lines.append(f"  {r['loader']:14s} failed: {r['error']}")
            continue
        cells = [r["seconds"], stored / 1e9 / r["seconds"], r["size_gib"], r.get("device_gib"), r["host_gib"]]
        lines.append(f"  {r['loader']:14s}" + "".join(f"{'-' if c is None else format(c, '.2f'):>8s}" for c in cells))
    return lines


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--folder", type=Path, help="where the weights lie or are written to; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=2, help="loads of each loader")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one load, imports included")
    parser.add_argument("--out", type=Path, help="JSON with hardware, versions and all results")
    return parser


def main() -> None:
    a = arguments().parse_args()
    if a.device is None:
        import torch

        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="fastplug-loading-") as temporary:
        run(a, a.folder or Path(temporary, "model"))


def run(a: argparse.Namespace, folder: Path) -> None:
    started = time.perf_counter()

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    check_folder(folder, a.shape, a.layers)
    if not (folder / "config.json").exists():
        command = [sys.executable, "-m", "benchmarks.weights", a.shape, str(folder)]  # whose memory ends with it
        subprocess.run([*command, *(["--layers", str(a.layers)] if a.layers else [])], check=True, cwd=ROOT)
        log(f"wrote the weights into {folder}")
    results, stored = [], 0
    for number in range(a.rounds):
        for loader in LOADERS:
            stored = warm(folder)
            results.append({**measured(loader, folder, a.device, a.shape, a.timeout), "round": number})
            log(table(results[-1:], stored)[-1].strip())
    differ = compared(results)
    said = verdicts(results, differ)
    print("\n".join(["", f"{a.shape}, {stored / 1e9:.2f} GB in bf16", *table(results, stored), *said]), flush=True)
    if a.out:
        record = {
            "shape": a.shape, "layers": a.layers, "stored_bytes": stored, "date": time.strftime("%Y-%m-%d"),
            "command": called("loading"), "hardware": hardware(),
            "versions": versions(), "differ": differ, "verdicts": said,
            "compared": sorted(results[0].get("digests", {})),
            "results": [{k: v for k, v in r.items() if k != "digests"} for r in results],
        }  # fmt: skip
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(record, indent=1) + "\n")


def check_folder(folder: Path, shape: str, layers: int | None) -> None:
    """Raise ``SystemExit`` if a folder that is there holds another shape."""
    if not (folder / "config.json").exists():
        return
    found, asked = json.loads((folder / "config.json").read_text()), config(shape, layers)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        if found.get(name) != getattr(asked, name):
            raise SystemExit(f"{folder} holds a model whose {name} is {found.get(name)}, not {getattr(asked, name)}")


if __name__ == "__main__":
    main()
