"""Memory plans and the optimizer within the backward, through Axolotl's plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl")

import fastplug
from fastplug.errors import OptionError
from fastplug.memory import saved_plans
from fastplug.memory.runtime import planners
from fastplug.optimizers import OptimizerInBackward
from tests import models
from tests.axolotl.test_plugin import plugins
from tests.hf import tiny

__all__ = ["plugins"]  # a fixture

OTHERS = ["residual", "keep", "drop_gate_up"]


def make(kind: str) -> Any:
    model = models.plain(num_hidden_layers=3)
    return models.lora(model) if kind == "lora" else model


def train(plugins: Any, folder: Path, kind: str = "lora", resume: Any = None, *, given: Any, **changes: Any) -> Any:
    """A Trainer as Axolotl runs it with these options under ``fastplug:``."""
    cfg, (plugin,) = plugins(fastplug={"strict": True, **given}, adapter="lora" if kind == "lora" else None)
    model = make(kind)
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    trainer = tiny.trainer(model, folder, *plugin.add_callbacks_pre_trainer(cfg, model), **values)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(ours: Any, theirs: Any) -> bool:
    mine, others = weights(ours), weights(theirs)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def kept(trainer: Any) -> list[str]:
    (planner,) = planners(trainer.model)
    assert planner.plan is not None
    return [policy.value for policy in planner.plan.policies]


def test_plans_are_saved_gone_on_with_and_pinned(plugins: Any, tmp_path: Path) -> None:
    plain = train(plugins, tmp_path / "plain", given={})
    planned = train(plugins, tmp_path / "planned", given={"memory": "auto"})
    assert kept(planned) == ["keep"] * 3
    assert same(planned, plain)
    checkpoint = tmp_path / "planned" / "checkpoint-2"
    saved = json.loads((checkpoint / saved_plans.FILE).read_text())
    for plan in saved[0]["plans"]:  # so that it is seen which plan is followed
        plan["policies"] = OTHERS
    (checkpoint / saved_plans.FILE).write_text(json.dumps(saved))
    again = train(plugins, tmp_path / "planned", resume=str(checkpoint), given={"memory": "auto"})
    assert kept(again) == OTHERS
    assert same(again, plain)
    pinned = train(plugins, tmp_path / "pinned", given={"memory": "auto", "memory_plan": str(checkpoint)})
    assert kept(pinned) == OTHERS
    assert planners(pinned.model)[0].pinned
    assert same(pinned, plain)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_optimizer_steps_within_the_backward(accumulation: int, plugins: Any, tmp_path: Path) -> None:
    """The weights of the ordinary optimizer to the last bit, also where the run goes on from a checkpoint."""
    changes = {"max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation}
    plain = train(plugins, tmp_path / "plain", "full", given={}, **changes)
    given = {"optimizer_in_backward": True, "memory": "1GiB"}
    ours = train(plugins, tmp_path / "ours", "full", given=given, **changes)
    assert isinstance(ours.optimizer.optimizer, OptimizerInBackward)
    assert same(ours, plain)
    assert tiny.losses(ours) == tiny.losses(plain)
    (planner,) = planners(ours.model)
    assert planner.stock is not None
    assert planner.stock.states.in_backward is (accumulation == 1)
    checkpoint = str(tmp_path / "ours" / "checkpoint-2")
    again = train(plugins, tmp_path / "ours", "full", resume=checkpoint, given=given, **changes)
    assert same(again, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "set max_grad_norm: 0 in the config"), ({"max_grad_norm": 0.0, "fp16": True}, "train in bf16")],
)
def test_what_needs_all_gradients_is_refused_before_training(
    changes: dict[str, Any], message: str, plugins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, (plugin,) = plugins(fastplug={"optimizer_in_backward": True}, adapter=None)
    model = make("full")
    fp16 = changes.pop("fp16", False)
    trainer = tiny.trainer(model, tmp_path, *plugin.add_callbacks_pre_trainer(cfg, model), **changes)
    trainer.args.fp16 = fp16  # which no CPU trains in
    with pytest.raises(OptionError, match=message):
        plugin.post_trainer_create(cfg, trainer)


def test_the_key_is_checked() -> None:
    from pydantic import ValidationError

    from fastplug_axolotl.args import FastPlugArgs, split, steps_in_backward

    given = FastPlugArgs.model_validate({"fastplug": {"optimizer_in_backward": True}}).model_dump()["fastplug"]
    assert steps_in_backward(given)
    assert split(given) == (fastplug.Options(), None)
    assert not steps_in_backward(None)
    with pytest.raises(ValidationError, match="optimizer_in_backward must be true or false, not 'yes'"):
        FastPlugArgs.model_validate({"fastplug": {"optimizer_in_backward": "yes"}})
    with pytest.raises(ValidationError, match="did you mean 'optimizer_in_backward'"):
        FastPlugArgs.model_validate({"fastplug": {"optimizer_in_backwards": True}})
