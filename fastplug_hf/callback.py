"""FastPlugCallback: the Trainer's lifecycle translated into apply, undo and two metrics.

No event of the Trainer hands a callback the Trainer or its list of callbacks, and two things need them:

* **Metrics.** ``Trainer.log`` appends a copy of the logs to ``log_history`` and then calls ``on_log`` of the callbacks
  in order, TensorBoard and W&B before those of the user. So what a user's callback adds reaches neither. This one moves
  itself to the front of its Trainer's list, where adding to ``logs`` reaches every tracker and the progress bar, and
  adds the same to the last entry of ``log_history``, which becomes ``trainer_state.json``.
* **Ctrl-C.** No event follows an exception that leaves ``train()``. So this one Trainer's class is swapped for a
  subclass of it, in name the same, whose ``train`` passes the exception on to the callback.

Both objects are the ``self`` of a calling frame when an event arrives, and are found there (``host.py``): nothing
global is patched and no other Trainer is touched. Where they are not found (a trainer of another make), training works,
the metrics reach ``trainer_state.json``, and ``with FastPlugCallback() as callback:`` undoes at the end in any case.
"""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import get_verbosity

import fastplug
from fastplug.errors import ModelError, OptionError
from fastplug.memory import saved_plans
from fastplug.memory.runtime import planners
from fastplug.metrics import Meter
from fastplug.patching.engine import spare
from fastplug.run_exports import Exports, describe, export_each, parse_exports
from fastplug_hf.host import caller, calling_value, guard
from fastplug_hf.metrics import TokenCounter

logger = logging.getLogger("fastplug")
REPORT = "fastplug_report.json"


