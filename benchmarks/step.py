"""Whole training steps of fastplug and its peers on one GPU, in one run.

    python -m benchmarks.step --shape llama-3.1-8b --row qlora:4x2048 --row qlora:4x2048:checkpointed
    python -m benchmarks.step --shape llama-3.1-8b --row qlora:2x1024 --lengths random --steps 200
    python -m benchmarks.step --systems hf,unsloth,fastplug,fastplug-graphs-off --row qlora:2x512 --out step.json

Every system has the same random weights, sees the same tokens and runs the same loop: forward, backward, fused AdamW on
the LoRA weights. Each system is a process; all import at the same time, before anything is measured, and one alone runs
at a time. Before a ratio is printed, loss, gradient norm and the number of LoRA tensors without a gradient are compared
with those of transformers + PEFT: of this run, or with `--oracle` of an earlier one on the same weights and tokens,
which its JSON holds. Where it ran in neither, the first system takes its place, and the table says so.

A row is ``qlora`` or ``lora``, then BATCHxSEQUENCE, then any of ``dora``, ``checkpointed``, ``prepared`` (PEFT's k-bit
preparation: an fp32 residual stream), ``autocast``, ``random``; ``table`` stands for the six rows of the documentation.
A row with ``dora`` is also compared with the same system's row without, if that was run too:
``--row qlora:4x2048:dora --row qlora:4x2048``.
The system ``hf-prepared`` runs a row with PEFT's preparation beside others without. With random lengths a row is
measured from its first step on in a process of its own with empty compiler caches: warming up, compiling and recording
are part of the time. Systems that are not installed are left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.hardware import called, hardware, versions
from benchmarks.measure import Effort
from benchmarks.pool import Pool, key
from benchmarks.report import brief, check, oracle, table, unpatched
from benchmarks.report import called as called_oracle
from benchmarks.rows import TABLE, Row
from benchmarks.shapes import SHAPES
from benchmarks.systems import FROM_FOLDER, SYSTEMS, System
from benchmarks.weights import room

Run = tuple[System, Row]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--row", dest="rows", action="append", default=[], help="see above; default: table")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="joined by commas; see benchmarks/systems.py")
    parser.add_argument("--run", action="append", default=[], metavar="SYSTEM=ROW", help="single runs, not a grid")
    parser.add_argument("--lengths", choices=("fixed", "random"), default="fixed")
    parser.add_argument("--warmup", type=int, default=Effort.warmup)
    parser.add_argument("--steps", type=int, default=Effort.steps)
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="at most, of a row's timed steps")
    parser.add_argument("--no-profile", action="store_true", help="no busy time and no list of kernels")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for one row of one system")
    parser.add_argument("--oracle", type=Path, action="append", default=[], help="JSON of an earlier run, see above")
    parser.add_argument("--out", type=Path, help="JSON with hardware, versions, commit and all results")
    parser.add_argument("--chart", type=Path, help="PNG")
    parser.add_argument("--path", help="folder for the weights of systems that load them from one")
    return parser


def planned(a: argparse.Namespace) -> list[Run]:
    """The runs in their order: rows that share a loading together, within them one system after another, and the longer
    rows of each first (what a shorter one needs is then allocated)."""
    if a.run:
        pairs = [text.rpartition("=") for text in a.run]
        return [(System.parse(name), _row(row, a.lengths)) for name, _, row in pairs]
    texts = [row for text in a.rows or ["table"] for row in (TABLE if text == "table" else (text,))]
    rows = [_row(text, a.lengths) for text in texts]
    systems = [System.parse(name) for name in a.systems.split(",")]
    runs: list[Run] = []
    for loading in dict.fromkeys((row.loading, row.random) for row in rows):
        mine = [row for row in rows if (row.loading, row.random) == loading]
        mine.sort(key=lambda row: -row.batch * row.sequence)
        runs += [(system, row) for system in systems for row in mine]
    return runs


def _row(text: str, kind: str) -> Row:
    row = Row.parse(text)
    return Row(**{**asdict(row), "random": True}) if kind == "random" else row


def main() -> None:
    a = arguments().parse_args()
    a.earlier = unpatched([json.loads(path.read_text()) for path in a.oracle], a.shape, a.layers)
    started = time.time()

    def log(text: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {text}", flush=True)

    runs = planned(a)
    folder = a.path or f"{room(a.shape, a.layers)}/fastplug-bench-{a.shape}-{a.layers or 'all'}"
    writer = None
    if any(system.base in FROM_FOLDER for system, _ in runs) and not Path(folder, "config.json").exists():
        command = [sys.executable, "-m", "benchmarks.weights", a.shape, folder]
        command += ["--layers", str(a.layers)] if a.layers else []
        writer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        log(f"writing the weights into {folder}")
    pool = Pool(a.shape, a.layers, folder, log, a.timeout)
    results: list[dict[str, Any]] = []
    try:
        pool.start([key(*run) for run in runs if run[0].refuses(run[1]) is None])
        if writer is not None:
            log("the weights are written" if writer.wait() == 0 else "writing the weights FAILED")
        effort = asdict(Effort(a.warmup, a.steps, a.seconds, not a.no_profile))
        for i, (system, row) in enumerate(runs):
            reason = system.refuses(row)
            if reason is not None:
                result: dict[str, Any] = {"system": system.name, "row": str(row), "error": reason}
            else:
                later = [key(*run) for run in runs[i + 1 :]]
                next_loading = runs[i + 1][1].loading if later and later[0] == key(system, row) else None
                result = pool.run(
                    system, row, effort, keep=next_loading == row.loading, again=key(system, row) in later
                )
            results.append(result)
            trouble = check(result, oracle(results, str(row), a.earlier))
            log(f"{system.name} {row}: {trouble or 'ok'}  {brief(result)}")
            if a.out:
                save(a, results, time.time() - started)
    finally:
        pool.close()
        if not a.path and writer is not None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(table(results, a.earlier)), flush=True)
    if a.chart:
        from benchmarks.chart import draw

        draw(record(a, results, time.time() - started), a.chart)


def record(a: argparse.Namespace, results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    return {
        "shape": a.shape,
        "layers": a.layers,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds),
        "command": called("step"),
        "hardware": hardware(),
        "versions": versions(),
        "results": [
            {**r, "checked_against": called_oracle(oracle(results, r["row"], a.earlier)),
             "trouble": check(r, oracle(results, r["row"], a.earlier))}
            for r in results
        ],
    }  # fmt: skip


def save(a: argparse.Namespace, results: list[dict[str, Any]], seconds: float) -> None:
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(record(a, results, seconds), indent=1) + "\n")


if __name__ == "__main__":
    main()
