"""``optimizer_in_backward: true``: the optimizer that Axolotl has made steps within the backward."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastplug.errors import OptionError
from fastplug.optimizers import OptimizerInBackward


class StepInBackward(TrainerCallback):
    """Puts :class:`~fastplug.optimizers.OptimizerInBackward` around the Trainer's optimizer when training begins.

    By then there is one, of whatever kind the config asks for, with its groups, its schedule and, in a run that goes on
    from a checkpoint, its states.

    Raises:
        OptionError: The Trainer would clip the gradients, or scale them.
    """

    def __init__(self, trainer: Any) -> None:
        args: TrainingArguments = trainer.args
        if args.max_grad_norm:
            raise OptionError(
                "fastplug: optimizer_in_backward uses each gradient before all could be clipped together, which "
                f"max_grad_norm: {args.max_grad_norm} asks for (1.0 is the default): set max_grad_norm: 0 in the config"
            )
        if args.fp16:
            raise OptionError(
                "fastplug: optimizer_in_backward uses each gradient before its scale is taken away, which fp16 needs: "
                "train in bf16, or remove optimizer_in_backward"
            )
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        prepared = getattr(trainer.optimizer, "optimizer", None)  # Accelerate's is around the one that steps
        owner = trainer.optimizer if isinstance(prepared, torch.optim.Optimizer) else trainer
        if isinstance(owner, OptimizerInBackward) or isinstance(owner.optimizer, OptimizerInBackward):
            return
        owner.optimizer = OptimizerInBackward(owner.optimizer, accumulation_steps=args.gradient_accumulation_steps)
        trainer.callback_handler.optimizer = trainer.optimizer


__all__ = ["StepInBackward"]
