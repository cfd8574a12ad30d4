"""What optimizers will keep, and first plans that are made before any has stepped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug import OptionError
from fastplug.memory.planner import Planner
from fastplug.memory.runtime import planners
from fastplug.memory.states import Optimizers
from fastplug.optimizers import OptimizerInBackward
from tests import models
from tests.memory.device import Device, MiB

pytest.importorskip("peft")

Build = Callable[[Any], torch.optim.Optimizer]
CPU = torch.device("cpu")


def states(module: nn.Module) -> Any:
    return Optimizers([p for p in module.parameters() if p.requires_grad], CPU).states()


TORCH: dict[str, tuple[Build, float]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p), 8),
    "Adam, amsgrad": (lambda p: torch.optim.Adam(p, amsgrad=True), 12),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), 0),
    "SGD, momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4),
    "RMSprop": (lambda p: torch.optim.RMSprop(p), 4),
    "Adagrad": (lambda p: torch.optim.Adagrad(p), 0),  # whose states are there from the start
    "Adafactor": (lambda p: torch.optim.Adafactor(p), 0),
}


@pytest.mark.parametrize("name", TORCH)
def test_states_are_known_before_the_first_step_and_there_after_it(name: str) -> None:
    build, each = TORCH[name]
    module = nn.Linear(64, 32, bias=False)
    found = states(module)
    assert (found.missing, found.certain) == (8 * 64 * 32, False)  # nobody trains it
    optimizer = build(module.parameters())
    found = states(module)
    assert (found.missing, found.certain, found.in_backward) == (each * 64 * 32, True, False)
    module(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    if optimizer.state:
        assert states(module).missing == 0


@pytest.mark.parametrize(
    ("name", "each"), [("AdamW8bit", 2 * (1 + 4 / 256)), ("Lion8bit", 1 + 4 / 256), ("PagedAdamW32bit", 8)]
)
def test_states_of_bitsandbytes(name: str, each: float) -> None:
    """Paged states lie in the host's memory where there is a GPU."""
    optimizers = pytest.importorskip("bitsandbytes").optim
    module = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    optimizer = getattr(optimizers, name)(module.parameters())
    assert (states(module).missing, states(module).certain) == (int(each * 64 * 64), True)
    small = nn.Linear(32, 32, bias=False)
    assert not states(small).certain
    del optimizer