class FastPlugCallback(TrainerCallback):
    """Apply fastplug to the Trainer's model: ``Trainer(..., callbacks=[FastPlugCallback()])``.

    Args:
        undo_at_end: Give the model back as it was when ``train()`` ends, in whatever way. By default it stays patched
            (and saves, loads and generates as before), except after a Ctrl-C.
        export: What to write into ``<output_dir>/<format>`` when ``train()`` ends well, on the first rank: a format of
            :func:`fastplug.export` (``"merged_16bit"``), several, or a mapping of formats to their options. What an
            earlier run wrote there is replaced. An export that fails is logged, and with ``strict=True`` raised.
        options: The keys of :class:`fastplug.Options`.

    Logs per training step logged: ``fastplug/tokens_per_second`` (unpadded tokens of all ranks over the time spent
    training, evaluation and saving left out) and ``fastplug/peak_memory_gib`` (the highest of all ranks). Writes
    ``fastplug_report.json`` into the output directory and every checkpoint, and with ``memory=`` the memory plans into
    every checkpoint, by which a run that goes on from there trains.

    Raises:
        OptionError: An option is unknown or impossible.
        StrictError: With ``strict=True``, from the Trainer's constructor, where not all was patched.
    """

    def __init__(self, *, undo_at_end: bool = False, export: Exports | None = None, **options: Any) -> None:
        if not isinstance(undo_at_end, bool):
            raise OptionError(f"fastplug: undo_at_end must be true or false, not {undo_at_end!r}")
        self.undo_at_end = undo_at_end
        self.options = fastplug.Options.of(options, also=("undo_at_end", "export"))
        self.exports = parse_exports(export)
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._meter = Meter()
        self._counter = TokenCounter(self._meter)
        self._announced: set[str] = set()
        self._told: set[str] = set()
        self._active = True
        self._in_training = False

    def undo(self) -> None:
        """Give every model that this callback patched back as it was. Training again patches again."""
        self._stop_meter()
        for model in list(self._models):
            fastplug.undo(model)
        self._models.clear()

    def __enter__(self) -> FastPlugCallback:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._take_place(state)
        trainer = caller(Trainer)
        if trainer is not None:
            guard(trainer, _tell)
        self._apply(model, state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._in_training = True
        self._take_place(state)
        self._apply(model, state)  # model_init and Liger come after on_init_end
        self._go_on_with_plans(model, state)
        if self._active and isinstance(model, nn.Module):
            self._meter.start()
            self._counter.attach(model)
            self._write_report(model, args, state, args.output_dir)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._in_training:
            self._in_training = True
            self._say(
                state,
                "fastplug: FastPlugCallback was added after training began and takes no part in this run; give it to "
                "the Trainer's constructor, or call train() again",
            )
        self._meter.step_begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._meter.tick()
        if self.options.memory is not None and "plan" not in self._told and isinstance(kwargs.get("model"), nn.Module):
            for planner in planners(kwargs["model"]):
                self._told.add("plan")
                self._say(state, f"fastplug: memory={self.options.memory!r}: {planner.plan or planner.off}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._meter.running:  # evaluations and the closing summary
            return
        parallelism = getattr(args, "parallelism_config", None)
        replicas: int = getattr(model, "_tp_size", None) or getattr(parallelism, "tp_size", None) or 1
        metrics = self._meter.read(args.device, replicas)
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._meter.pause()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._meter.pause()
        checkpoint = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if os.path.isdir(checkpoint):
            self._write_report(model, args, state, checkpoint)
            if state.is_world_process_zero and model in self._models:
                self._save_plans(model, checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._in_training = False
        took_part = self._stop_meter()
        if model in self._models:
            spare(model)
        self._write_report(model, args, state, args.output_dir)  # now with the calls that ran an original forward
        if took_part and state.is_world_process_zero:
            tokenizer = kwargs.get("processing_class")
            for result in export_each(model, args.output_dir, self.exports, tokenizer, self.options.strict):
                self._say(state, describe(result))
        if self.undo_at_end:
            self.undo()

    def on_exception(self, error: BaseException) -> None:
        """``train()`` was left by an exception: undo after a Ctrl-C, after any other if ``undo_at_end``."""
        self._in_training = False
        self._stop_meter()
        if self._models and (self.undo_at_end or isinstance(error, KeyboardInterrupt)):
            self.undo()
            logger.warning("fastplug: training was interrupted; the model is as it was before fastplug")

    def _stop_meter(self) -> bool:
        """Stop measuring; whether it was."""
        was_running = self._meter.running
        self._meter.stop()
        self._counter.detach()
        return was_running

    def _take_place(self, state: TrainerState) -> None:
        """Move to the front of the Trainer's callbacks, or step aside for another FastPlugCallback."""
        handler = caller(CallbackHandler)
        if handler is None:
            return
        callbacks: list[Any] = handler.callbacks
        first = next(callback for callback in callbacks if isinstance(callback, FastPlugCallback))
        self._active = first is self
        if not self._active:
            self._say(state, "fastplug: this Trainer has two FastPlugCallbacks; the second does nothing, remove it")
            return
        # The handler may be iterating over this list: taking this entry out and putting it in before leaves the
        # position of all later ones alone.
        callbacks.remove(self)
        callbacks.insert(sum(type(callback) is DefaultFlowCallback for callback in callbacks[:1]), self)

    def _apply(self, model: Any, state: TrainerState) -> None:
        if not self._active:
            return
        try:
            report = fastplug.apply(model, self.options).report
        except ModelError as error:  # weights on the meta device, not a module: the Trainer's own business
            if self.options.strict:
                raise
            self._say(state, f"{error}; training goes on without fastplug")
            return
        self._models.add(model)
        self._say(state, report.summary())

    def _go_on_with_plans(self, model: Any, state: TrainerState) -> None:
        """Train by the memory plans of the checkpoint that this run goes on from."""
        checkpoint = calling_value("resume_from_checkpoint")
        if checkpoint is None or model not in self._models or self.options.memory is None:
            return
        if not Path(checkpoint, saved_plans.FILE).is_file():
            self._say(state, f"fastplug: {checkpoint} has no memory plans, so new ones are made")
            return
        reason = saved_plans.restore(model, saved_plans.read(checkpoint))
        if reason is not None:
            self._say(state, f"fastplug: {reason}")

    def _save_plans(self, model: nn.Module, folder: str) -> None:
        try:
            saved_plans.save(model, folder)
        except OSError as error:
            logger.warning("fastplug: the memory plans could not be written to %s (%s)", folder, error)

    def _say(self, state: TrainerState, text: str) -> None:
        """Log each text once, on the first rank, unless transformers' verbosity is below warnings.

        At the level INFO where such records go anywhere, else as a warning: a run must say that fastplug is at work.
        """
        if not state.is_world_process_zero or text in self._announced or get_verbosity() > logging.WARNING:
            return
        self._announced.add(text)
        shown = logger.isEnabledFor(logging.INFO) and logger.hasHandlers()
        for line in text.splitlines():
            logger.log(logging.INFO if shown else logging.WARNING, line)

    def _write_report(self, model: Any, args: TrainingArguments, state: TrainerState, folder: str) -> None:
        if not state.is_world_process_zero or model not in self._models:
            return
        try:
            os.makedirs(folder, exist_ok=True)
            Path(folder, REPORT).write_text(fastplug.report(model).to_json(), encoding="utf-8")
        except OSError as error:
            logger.warning("fastplug: the report could not be written to %s (%s)", folder, error)


def _tell(trainer: Trainer, error: BaseException) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, FastPlugCallback):
            callback.on_exception(error)


__all__ = ["REPORT", "FastPlugCallback"]
