"""``fastplug demo``: fine-tune a small chat model with and without fastplug, and compare the two runs.

The demo is what a user would write: NF4 weights from bitsandbytes, LoRA from PEFT, the Trainer of transformers, and in
the second run ``callbacks=[FastPlugCallback()]``. Both runs start from the same weights and read the same batches, so
their losses must agree; time and memory are what may differ.

    from fastplug.demo import DemoConfig, run
    result = run(DemoConfig(steps=10, out="demo"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastplug.demo.config import Answer, DemoConfig, DemoError, DemoResult, LogitCheck, RunResult

if TYPE_CHECKING:
    from fastplug.demo.pipeline import run

__all__ = ["Answer", "DemoConfig", "DemoError", "DemoResult", "LogitCheck", "RunResult", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from fastplug.demo.pipeline import run

        return run
    raise AttributeError(f"module 'fastplug.demo' has no attribute {name!r}")
