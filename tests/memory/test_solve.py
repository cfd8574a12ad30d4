"""The solver against brute force, and what it prefers among equals."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastplug.memory import solve as solver
from fastplug.memory.costs import LayerCosts, PolicyCost
from fastplug.memory.moments import assemble, may_hand_on, peak_of
from fastplug.memory.policy import Policy
from fastplug.memory.reserve import LOOSE, Reserve
from fastplug.memory.solve import DoesNotFit, least_budget, solve

MiB = 2**20
FOUR = (Policy.KEEP, Policy.DROP_GATE_UP, Policy.RESIDUAL, Policy.OFFLOAD)


@st.composite
def costs(draw: st.DrawFn) -> PolicyCost:
    saved = draw(st.integers(0, 12))
    forward = saved + draw(st.integers(0, 6))
    backward = saved + draw(st.integers(0, 12))
    return PolicyCost(saved, forward, backward, draw(st.integers(1, 9)) / 4, host=draw(st.integers(0, 3)))


@st.composite
def stacks(draw: st.DrawFn) -> list[LayerCosts]:
    """One to five layers, some of them equal, each with one to four policies."""
    kinds = [
        LayerCosts({policy: draw(costs()) for policy in FOUR[: draw(st.integers(1, 4))]}, draw(st.integers(0, 3)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return [kinds[draw(st.integers(0, len(kinds) - 1))] for _ in range(draw(st.integers(1, 5)))]


def every(layers: list[LayerCosts]) -> list[tuple[Policy, ...]]:
    return list(itertools.product(*(layer.policies for layer in layers)))


def peak_by_hand(layers: list[LayerCosts], policies: tuple[Policy, ...], head: int, accumulating: bool) -> int:
    """The highest of all moments, written as a walk through the step."""
    chosen = [layer[policy] for layer, policy in zip(layers, policies)]
    gradients = sum(layer.gradients for layer in layers) if accumulating else 0
    held, highest = 0, 0
    for cost in chosen:
        highest = max(highest, held + gradients + cost.forward_peak)
        held += cost.saved
    highest = max(highest, held + gradients + head)
    for layer, cost in zip(reversed(layers), reversed(chosen)):
        held -= cost.saved
        gradients += 0 if accumulating else layer.gradients
        highest = max(highest, held + gradients + cost.backward_peak)
    return max(highest, sum(layer.gradients for layer in layers))


@settings(max_examples=150, deadline=None)
@given(stacks(), st.integers(0, 60), st.integers(0, 8), st.booleans(), st.integers(0, 4))
def test_the_fastest_that_fits_is_found(
    layers: list[LayerCosts], budget: int, head: int, accumulating: bool, fixed: int
) -> None:
    fitting = [p for p in every(layers) if fixed + peak_by_hand(layers, p, head, accumulating) <= budget]
    if not fitting:
        with pytest.raises(DoesNotFit):
            solve(layers, fixed, budget, head_peak=head, accumulating=accumulating)
        return
    plan = solve(layers, fixed, budget, head_peak=head, accumulating=accumulating)
    fastest = min(sum(layer[policy].ms for layer, policy in zip(layers, p)) for p in fitting)
    assert plan.ms == pytest.approx(fastest)
    assert plan.policies in fitting
    assert plan.total == fixed + peak_by_hand(layers, plan.policies, head, accumulating)
    same = [p for p in fitting if sum(x[q].ms for x, q in zip(layers, p)) == pytest.approx(fastest)]
    assert sum(x[q].saved for x, q in zip(layers, plan.policies)) == min(
        sum(x[q].saved for x, q in zip(layers, p)) for p in same
    )


@settings(max_examples=100, deadline=None)
@given(stacks(), st.integers(0, 8), st.booleans())
def test_the_least_budget_is_the_least(layers: list[LayerCosts], head: int, accumulating: bool) -> None:
    least = min(peak_by_hand(layers, p, head, accumulating) for p in every(layers))
    found = least_budget(layers, 5, head_peak=head, accumulating=accumulating)
    assert found in (least + 5, least + 6)  # one byte for rounding
    assert solve(layers, 5, found, head_peak=head, accumulating=accumulating).total <= found
    with pytest.raises(DoesNotFit) as caught:
        solve(layers, 5, least + 4, head_peak=head, accumulating=accumulating)
    assert caught.value.least == found


@settings(max_examples=60, deadline=None)
@given(stacks(), st.integers(0, 60))
def test_a_grid_costs_little_and_never_exceeds(layers: list[LayerCosts], budget: int) -> None:
    """With room for few states, plans still fit, and are found whenever there is one."""
    states, solver.STATES = solver.STATES, 4
    try:
        coarse = solve(layers, 0, budget)
    except DoesNotFit:
        assert not [p for p in every(layers) if peak_by_hand(layers, p, 0, True) <= budget]
        return
    finally:
        solver.STATES = states
    assert coarse.total <= budget
    assert coarse.ms >= solve(layers, 0, budget).ms - 1e-9


def llama(count: int = 32, gradients: int = 5 * MiB) -> list[LayerCosts]:
    """Layers of the size of Llama-3.1-8B's at 8,192 tokens: a backward needs the same whatever was kept."""
    whole = 742 * MiB
    peaks = {"forward_peak": 1100 * MiB, "backward_peak": whole + 800 * MiB}
    kept = {Policy.KEEP: (742, 14.7), Policy.DROP_GATE_UP: (294, 17.6), Policy.RESIDUAL: (64, 19.5)}
    made = {policy: PolicyCost(size * MiB, ms=ms, **peaks) for policy, (size, ms) in kept.items()}
    made[Policy.OFFLOAD] = PolicyCost(0, ms=19.6, host=64 * MiB, shared=64 * MiB, **peaks)
    return [LayerCosts(made, gradients)] * count


