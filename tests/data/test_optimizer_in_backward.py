"""``OptimizerInBackward``: the weights of the ordinary optimizer to the last bit, with few gradients at a time."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.errors import OptionError
from fastplug.optimizers import OptimizerInBackward, UsedGradient
from tests import models

Build = Callable[[Any], torch.optim.Optimizer]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True)


def adafactor(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=1e-2)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without, as trainers have it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-2},
    ]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, micro_batches: tuple[int, ...] = (1,)
) -> list[float]:
    """Losses; step i has ``micro_batches[i % len]`` backwards."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
    losses, seed = [], 0
    for i in range(steps):
        for _ in range(micro_batches[i % len(micro_batches)]):
            seed += 1
            loss = model(**models.batch(seed=seed)).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def assert_same_weights(ours: nn.Module, theirs: nn.Module, before: nn.Module | None = None) -> None:
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, others[name]), name
        if before is not None and parameter.requires_grad:
            assert not torch.equal(parameter, dict(before.named_parameters())[name]), f"{name} was not trained"


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("build", [adamw, sgd, adafactor])
def test_the_weights_are_those_of_the_ordinary_optimizer(build: Build, tied: bool, checkpointing: str | None) -> None:
    """Full fine-tuning of a patched model, with a schedule and two groups."""
    before = models.plain(tie_word_embeddings=tied)
    pair = []
    for _ in range(2):
        model = copy.deepcopy(before)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
            )
            model.enable_input_require_grads()
        fastplug.apply(model)
        pair.append(model)
    ours, theirs = pair
    optimizer = OptimizerInBackward(build(groups_of(ours)))
    assert train(ours, optimizer) == train(theirs, build(groups_of(theirs)))
    assert_same_weights(ours, theirs, before)
    assert not fastplug.report(ours).fallbacks


def live_bytes(model: nn.Module) -> int:
    return sum(
        p.grad.numel() * p.grad.element_size()
        for p in model.parameters()
        if p.grad is not None and not isinstance(p.grad, UsedGradient)
    )


def test_few_gradients_live_at_a_time() -> None:
    """Counted whenever a gradient is complete, before anything is done with it."""
    peaks = []
    for in_backward in (False, True):
        model = models.plain(num_hidden_layers=6)
        fastplug.apply(model)
        seen: list[int] = []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, m=model, s=seen: s.append(live_bytes(m)))
        optimizer = adamw(model.parameters())
        train(model, OptimizerInBackward(optimizer) if in_backward else optimizer, steps=2)
        peaks.append(max(seen))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    assert peaks == [whole, largest]
    assert largest < whole / 4


@pytest.mark.parametrize("micro_batches", [(3,), (3, 3, 2)], ids=["whole steps", "an epoch's end"])
def test_gradient_accumulation(micro_batches: tuple[int, ...]) -> None:
    ours, theirs = models.plain(), models.plain()
    optimizer = OptimizerInBackward(adamw(groups_of(ours)), accumulation_steps=3)
    assert train(ours, optimizer, micro_batches=micro_batches) == train(
        theirs, adamw(groups_of(theirs)), micro_batches=micro_batches
    )
    assert_same_weights(ours, theirs, models.plain())


def test_accumulation_that_was_not_announced_is_an_error() -> None:
    model = models.plain()
    optimizer = OptimizerInBackward(adamw(model.parameters()))
    with pytest.raises(RuntimeError, match=r"a second backward before step\(\).*accumulation_steps=N"):
        train(model, optimizer, micro_batches=(2,))


@pytest.mark.parametrize(
    "use",
    [
        lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 0.01),
        lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=1.0),
        lambda model, optimizer: nn.utils.clip_grad_value_(model.parameters(), 1.0),
        lambda model, optimizer: [p.grad.norm() for p in model.parameters()],
        lambda model, optimizer: [p.grad + 1 for p in model.parameters()],
    ],
    ids=["clip_grad_norm_", "another norm", "clip_grad_value_", "norm", "arithmetic"],
)
def test_whoever_reads_a_used_gradient_is_told(use: Callable[[Any, Any], Any]) -> None:
    model = models.plain()
    optimizer = OptimizerInBackward(adamw(model.parameters()))
    model(**models.batch()).loss.backward()
    with pytest.raises(RuntimeError, match=r"has used this gradient and let it go.*set max_grad_norm=0"):
        use(model, optimizer)


