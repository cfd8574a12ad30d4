"""``fastplug.verify`` on whole models of the shapes that are measured, on random weights and tokens.

    python -m benchmarks.verifying --out verify.json
    python -m benchmarks.verifying --shapes qwen3-8b --row qlora:2x512 --compare 4

A row is that of benchmarks/rows.py; ``fastplug+KEY=VALUE`` names a system with options. Exits 1 on a mismatch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import called, hardware, versions
from benchmarks.rows import Row
from benchmarks.shapes import SHAPES
from benchmarks.systems import System, load, preload


def verified(shape: str, system: System, row: Row, layers: int | None, compare: int | None) -> dict[str, Any]:
    """One model, patched and compared with its original: layer by layer, and every gradient."""
    import fastplug

    began = time.monotonic()
    preload(system, shape)
    model = load(system, shape, layers, row, "").train()
    tokens = torch.randint(3, model.config.vocab_size, (row.batch, row.sequence), device=model.device)
    result = fastplug.verify(model, {"input_ids": tokens, "labels": tokens}, layers=compare)
    ratios = sorted(found.ratio for found in result.rows if found.ratio is not None)
    return {
        "shape": shape, "system": system.name, "row": str(row), "ok": result.ok, "comparisons": len(result.rows),
        "largest_ratio": round(ratios[-1], 3) if ratios else None,
        "median_ratio": round(ratios[len(ratios) // 2], 3) if ratios else None,
        "failed": [f"{bad.kind} of {bad.name}: {bad.error:.2e}, allowed {bad.limit:.2e}" for bad in result.failed[:10]],
        "dead": len(result.dead), "notes": list(result.notes), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [shape for shape in SHAPES if shape != "tiny"]
    parser.add_argument("--shapes", default=",".join(shapes), help="joined by commas (default: all)")
    parser.add_argument("--systems", default="fastplug", help="fastplug, with options or not, joined by commas")
    parser.add_argument("--row", type=Row.parse, action="append", dest="rows", help="default: qlora:2x512, lora:2x512")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--compare", type=int, help="how many layers to compare one by one (default: all)")
    parser.add_argument("--out", type=Path, help="JSON with hardware, versions and commit")
    return parser


def main() -> int:
    a = arguments().parse_args()
    results = []
    for shape in a.shapes.split(","):
        for row in a.rows or [Row.parse("qlora:2x512"), Row.parse("lora:2x512")]:
            for system in map(System.parse, a.systems.split(",")):
                results.append(verified(shape, system, row, a.layers, a.compare))
                print(json.dumps(results[-1]), flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                if a.out:
                    record = {"command": called("verifying"), "hardware": hardware(), "versions": versions()}
                    a.out.write_text(json.dumps({**record, "results": results}, indent=1))
    return int(not all(result["ok"] and not result["dead"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