def test_the_last_layer_keeps_all_for_nothing() -> None:
    layers = llama()
    least = least_budget(layers, 0)
    plan = solve(layers, 0, least)
    assert plan.policies[-1] is Policy.KEEP
    everything_again = peak_of(layers, [Policy.OFFLOAD] * 32)
    assert peak_of(layers, plan.policies).bytes <= everything_again.bytes


def test_of_equal_layers_the_later_ones_keep_more() -> None:
    layers = llama()
    for budget in (4, 6, 9, 12, 16, 20, 24):
        plan = solve(layers, 0, budget * 1024 * MiB)
        saved = [layers[0][policy].saved for policy in plan.policies]
        assert saved == sorted(saved)
        assert plan.total <= budget * 1024 * MiB


def test_more_memory_is_never_slower_and_is_used() -> None:
    layers = llama()
    budgets = [size * 256 * MiB for size in range(8, 110, 3)]
    plans = [solve(layers, 0, budget) for budget in budgets]
    times = [plan.ms for plan in plans]
    assert times == sorted(times, reverse=True)
    assert set(plans[-1].policies) == {Policy.KEEP}
    # Until everything is kept, less than what one layer more would keep is left over.
    for plan in plans:
        assert set(plan.policies) == {Policy.KEEP} or plan.budget - plan.total < 742 * MiB


def test_what_a_backward_leaves_is_never_in_the_way() -> None:
    """Decoded weights that stay may take what their layer kept, but not the room of backwards that come after it."""
    layers, weights = llama(), 416 * MiB
    keep = [Policy.KEEP] * 32
    assert may_hand_on(layers, keep, [weights] * 32) == 31  # the last layer has all activations beside its weights
    assert may_hand_on(layers, keep, [weights] * 32, head_peak=3000 * MiB) == 32
    last = [Policy.OFFLOAD] * 31 + [Policy.KEEP]
    assert may_hand_on(layers, last, [0] * 31 + [weights]) == 31  # the last layer's would be there in all others
    assert may_hand_on(layers, [Policy.KEEP] + [Policy.OFFLOAD] * 31, [weights] + [0] * 31) == 32
    for budget in (4, 6, 9, 12, 16, 20, 24):
        plan = solve(layers, 0, budget * 1024 * MiB)
        handed = [weights if policy is Policy.KEEP else 0 for policy in plan.policies]
        count = may_hand_on(layers, plan.policies, handed)
        without = peak_of(layers, plan.policies).bytes
        assert peak_of(layers, plan.policies, handed=[*handed[:count], *[0] * (32 - count)]).bytes == without
        assert count == 32 or peak_of(layers, plan.policies, handed=handed).bytes > without


@pytest.mark.parametrize("accumulating", [False, True])
def test_a_step_with_weights_that_stay_by_hand(accumulating: bool) -> None:
    layers, handed = llama(4, gradients=10 * MiB), [100, 20, 3, 700]
    policies, highest, held = [Policy.KEEP, Policy.OFFLOAD, Policy.RESIDUAL, Policy.KEEP], 0, 0
    chosen = [layer[policy] for layer, policy in zip(layers, policies)]
    shared, gradients = sum(cost.shared for cost in chosen), 40 * MiB if accumulating else 0
    for i, cost in enumerate(chosen):
        highest = max(highest, shared + held + gradients + cost.forward_peak + sum(handed[i:]))
        held += cost.saved
    for i in reversed(range(4)):
        held -= chosen[i].saved
        gradients += 0 if accumulating else 10 * MiB
        highest = max(highest, shared + held + gradients + chosen[i].backward_peak + sum(handed[i:]))
    assert peak_of(layers, policies, accumulating=accumulating, handed=handed).bytes == highest


