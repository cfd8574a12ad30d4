"""A check that has to wait until every rank has its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LateCheck(TrainerCallback):
    """Calls ``check`` with the model when training begins, after the FastPlugCallback, which is in front."""

    def __init__(self, check: Callable[[Any], None]) -> None:
        self.check = check

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.check(model)