def test_the_norm_of_all_gradients_can_be_asked_for() -> None:
    """As hosts do to log it: by clipping at infinity."""
    model, twin = models.plain(), models.plain()
    optimizer = OptimizerInBackward(adamw(model.parameters()))
    for each in (model, twin):
        each(**models.batch()).loss.backward()
    for limit in (float("inf"), 1e4):
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twin.parameters(), limit))
    assert 0.01 < norm < 1e4
    optimizer.step()


def test_gradient_scaling_is_an_error() -> None:
    model = models.plain()
    optimizer = OptimizerInBackward(adamw(model.parameters()))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**models.batch()).loss).backward()
    with pytest.raises(RuntimeError, match="train in bf16 instead of fp16"):
        scaler.step(optimizer)


def test_states_go_from_either_to_the_other() -> None:
    """Two steps, a checkpoint, two more: in whichever way each half was trained."""
    results = []
    for first, second in ((False, False), (False, True), (True, False), (True, True)):
        model = models.plain()
        optimizer: Any = adamw(groups_of(model))
        train(model, OptimizerInBackward(optimizer) if first else optimizer, steps=2)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        restored = copy.deepcopy(model)
        optimizer = adamw(groups_of(restored))
        optimizer = OptimizerInBackward(optimizer) if second else optimizer
        optimizer.load_state_dict(torch.load(file))
        train(restored, optimizer, steps=2)
        results.append((restored, optimizer.state_dict()))
    (model, state), *others = results
    for other, its_state in others:
        assert_same_weights(other, model)
        assert its_state["param_groups"] == state["param_groups"]
        assert its_state["state"].keys() == state["state"].keys()
        for index, values in state["state"].items():
            assert {
                key: torch.equal(value, its_state["state"][index][key]) for key, value in values.items()
            } == dict.fromkeys(values, True)


