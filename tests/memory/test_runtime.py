"""The planner at work on a device whose memory is made up: budgets, shapes, measurements."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastplug
from fastplug import OptionError
from fastplug.memory import making, offload
from fastplug.memory.making import Maker
from fastplug.memory.plan import Plan
from fastplug.memory.planner import Planner
from fastplug.memory.policy import Policy
from fastplug.memory.runtime import planners
from tests import models
from tests.memory.device import Device, MiB, Moment, gradients, same_bits

pytest.importorskip("peft")

LAYERS = 4
BATCH = models.batch(2, 120)
BUDGETS = ("2200KiB", "2400KiB", "2600KiB", "3MiB", "3400KiB", "4MiB", "9MiB")


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)


def make(**options: Any) -> Any:
    return models.lora(models.plain(num_hidden_layers=LAYERS, **options), lora_dropout=0.1)


def planned(memory: Any, model: Any = None, total: int = 64 * MiB, **options: Any) -> tuple[Any, Planner, Device]:
    """A model under a plan, its planner and the device that it believes in."""
    model = make() if model is None else model
    fastplug.apply(model, memory=memory, **options)
    (planner,) = planners(model)
    planner.meter = device = Device(model, total)
    return model, planner, device


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    """Loss and gradients without a plan."""
    model = make()
    fastplug.apply(model)
    return gradients(model, BATCH)


def kept(planner: Planner) -> list[str]:
    assert planner.plan is not None
    return [policy.value for policy in planner.plan.policies]


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_larger_budget_is_never_slower_and_no_budget_changes_a_bit(wanted: dict[str, torch.Tensor]) -> None:
    times, plans = [math.inf], []
    for memory in BUDGETS:
        model, planner, device = planned(memory)
        for _ in range(2):
            assert same_bits(gradients(model, BATCH), wanted), memory
        assert planner.plan is not None
        assert planner.plan.total <= planner.plan.budget
        assert planner.plan.ms <= times[-1]
        assert not fastplug.report(model).fallbacks
        times.append(planner.plan.ms)
        plans.append(kept(planner))
        asked = device.limits[-1]
        assert asked is not None
        assert asked + device.context() == fastplug.memory.budget.amount(memory).of(0)
    assert plans[-1] == ["keep"] * LAYERS
    assert len({tuple(plan) for plan in plans}) >= 4  # or these budgets would test one plan only
    assert "keep" not in plans[0]


@pytest.mark.parametrize(("memory", "policy"), [("keep", Policy.KEEP), ("full", Policy.RESIDUAL)])
def test_all_layers_can_be_told_the_same(memory: str, policy: Policy, wanted: dict[str, torch.Tensor]) -> None:
    model, planner, device = planned(memory)
    assert same_bits(gradients(model, BATCH), wanted)
    assert kept(planner) == [policy.value] * LAYERS
    assert device.limits == []  # they name no budget


def test_auto_takes_what_is_free_and_leaves_headroom() -> None:
    model, planner, device = planned("auto", total=40 * MiB)
    device.others = 10 * MiB
    gradients(model, BATCH)
    assert planner.plan is not None
    assert planner.plan.budget == 28 * MiB  # less what others have, less a twentieth
    assert device.limits == []
    model, planner, device = planned("auto", total=40 * MiB, headroom="8MiB")
    gradients(model, BATCH)
    assert planner.plan is not None
    assert planner.plan.budget == 32 * MiB
    model, planner, device = planned(0.5, total=40 * MiB, headroom=0.1)
    gradients(model, BATCH)
    assert planner.plan is not None
    assert planner.plan.budget == 16 * MiB
    assert device.limits == [20 * MiB - device.context()]  # an evaluation may use the headroom


def test_a_budget_below_the_weights_is_refused_before_anything_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else the model may still be moved to a GPU
    model = make()
    with pytest.raises(
        OptionError, match=r"memory='100KiB' is 100\.00 KiB, and the weights of LlamaForCausalLM alone take 0\.77 MiB"
    ):
        fastplug.apply(model, memory="100KiB")
    with pytest.raises(fastplug.ModelError, match="not patched"):
        fastplug.report(model)


def test_a_budget_that_no_step_fits_into_says_what_is_missing() -> None:
    model, _, _ = planned("1MiB")
    with pytest.raises(OptionError, match=r"a budget of 1\.00 MiB is too small: the least that a step needs is 2\."):
        gradients(model, BATCH)


def test_a_later_batch_that_does_not_fit_is_tried_with_the_least() -> None:
    model, planner, _ = planned("3MiB")
    gradients(model, BATCH)
    longer = models.batch(2, 250)
    found = gradients(model, longer)
    assert kept(planner)[:-1] == ["offload"] * (LAYERS - 1)  # what the last keeps costs nothing at the peak
    assert any("is too small" in note and "goes on with the least" in note for note in fastplug.report(model).notes)
    plain = make()
    fastplug.apply(plain)
    assert same_bits(found, gradients(plain, longer))


# --- shapes and measurements ------------------------------------------------------------------------------------------


def test_lengths_are_planned_on_a_grid_and_plans_are_kept() -> None:
    model, planner, _ = planned("4MiB", models.lora(models.plain(num_hidden_layers=2)))
    for length in (100, 110, 128, 60, 64, 100):
        gradients(model, models.batch(2, length))
    assert set(planner.plans) == {(2, 128), (2, 64)}
    first = planner.plans[2, 128]
    gradients(model, models.batch(1, 100))
    gradients(model, models.batch(2, 100))
    assert set(planner.plans) == {(2, 128), (2, 64), (1, 128)}
    assert planner.plan is first


def test_accumulated_gradients_are_planned_for() -> None:
    model, planner, _ = planned("5MiB")
    gradients(model, BATCH)
    assert planner.plan is not None
    before = planner.plan.parts["gradients"]
    model(**BATCH).loss.backward()  # with those of the first still there
    assert planner.agreed is not None
    assert planner.agreed.accumulating
    assert planner.plan.parts["gradients"] > before == 0


def test_two_forwards_at_a_time_get_half_each(wanted: dict[str, torch.Tensor]) -> None:
    model, planner, _ = planned("7MiB")
    gradients(model, BATCH)
    model.zero_grad(set_to_none=True)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(model(**BATCH).loss)
    assert planner.agreed is not None
    assert planner.agreed.live == 2
    ((losses[0] + losses[1]) / 2).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-7)
    gradients(model, BATCH)
    assert planner.plan is not None
    assert planner.plan.total <= planner.plan.budget


def test_what_was_measured_changes_the_plan() -> None:
    """Milliseconds and highest marks are read a step later, and only where the device has got there."""
    model, planner, device = planned("6MiB")
    device.clock = 5.0
    for _ in range(3):
        gradients(model, BATCH)
    assert planner.agreed is not None
    assert planner.plan is not None
    assert planner.agreed.ms == {}  # the first forward is not measured, and the fourth begins a new agreement
    reasoned, plan = planner.estimate(planner.plan), planner.plan
    gradients(model, BATCH)
    assert planner.agreed.ms.keys() == set(plan.policies)
    for policy, ratio in planner.agreed.ms.items():  # two marks make 5 ms, a forward and a backward 10
        assert ratio == pytest.approx(10.0 / reasoned[0][policy].ms)
    assert planner.plan.ms > plan.ms


@pytest.mark.parametrize("slower", [1.0, 3.0])
def test_layers_copy_to_the_host_unless_they_are_faster_without(monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    """Some early steps tell, whose forwards follow a plan without copies."""
    model, planner, device = planned("2300KiB", models.lora(models.plain(num_hidden_layers=LAYERS)))
    monkeypatch.setattr(making, "COMPARABLE", 1e9)  # layers of this size take no time beside their copies
    device.clock = 5.0
    begun = [0.0]

    def step_begins() -> Moment:
        begun[0] += slower if planner.plan is not None and planner.plan.host_bytes else 1.0
        return Moment(begun[0])

    copied, watched, found = [], [], []
    for _ in range(17):
        found.append(gradients(model, BATCH))
        assert planner.plan is not None
        assert planner.stock is not None
        monkeypatch.setattr(planner.stock.calibration.steps, "_meter", SimpleNamespace(mark=step_begins))
        assert planner.plan.total <= planner.plan.budget
        copied.append(planner.plan.host_bytes > 0)
        watched.append(planner.stock.calibration.watching)
    keeps = slower == 1.0  # else it is known at the eighth forward: the first ones, with less room, did not copy
    assert copied == [*[False] * 3, *[True] * 4, keeps, *[False] * 4, *[keeps] * 5]
    assert watched == [False, *[True] * 3, *[False] * 4, *[keeps] * 4, *[False] * 5]
    assert planner.agreed is not None
    assert planner.agreed.copies == (slower == 1.0)
    for other in found[1:]:
        same_bits(found[0], other)


def test_copies_that_are_slower_than_alone_are_planned_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they reach beside the computation, in the steps that are observed."""
    model, planner, device = planned("2300KiB", models.lora(models.plain(num_hidden_layers=LAYERS)))
    device.clock = 5.0
    timing = []
    for _ in range(8):
        gradients(model, BATCH)
        timing += [offloader.timing for offloader in planner._offloaders()]
    assert planner.plan is not None
    assert planner.agreed is not None
    assert planner.plan.host_bytes
    assert planner.agreed.copy == 1.0
    assert timing == [False, *[True] * 4]  # from the fourth step on; on a CPU it stays unknown
    monkeypatch.setattr(offload.Offloader, "rate", lambda self: planner._reading._gpu.host / 5.0)
    timing.clear()
    for _ in range(8):
        gradients(model, BATCH)
        timing += [offloader.timing for offloader in planner._offloaders()]
    assert planner.agreed.copy == pytest.approx(5.0)
    assert timing == [*[False] * 6, True, False]  # before an agreement


