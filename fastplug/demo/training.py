"""One training run of the demo with the Trainer, and what it measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastplug.demo.busy import OtherPrograms
from fastplug.demo.config import DemoConfig, RunResult
from fastplug.demo.data import Collator, Example
from fastplug.demo.memory import PeakMemory
from fastplug.demo.model import precision_of

Progress = Callable[[int, str], None]  # steps done, a note


def train(
    name: str,
    model: Any,
    examples: Sequence[Example],
    pad_id: int,
    config: DemoConfig,
    device: torch.device,
    callbacks: Sequence[TrainerCallback],
    progress: Progress,
    folder: str | os.PathLike[str],
) -> RunResult:
    """Train the adapter of ``model`` in place for ``config.steps`` steps.

    Args:
        name: What the result is called.
        callbacks: What a user would add, before the demo's own that measures.
        progress: Called after each step.
        folder: The Trainer's output directory.
    """
    args = TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, config.steps // 10),
        logging_steps=1,
        bf16=precision_of(device).name == "bfloat16",
        use_cpu=device.type == "cpu",
        seed=config.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    collator = Collator(pad_id)
    watch = _Stopwatch(device, collator, progress)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=list(examples),  # type: ignore[arg-type]
        data_collator=collator,  # type: ignore[arg-type]
        callbacks=[*callbacks, watch],
    )
    trainer.remove_callback(PrinterCallback)
    memory, others = PeakMemory(device), OtherPrograms()
    trainer.train()
    peak, share = memory.read(), others.share()
    # Mixed precision wraps the model's forward; without this the next run would wrap it once more.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.zero_grad(set_to_none=True)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    steps = len(watch.seconds)  # the data loader is one batch ahead
    return RunResult(
        name=name,
        losses=tuple(losses),
        tokens=tuple(collator.tokens[:steps]),
        seconds=tuple(watch.seconds),
        batches=tuple(collator.checksums[:steps]),
        warmup=min(3, steps - 1),
        peak_bytes=peak,
        memory_kind=memory.kind,
        others=share,
    )


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore_adapter(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put the trained parameters back to ``state``, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])


class _Stopwatch(TrainerCallback):
    """The time of each step, with the device waited for at both ends."""

    def __init__(self, device: torch.device, collator: Collator, progress: Progress) -> None:
        self.device, self.collator, self.progress = device, collator, progress
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = self._now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self._began)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and self.seconds:
            step = len(self.seconds) - 1
            rate = self.collator.tokens[step] / self.seconds[step]
            self.progress(step + 1, f"loss {float(logs['loss']):.3f}, {rate:,.0f} tokens/s")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
