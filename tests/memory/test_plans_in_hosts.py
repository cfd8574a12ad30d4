"""Memory plans in the hosts: saved with checkpoints, taken up again, pinned by the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastplug
from fastplug import OptionError
from fastplug.memory import saved_plans
from fastplug.memory.runtime import planners
from tests import models
from tests.memory.device import Device, MiB, gradients, same_bits

pytest.importorskip("peft")
pytest.importorskip("accelerate")

BATCH = models.batch(2, 60)


def make() -> Any:
    return models.lora(models.plain(num_hidden_layers=3))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, Path]:
    """A model that has trained under a plan, and a folder that its plans were written to."""
    model = make()
    fastplug.apply(model, memory="3MiB")
    planners(model)[0].meter = Device(model, 64 * MiB)
    gradients(model, BATCH)
    written = saved_plans.save(model, tmp_path)
    assert written == tmp_path / saved_plans.FILE
    return model, tmp_path


def test_plans_survive_a_file(trained: tuple[Any, Path]) -> None:
    model, folder = trained
    (planner,) = planners(model)
    found = saved_plans.load(folder)
    assert found == saved_plans.saved_plans(planner)
    assert found.plans == tuple(planner.plans.values())
    assert found.layers == 3
    assert saved_plans.save(make(), folder) is None  # nothing is planned, so nothing is written


@pytest.mark.parametrize("pin", [True, False], ids=["memory_plan", "restore"])
def test_a_saved_plan_is_followed_on_another_device(trained: tuple[Any, Path], pin: bool) -> None:
    model, folder = trained
    plans = dict(planners(model)[0].plans)
    twin = make()
    fastplug.apply(twin, memory="3MiB", memory_plan=str(folder) if pin else None)
    (planner,) = planners(twin)
    if not pin:
        assert saved_plans.restore(twin, saved_plans.read(folder)) is None
    planner.meter = device = Device(twin, 3 * MiB)
    device.others = MiB  # a plan of its own would keep less
    for _ in range(4):
        assert same_bits(gradients(twin, BATCH), gradients(model, BATCH))
    assert planner.plans == plans
    gradients(twin, models.batch(2, 100))
    assert planner.plan is not None
    assert planner.plan.budget == plans[2, 64].budget  # of the same numbers
    assert any("trains by a saved plan" in note for note in fastplug.report(twin).notes)


def test_plans_for_something_else_are_not_used(trained: tuple[Any, Path]) -> None:
    values = saved_plans.read(trained[1])
    other = make()
    fastplug.apply(other, memory="4MiB")
    reason = saved_plans.restore(other, values)
    assert reason is not None
    assert "were made for memory='3MiB'" in reason
    deeper = models.lora(models.plain(num_hidden_layers=4))
    fastplug.apply(deeper, memory="3MiB")
    assert saved_plans.restore(deeper, values) == "the saved memory plans are for another model and are not used"
    assert planners(deeper)[0].agreed is None
    reason = saved_plans.restore(deeper, [{"version": 99}])
    assert reason is not None
    assert "version 99" in reason


def test_bad_plan_files_are_named(trained: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no memory plan at .*nowhere"):
        fastplug.apply(make(), memory="auto", memory_plan=str(tmp_path / "nowhere"))
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(OptionError, match="is not a memory plan"):
        fastplug.apply(make(), memory="auto", memory_plan=str(bad))
    bad.write_text("[]")
    with pytest.raises(OptionError, match="for 0 models only"):
        fastplug.apply(make(), memory="auto", memory_plan=str(bad))
    bad.write_text(json.dumps([{"version": saved_plans.VERSION}]))
    with pytest.raises(OptionError, match="not memory plans that fastplug saved"):
        fastplug.apply(make(), memory="auto", memory_plan=str(bad))
    with pytest.raises(OptionError, match="is for 3 decoder layers, the model has 2"):
        fastplug.apply(models.lora(models.plain()), memory="auto", memory_plan=str(trained[1]))
    with pytest.raises(OptionError, match="memory_plan says something about a plan, and nothing is planned without"):
        fastplug.Options(memory_plan="here")


def test_the_trainer_saves_plans_and_goes_on_by_them(tmp_path: Path) -> None:
    from fastplug_hf import FastPlugCallback
    from tests.hf import tiny

    def run(folder: Path, memory: str | None, checkpointing: bool = True, resume: str | None = None) -> Any:
        model = make()
        callback = FastPlugCallback(memory=memory)
        trainer = tiny.trainer(
            model, folder, callback, max_steps=4, save_strategy="steps", save_steps=2,
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    plain = weights(run(tmp_path / "plain", None, checkpointing=False))
    model = run(tmp_path / "planned", "auto")
    assert same_bits(weights(model), plain)
    (planner,) = planners(model)
    assert planner.plan is not None
    assert {policy.value for policy in planner.plan.policies} == {"keep"}  # although the host asked to checkpoint
    written = json.loads((tmp_path / "planned" / "checkpoint-4" / "fastplug_report.json").read_text())
    assert written["memory"][0]["plan"]["policies"] == ["keep"] * 3
    checkpoint = tmp_path / "planned" / "checkpoint-2"
    saved = json.loads((checkpoint / saved_plans.FILE).read_text())
    for plan in saved[0]["plans"]:  # so that it is seen which plan is followed
        plan["policies"] = ["residual", "keep", "drop_gate_up"]
    (checkpoint / saved_plans.FILE).write_text(json.dumps(saved))
    again = run(tmp_path / "planned", "auto", resume=str(checkpoint))
    assert same_bits(weights(again), plain)
    (planner,) = planners(again)
    assert planner.plan is not None
    assert [policy.value for policy in planner.plan.policies] == ["residual", "keep", "drop_gate_up"]
    full = run(tmp_path / "full", "full", checkpointing=False)
    assert same_bits(weights(full), plain)


def test_lightning_keeps_plans_in_its_checkpoints(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from fastplug_lightning import FastPlug

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    def run(steps: int, resume: Path | None = None) -> Any:
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps, plugins=[FastPlug(memory="auto")], accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        data: Any = torch.utils.data.DataLoader([models.batch(2, 20, seed=i) for i in range(4)], batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, data, ckpt_path=resume)
        return trainer, module

    trainer, module = run(2)
    (planner,) = planners(module)
    assert not planner.pinned
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)
    (state,) = [value for key, value in saved["callbacks"].items() if "FastPlug" in key]
    for plan in state["memory_plans"][0]["plans"]:
        plan["policies"] = ["drop_gate_up"] * 3
    torch.save(saved, tmp_path / "b.ckpt")
    _, again = run(3, tmp_path / "b.ckpt")
    (planner,) = planners(again)
    assert planner.pinned
    assert planner.plan is not None
    assert [policy.value for policy in planner.plan.policies] == ["drop_gate_up"] * 3


def test_memory_is_a_flag_and_a_key_of_yaml() -> None:
    from typer.testing import CliRunner

    from fastplug.cli.app import app

    said = CliRunner().invoke(app, ["doctor", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "--memory " in said
    assert "--headroom" in said
    assert "--memory-plan" in said
    pytest.importorskip("pydantic")
    from fastplug_axolotl.args import FastPlugArgs

    given: Any = FastPlugArgs.model_validate({"fastplug": {"memory": 0.9, "headroom": "2GiB"}}).fastplug
    assert (given.memory, given.headroom) == (0.9, "2GiB")
    with pytest.raises(ValueError, match="has no unit"):
        FastPlugArgs.model_validate({"fastplug": {"memory": 9}})