def test_cached_blocks_go_where_layers_keep_something_else() -> None:
    model, planner, device = planned("auto")
    for _ in range(7):
        gradients(model, BATCH)
    agreed, released, plan = planner.agreed, device.released, planner.plan
    device.others = 8 * MiB
    gradients(model, BATCH)
    assert planner.agreed != agreed  # there is less, and still enough
    assert plan is not None
    assert planner.plan is not None
    assert planner.plan.policies == plan.policies
    assert device.released == released
    device.others = 59 * MiB
    for _ in range(8):
        gradients(model, BATCH)
    assert planner.plan.policies != plan.policies
    assert device.released > released


def test_layers_copy_all_the_same_where_nothing_fits_without() -> None:
    model, planner, _ = planned("2300KiB", models.lora(models.plain(num_hidden_layers=LAYERS)))
    gradients(model, BATCH)
    plan, agreed = planner.plan, planner.agreed
    assert plan is not None
    assert agreed is not None
    shape, found = (plan.batch, plan.sequence), []
    for percent in range(100, 80, -1):
        less = replace(agreed, available=plan.total * percent // 100, copies=False)
        made = Maker(planner._reading, less, shape, "2300KiB", plan).make(first=False).plan
        found.append(made.host_bytes > 0)
        if not made.fits:
            break
    assert found[0] is False
    assert True in found[:-1]  # there it fits


def test_a_pinned_plan_is_compared_with_none() -> None:
    model, planner, device = planned("2300KiB", models.lora(models.plain(num_hidden_layers=LAYERS)))
    device.clock = 5.0
    for _ in range(4):
        gradients(model, BATCH)
    assert planner.agreed is not None
    assert planner.plan is not None
    assert planner.plan.host_bytes
    plan = planner.plan
    planner.pin(planner.agreed, [plan], "a test says so")
    for _ in range(9):
        gradients(model, BATCH)
        assert planner.plan == plan


def test_a_peak_above_the_plan_makes_the_next_plans_smaller() -> None:
    model, planner, device = planned("4MiB")
    device.highest = (MiB, MiB)
    gradients(model, BATCH)
    assert planner.plan is not None
    first = planner.plan
    device.highest = (first.allocated + MiB, first.allocated + MiB)
    for _ in range(2):
        gradients(model, BATCH)
    assert planner.agreed is not None
    assert planner.agreed.extra == pytest.approx(MiB, abs=MiB // 4)
    assert planner.plan.total <= planner.plan.budget
    assert planner.plan.ms > first.ms


def test_a_peak_that_the_host_has_reset_says_nothing() -> None:
    """Some hosts reset PyTorch's counters at every step, to log the peak of each."""
    model, planner, device = planned("8MiB")
    device.highest = (MiB // 4, MiB // 4)
    gradients(model, BATCH)
    for _ in range(8):
        device.highest = (device.highest[0] + 1, device.highest[0] + 1)  # higher than before, below what there was
        gradients(model, BATCH)
    assert planner.agreed is not None
    assert device.highest[0] < device.allocated()
    assert planner.agreed.extra == 0


def test_blocks_that_the_allocator_gave_back_leave_more_slack() -> None:
    model, planner, device = planned("8MiB")
    gradients(model, BATCH)
    assert planner.agreed is not None
    before = planner.agreed.slack
    device.retried = 3  # while the first plan's blocks were found
    for _ in range(2):
        gradients(model, BATCH)
    assert planner.agreed.slack == before
    device.retried += 1  # in the third step, which follows the plan of the second
    gradients(model, BATCH)
    assert planner.agreed.slack > before


def test_a_plan_that_fills_its_budget_lets_segments_expand() -> None:
    for memory, tight in (("64MiB", False), ("5MiB", True)):
        model, planner, device = planned(memory)
        gradients(model, BATCH)
        assert planner.plan is not None
        assert (planner.plan.total >= 0.9 * planner.plan.budget) is tight
        assert device.expanded is tight


# --- around -----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_layers_keep() -> None:
    model, planner, device = planned("5MiB")
    assert "the first training step makes the plan" in str(fastplug.report(model))
    gradients(model, BATCH)
    device.highest = (3 * MiB, 4 * MiB)
    said = fastplug.report(model)
    (found,) = said.memory
    assert planner.plan is not None
    assert found["plan"]["policies"] == kept(planner)
    assert found["predicted_peak"] == planner.plan.total
    assert found["measured_peak"] == 4 * MiB + device.context()
    assert "GiB planned, 0.00 GiB measured so far" in str(said)
    assert '"policies"' in said.to_json()


def test_nothing_to_plan_is_said() -> None:
    model = make()
    report = fastplug.apply(model, memory="auto", disable="decoder_layer").report
    assert "memory= plans nothing: no decoder layer is patched as a whole" in report.notes
    assert planners(model) == []


def test_undo_gives_the_limit_back_and_a_second_apply_keeps_the_plan() -> None:
    model, planner, device = planned("5MiB")
    gradients(model, BATCH)
    fastplug.apply(model, memory="5MiB")
    assert planners(model) == [planner]
    fastplug.undo(model)
    assert device.limits[-1] is None
    assert planners(model) == []
    plain = gradients(model, BATCH)
    assert all(torch.isfinite(value).all() for value in plain.values())


def test_a_graph_that_is_kept_can_be_differentiated_twice(wanted: dict[str, torch.Tensor]) -> None:
    for memory in ("keep", "full"):
        model, _, _ = planned(memory)
        torch.manual_seed(7)
        loss = model(**BATCH).loss
        loss.backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert torch.equal(p.grad, wanted[name]), name
        with pytest.raises(RuntimeError, match=r"second time|second backward"):
            loss.backward()


@pytest.fixture
def mixture() -> Any:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=models.VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).train()


def test_a_mixture_of_experts_keeps_the_gradient_of_its_router_loss(mixture: Any) -> None:
    wanted = gradients(copy.deepcopy(mixture), BATCH)
    for memory in ("keep", "full"):
        model = copy.deepcopy(mixture)
        fastplug.apply(model, memory=memory)
        found = gradients(model, BATCH)
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_a_step_that_ran_out_of_memory_is_not_measured() -> None:
    """Its times tell of freeing and of doing work again."""
    model, planner, device = planned("6MiB")
    device.clock = 5.0
    for _ in range(2):
        gradients(model, BATCH)
    planner.room.make("Tried to allocate 1.00 MiB", 0)
    for _ in range(2):
        gradients(model, BATCH)
    assert planner.stock is not None
    assert (
        len(planner.stock.calibration._times[False]) == planner.count
    )  # of the third forward alone: the first is not measured, the second was disturbed


def test_a_plan_that_fits_is_not_left_for_a_small_gain() -> None:
    model, planner, _ = planned("3MiB")
    gradients(model, BATCH)
    plan, agreed = planner.plan, planner.agreed
    assert plan is not None
    assert agreed is not None
    shape = plan.batch, plan.sequence

    def made(slower: float, before: bool) -> Plan:
        """The plan if the present one's policies take so much longer than was reasoned."""
        measured = replace(agreed, ms={policy: 1.0 + slower * (policy in plan.policies) for policy in Policy})
        return Maker(planner._reading, measured, shape, "3MiB", plan if before else None).make(first=False).plan

    low, high = 0.0, 4.0
    assert made(high, before=False).policies != plan.policies
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if made(middle, before=False).policies == plan.policies else (low, middle)
    fresh, sticky = made(high, before=False), made(high, before=True)
    assert fresh.policies != plan.policies == sticky.policies
    assert 0.99 * sticky.ms <= fresh.ms <= sticky.ms
    assert made(4.0, before=True) == made(4.0, before=False)  # that gains more than a little
    less = replace(agreed, available=int(0.8 * plan.total))
    maker = Maker(planner._reading, less, shape, "3MiB", plan)
    assert maker.make(first=False).plan.policies != plan.policies  # it does not fit any more