def test_what_the_backward_did_not_step() -> None:
    """A gradient that somebody set, a parameter that no backward reaches, a frozen one, and a closure."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("used", "given", "idle", "frozen")})
    model["frozen"].requires_grad_(False)
    twin = copy.deepcopy(model)
    optimizers = [OptimizerInBackward(sgd(model.parameters())), sgd(twin.parameters())]
    for each, optimizer in zip((model, twin), optimizers):

        def closure(each: Any = each) -> torch.Tensor:
            loss: torch.Tensor = each["frozen"](each["used"](torch.ones(2, 4))).square().sum()
            loss.backward()
            each["given"].weight.grad = torch.ones(4, 4)
            return loss

        loss = optimizer.step(closure)
        assert float(loss) > 0
        optimizer.zero_grad()
    assert_same_weights(model, twin)
    assert torch.equal(model["idle"].weight, twin["idle"].weight)
    assert all(p.grad is None for p in model.parameters())


def test_a_new_group_takes_part() -> None:
    model, late = nn.Linear(4, 4), nn.Linear(4, 4)
    twins = copy.deepcopy(model), copy.deepcopy(late)
    for first, second, optimizer in (
        (model, late, OptimizerInBackward(sgd(model.parameters()))),
        (*twins, sgd(twins[0].parameters())),
    ):
        optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.5})
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
        second(first(torch.ones(1, 4))).square().sum().backward()
        optimizer.step()
    assert_same_weights(model, twins[0])
    assert_same_weights(late, twins[1])


def test_it_ends_with_the_optimizer() -> None:
    for end in ("dropped", "removed"):
        model = nn.Linear(4, 4)
        before = model.weight.detach().clone()
        optimizer: Any = OptimizerInBackward(sgd(model.parameters()))
        if end == "removed":
            optimizer.remove()
        else:
            del optimizer
            gc.collect()
        model(torch.ones(1, 4)).sum().backward()
        assert torch.equal(model.weight, before)
        assert type(model.weight.grad) is torch.Tensor


def test_a_copy_of_the_model_is_free_of_it() -> None:
    model = nn.Linear(4, 4)
    optimizer = OptimizerInBackward(sgd(model.parameters()))
    model(torch.ones(1, 4)).sum().backward()
    copied = copy.deepcopy(model)
    assert copied.weight.grad is None
    before = copied.weight.detach().clone()
    copied(torch.ones(1, 4)).sum().backward()
    assert torch.equal(copied.weight, before)
    assert optimizer.param_groups[0]["params"][0] is model.weight


def test_what_cannot_step_within_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(OptionError, match=r"wraps a torch\.optim\.Optimizer, not type"):
        OptimizerInBackward(torch.optim.AdamW)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="LBFGS steps by all gradients together"):
        OptimizerInBackward(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(OptionError, match="accumulation_steps must be a positive whole number, not 0"):
        OptimizerInBackward(sgd(model.parameters()), accumulation_steps=0)
    optimizer = OptimizerInBackward(sgd(model.parameters()))
    with pytest.raises(OptionError, match=r"wraps a torch\.optim\.Optimizer"):
        OptimizerInBackward(optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(OptionError, match="before the gradients of several processes are summed"):
        OptimizerInBackward(sgd(model.parameters()))
    with pytest.raises(OptionError, match="before the gradients of several processes are summed"):
        model(torch.ones(1, 4)).sum().backward()  # a group that came after the optimizer


# --- hosts ------------------------------------------------------------------------------------------------------------


def hf(folder: Path, in_backward: bool, steps: int = 4, resume: Any = None, **changes: Any) -> Any:
    from transformers import Trainer

    from fastplug_hf import FastPlugCallback
    from tests.hf import tiny

    model = models.plain()
    optimizer = adamw(groups_of(model))
    if in_backward:
        accumulation = changes.get("gradient_accumulation_steps", 1)
        optimizer = OptimizerInBackward(optimizer, accumulation_steps=accumulation)
    trainer = Trainer(
        model=model,
        args=tiny.arguments(folder, **{"max_steps": steps, "max_grad_norm": 0.0, **changes}),
        train_dataset=tiny.rows(),
        optimizers=(optimizer, None),
        callbacks=[FastPlugCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_in_the_hf_trainer(accumulation: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    changes = {"gradient_accumulation_steps": accumulation}
    ours, theirs = hf(tmp_path / "a", True, **changes), hf(tmp_path / "b", False, **changes)
    assert_same_weights(ours.model, theirs.model, models.plain())
    norms = [
        [entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry] for each in (ours, theirs)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_in_the_hf_trainer_resumed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    whole = hf(tmp_path / "whole", True, save_strategy="steps", save_steps=2)
    resumed = hf(tmp_path / "again", True, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(resumed.model, whole.model, models.plain())


def test_the_hf_trainers_clipping_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(RuntimeError, match="set max_grad_norm=0 in a Trainer"):
        hf(tmp_path, True, max_grad_norm=0.01)


def lightning(folder: Path, in_backward: bool, **changes: Any) -> Any:
    from fastplug_lightning import FastPlug
    from tests.lightning import setups

    accumulation = changes.get("accumulate_grad_batches", 1)

    class Module(setups.Module):
        def configure_optimizers(self) -> Any:
            optimizer = adamw(groups_of(self))
            if in_backward:
                optimizer = OptimizerInBackward(optimizer, accumulation_steps=accumulation)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]

    module = Module(models.plain)
    setups.fit(module, folder, FastPlug(), **changes)
    return module


@pytest.mark.parametrize("accumulation", [1, 4])
def test_in_lightning(accumulation: int, tmp_path: Path) -> None:
    """Six batches: the last step of four has two."""
    changes = {"accumulate_grad_batches": accumulation}
    ours, theirs = lightning(tmp_path, True, **changes), lightning(tmp_path, False, **changes)
    assert ours.losses == theirs.losses
    assert_same_weights(ours.llm, theirs.llm, models.plain())


def test_lightnings_clipping_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    with pytest.raises(RuntimeError, match="leave out gradient_clip_val in Lightning"):
        lightning(tmp_path, True, gradient_clip_val=0.01)