def test_the_same_input_gives_the_same_plan() -> None:
    layers = llama(40)
    first = solve(layers, 0, 12 * 1024 * MiB)
    assert all(solve(list(layers), 0, 12 * 1024 * MiB) == first for _ in range(3))


def test_gradients_grow_during_the_backward_unless_they_are_accumulated() -> None:
    layers = llama(4, gradients=100 * MiB)
    keep = [Policy.KEEP] * 4
    single, accumulated = (peak_of(layers, keep, accumulating=value) for value in (False, True))
    assert accumulated.bytes - single.bytes == 300 * MiB  # at the peak the last layer's own are there either way
    assert single.moment == accumulated.moment == "the backward of layer 3"


def test_large_gradients_peak_in_the_optimizers_step() -> None:
    layers = llama(4, gradients=4096 * MiB)
    plan = solve(layers, 0, 20 * 1024 * MiB, accumulating=False)
    assert plan.parts["gradients"] >= 4 * 4096 * MiB  # the first layer's backward, when all gradients are there
    tiny = {Policy.KEEP: PolicyCost(1, 1, 1, 1.0)}
    plan = assemble([LayerCosts(tiny, 100)] * 3, [Policy.KEEP] * 3, 0, 0, accumulating=False)
    assert plan.total in (300, 301)


def test_host_memory_is_a_limit_too() -> None:
    layers = llama()
    budget = least_budget(layers, 0) + 64 * MiB
    free = solve(layers, 0, budget)
    assert free.host_bytes > 10 * 64 * MiB
    with pytest.raises(DoesNotFit):
        solve(layers, 0, budget, host_budget=0)
    some = solve(layers, 0, budget + 1024 * MiB, host_budget=20 * 64 * MiB)
    assert 0 < some.host_bytes <= 20 * 64 * MiB


def test_slack_and_context_come_out_of_the_budget() -> None:
    layers = llama()
    plan = solve(layers, {"weights": 1024 * MiB}, 20 * 1024 * MiB, reserve=Reserve(0.05), context=500 * MiB)
    assert plan.parts["context"] == 500 * MiB
    assert plan.parts["slack"] == pytest.approx(0.05 * plan.allocated, abs=2)
    assert plan.total == plan.reserved + 500 * MiB <= plan.budget
    assert plan.parts["weights"] == 1024 * MiB


def test_large_weights_lie_in_blocks_of_their_own() -> None:
    layers, weights = llama(), 40 * 1024 * MiB
    given: dict[str, Any] = {"reserve": Reserve.of(0.05, weights), "context": 500 * MiB}
    plan = solve(layers, {"weights": weights}, 50 * 1024 * MiB, **given)
    assert plan.parts["slack"] == pytest.approx(0.05 * (plan.allocated - weights + LOOSE), abs=2)
    assert 0.99 * plan.budget <= plan.total <= plan.budget
    least = least_budget(layers, {"weights": weights}, **given)
    assert solve(layers, {"weights": weights}, least, **given).fits
    with pytest.raises(DoesNotFit):
        solve(layers, {"weights": weights}, least - 3, **given)


@pytest.mark.parametrize("weights", [0, 5 << 30, 40 << 30])
def test_what_can_be_allocated_is_what_needs_as_much_to_be_reserved(weights: int) -> None:
    reserve = Reserve.of(0.05, weights)
    for reserved in (1 << 20, 10 << 30, 45 << 30):
        allocated = reserve.allocatable(reserved)
        assert allocated + reserve.beside(allocated) <= reserved <= allocated + reserve.beside(allocated) + 2


def test_the_error_says_what_is_missing() -> None:
    layers = llama()
    with pytest.raises(DoesNotFit, match=r"budget of 4\.00 GiB is too small: what is there before the first step") as e:
        solve(layers, {"weights": 5 * 1024 * MiB}, 4 * 1024 * MiB)
    assert "weights 5.00 GiB" in str(e.value)
    with pytest.raises(DoesNotFit, match=r"the least that a step needs is 6\.7\d GiB, of which 5\.00 GiB") as e:
        solve(layers, {"weights": 5 * 1024 * MiB}, 6 * 1024 * MiB)
    assert solve(layers, {"weights": 5 * 1024 * MiB}, e.value.least).fits


def test_it_is_quick_for_the_largest_models() -> None:
    layers = llama(126)
    started = time.process_time()
    plan = solve(layers, 0, 40 * 1024 * MiB)
    assert len(plan.policies) == 126
    assert time.process_time() - started < 5.0
