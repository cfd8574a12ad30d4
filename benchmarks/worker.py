"""One process of one system: it imports at once, then waits for rows on its standard input.

    python -m benchmarks.worker SYSTEM SHAPE [--layers N] [--path FOLDER]

A line is ``{"row": ..., "effort": {...}}``; the answer is a line ``RESULT {...}``. A model stays loaded while the rows
that follow can use it. So the imports of all systems are paid for once, side by side, and not while anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from typing import Any


def say(kind: str, content: Any) -> None:
    print(f"\n{kind} {json.dumps(content)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system")
    parser.add_argument("shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--path", default="")
    a = parser.parse_args()
    started = time.time()
    from benchmarks.systems import System, preload

    system = System.parse(a.system)
    try:
        preload(system, a.shape)
    except Exception as error:
        traceback.print_exc()
        say("FAILED", f"{type(error).__name__}: {error}")
        return
    say("READY", round(time.time() - started, 1))
    serve(system, a)


def serve(system: Any, a: argparse.Namespace) -> None:
    from benchmarks.measure import Effort, gib
    from benchmarks.rows import Row

    model, loaded = None, None
    for line in sys.stdin:
        asked = json.loads(line)
        row = Row.parse(asked["row"])
        if "free" in asked:
            model = loaded = None
            free()
            say("FREED", gib("memory_allocated") or 0.0)
            continue
        result: dict[str, Any] = {"system": system.name, "row": str(row)}
        try:
            if loaded != row.loading:
                model = None
                free()
                model, result = load(system, a, row, result)
                loaded = row.loading
            result |= run(model, row, Effort(**asked["effort"]))
        except Exception as error:  # out of memory among them
            traceback.print_exc()
            result["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            model = loaded = None
        free()
        say("RESULT", result)


def load(system: Any, a: argparse.Namespace, row: Any, result: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from benchmarks.measure import gib, synchronize
    from benchmarks.systems import load as load_system
    from benchmarks.weights import fingerprint

    started = time.time()
    model = load_system(system, a.shape, a.layers, row, a.path).train()
    synchronize()
    loaded = {
        "load_s": round(time.time() - started, 1),
        "weights": fingerprint(model),
        "base_gib": gib("memory_allocated"),
    }
    return model, {**result, **loaded}


def run(model: Any, row: Any, effort: Any) -> dict[str, Any]:
    """In a frame of its own, so that nothing of a failed row is left when its error has been written down."""
    from benchmarks.measure import measure

    return measure(model, row, effort)


def free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