class Outer(torch.optim.Optimizer):
    """As Accelerate wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


def test_wrapped_unknown_and_several_optimizers() -> None:
    module = nn.Linear(8, 8, bias=False)
    inner = torch.optim.AdamW(module.parameters())
    wrapper = OptimizerInBackward(inner)
    found = states(module)
    assert (found.missing, found.certain, found.in_backward) == (8 * 64, True, True)
    outer = Outer(wrapper)
    assert states(module) == found
    del outer
    wrapper.remove()
    assert not states(nn.Linear(8, 8)).certain

    class Mine(torch.optim.SGD):
        pass

    other = nn.Linear(8, 8, bias=False)
    mine = Mine(other.parameters(), lr=0.1)
    assert (states(other).missing, states(other).certain) == (8 * 64, False)
    del mine
    first, second = torch.optim.AdamW(other.parameters()), torch.optim.SGD(other.parameters(), lr=0.1)
    assert (states(other).missing, states(other).certain) == (8 * 64, False)  # which of the two steps?
    del first, second


def planned(memory: str, **config: Any) -> tuple[Any, Planner]:
    model = models.plain(num_hidden_layers=8, **config)
    fastplug.apply(model, memory=memory)
    (planner,) = planners(model)
    planner.meter = Device(model, 64 * MiB)
    return model, planner


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        model(**models.batch(2, 60, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


LEAST = "3500KiB"  # with AdamW's states a step of full fine-tuning needs 5.9 MiB, without any 3.3


def test_a_budget_is_refused_for_states_that_an_optimizer_will_have() -> None:
    model, _ = planned(LEAST)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(OptionError, match=r"a budget of 3\.42 MiB is too small"):
        train(model, optimizer)


@pytest.mark.parametrize("in_backward", [False, True])
def test_no_budget_is_refused_for_states_that_it_will_not_have(in_backward: bool) -> None:
    model, planner = planned(LEAST)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if in_backward:
        optimizer = OptimizerInBackward(optimizer)
    train(model, optimizer)
    assert planner.plan is not None
    assert planner.plan.total <= planner.plan.budget
    assert not fastplug.report(model).notes
    plain = models.plain(num_hidden_layers=8)
    fastplug.apply(plain)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    for mine, other in zip(model.parameters(), plain.parameters()):
        assert torch.equal(mine, other)


def test_the_trainers_optimizer_is_known(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from fastplug_hf import FastPlugCallback
    from tests.hf import tiny

    def run(optim: str) -> Any:
        model = models.plain(num_hidden_layers=8)
        tiny.trainer(model, tmp_path, FastPlugCallback(memory="4MiB"), optim=optim, max_steps=2).train()
        return planners(model)[0].agreed

    assert run("sgd").assumed == 0
    with pytest.raises(OptionError, match=r"a budget of 4\.00 MiB is too small"):
        run("adamw_torch")


def test_gradients_that_are_used_within_the_backward_do_not_pile_up() -> None:
    plans = []
    for in_backward in (False, True):
        model, planner = planned("9MiB", tie_word_embeddings=in_backward)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, OptimizerInBackward(optimizer) if in_backward else optimizer, steps=1)
        costs = planner._costs[2, 64]
        plans.append([layer.gradients for layer in costs])
        for layer in costs:  # those of the layer itself are there at its own moment
            assert all(cost.backward_peak >= plans[0][1] for cost in layer.policies.values())
    each = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    assert plans[0][1:-1] == [each] * 6
    head = model.lm_head.weight.numel() * 4
    assert plans[1] == [0] * 7 + [head]  # autograd waits with a tied head's for the embedding's


def test_several_backwards_a_step_pile_up_gradients() -> None:
    model, planner = planned("9MiB")
    optimizer = OptimizerInBackward(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=2)
    model(**models.batch(2, 60)).loss.backward()
    assert planner.stock is not None
    assert not planner.stock.states.in_backward
    assert all(layer.gradients > 0 for layer in planner._costs[2, 64])
    del optimizer


def test_without_an_optimizer_the_first_plan_is_a_careful_one() -> None:
    """The optimizer is made after the first forward, which no host does."""
    model, planner = planned(LEAST)
    loss = model(**models.batch(2, 60)).loss
    assert planner.agreed is not None
    assert planner.agreed.assumed == 2 * sum(p.numel() * 4 for p in model.parameters())
    (note,) = fastplug.report(model).notes
    assert "no optimizer is known yet" in note
    assert "planned anew once an optimizer has stepped" in note
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, steps=1)
    assert planner.agreed.assumed == 0
    assert planner.plan is not None
    assert planner.plan.total <= planner.plan.budget


def test_what_does_not_fit_without_states_either_is_refused() -> None:
    model, _ = planned("1500KiB")
    with pytest.raises(OptionError, match=r"a budget of 1\.46 MiB is too small"):
        model(**models.batch(2, 60))


def test_states_are_seen_although_gradients_add_up_over_every_agreement() -> None:
    """At the second, fourth and eighth forward there are gradients where four of them make a step."""
    model, planner = planned("9MiB")
    assert planner.agreed is None
    for micro in range(9):
        model(**models.batch(2, 60, seed=micro)).loss.backward()
        if micro == 0:
            assumed = planner.agreed.assumed
        if micro % 4 == 3:
            model.zero_grad()  # whoever stepped is not found
    assert assumed > 0
    assert planner.agreed.assumed == 0
