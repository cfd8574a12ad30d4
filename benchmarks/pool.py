"""The worker processes of a run: started together, asked one at a time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hardware import ROOT
from benchmarks.rows import Row
from benchmarks.systems import FROM_FOLDER, System

Key = tuple[Any, ...]
START = 240.0  # seconds that imports may take
LEFT = 0.5  # GiB that may stay allocated when a model is dropped; with more, the next one gets a new process


def key(system: System, row: Row) -> Key:
    """Which runs share a process: all of a system, but not what patches the whole process for one setting (Unsloth),
    nor a run that is measured from its first step on."""
    if row.random:
        return system.name, str(row)
    return (system.name, row.loading) if system.base in FROM_FOLDER else (system.name,)


class Worker:
    """A process of ``benchmarks.worker`` and what it says."""

    def __init__(self, system: str, shape: str, layers: int | None, path: str, scratch: Path, cold: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", system, shape, "--path", path]
        command += ["--layers", str(layers)] if layers else []
        scratch.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
        environment = {
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }  # fmt: skip
        if cold:
            environment |= {name: str(scratch / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        self.log = scratch / "stderr.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
                cwd=scratch,
            )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: the answer will say so

    def answer(self, kinds: tuple[str, ...], timeout: float) -> tuple[str, Any]:
        """The next ``(kind, content)`` out of ``kinds``, or ``("DIED", reason)``."""
        until = time.time() + timeout
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, until - time.time()))
            except queue.Empty:
                self.end()
                return "DIED", f"no answer in {timeout:.0f} s"
            if line is None:
                return "DIED", self.last_words()
            kind, _, content = line.partition(" ")
            if kind in kinds or kind == "FAILED":
                return kind, json.loads(content)

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines or ["it ended without a word"])[-1][:300]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Pool:
    """All workers of a run. Only one of them works at a time."""

    def __init__(self, shape: str, layers: int | None, path: str, log: Callable[[str], None], timeout: float) -> None:
        self.shape, self.layers, self.path, self.log, self.timeout = shape, layers, path, log, timeout
        self.scratch = tempfile.TemporaryDirectory(prefix="fastplug-bench-", ignore_cleanup_errors=True)
        self.workers: dict[Key, Worker] = {}
        self.failed: dict[Key, str] = {}
        self.count = 0

    def start(self, keys: list[Key]) -> None:
        """Start a worker for each key, and wait until all have imported what they need."""
        for one in dict.fromkeys(keys):
            self._spawn(one)
        for one, worker in list(self.workers.items()):
            self._await(one, worker)

    def _spawn(self, one: Key) -> Worker:
        self.count += 1
        scratch = Path(self.scratch.name, f"{self.count}")
        cold = ":random" in str(one[-1])
        worker = self.workers[one] = Worker(one[0], self.shape, self.layers, self.path, scratch, cold)
        return worker

    def _await(self, one: Key, worker: Worker) -> None:
        kind, content = worker.answer(("READY",), START)
        if kind == "READY":
            self.log(f"{one[0]} is ready after {content} s")
            return
        self.failed[one] = str(content)
        self.log(f"{one[0]} cannot run: {content}")
        self.drop(one)

    def run(self, system: System, row: Row, effort: dict[str, Any], keep: bool, again: bool) -> dict[str, Any]:
        """One row of one system. ``keep`` leaves its model loaded for the next row; ``again``: it will be asked again
        later."""
        one, head = key(system, row), {"system": system.name, "row": str(row)}
        if one not in self.workers and one not in self.failed:
            self._await(one, self._spawn(one))
        if one in self.failed:
            return {**head, "error": self.failed[one]}
        worker = self.workers[one]
        worker.ask({"row": str(row), "effort": effort})
        kind, result = worker.answer(("RESULT",), self.timeout)
        if kind != "RESULT":
            self.drop(one)
            return {**head, "error": str(result)}
        if not again:
            self.drop(one)
        elif not keep:
            worker.ask({"row": str(row), "free": True})
            kind, left = worker.answer(("FREED",), 60.0)
            if kind != "FREED" or left > LEFT:
                self.log(f"{system.name} kept {left} GiB and gets a new process")
                self.drop(one)
        return result  # type: ignore[no-any-return]

    def drop(self, one: Key) -> None:
        worker = self.workers.pop(one, None)
        if worker is not None:
            worker.end()

    def close(self) -> None:
        for one in list(self.workers):
            self.drop(one)
        self.scratch.cleanup()
