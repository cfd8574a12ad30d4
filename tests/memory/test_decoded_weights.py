"""What a budget leaves is spent on decoded weights that stay: never what layers need, and gone where it is needed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import fastplug
from fastplug.memory.oom import Room
from fastplug.memory.plan import DECODED, Plan
from fastplug.memory.planner import Planner
from fastplug.memory.runtime import planners
from fastplug.ops.lora.kept_weights import KeptWeights
from tests import models
from tests.memory.device import Device, MiB, gradients, same_bits

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

LAYERS = 3
BATCH = models.batch(2, 120)
WEIGHTS = LAYERS * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)  # of all layers; they compute in fp32
SHORT = models.batch(1, 40)


def planned(memory: Any, model: Any = None, base_weights: str | None = None, **options: Any) -> tuple[Any, Planner]:
    model = models.qlora(num_hidden_layers=LAYERS) if model is None else model
    fastplug.apply(model, memory=memory, base_weights=base_weights, **options)
    (planner,) = planners(model)
    planner.meter = Device(model, 64 * MiB)
    return model, planner


def plan_of(planner: Planner) -> Plan:
    assert planner.plan is not None
    return planner.plan


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    model = models.qlora(num_hidden_layers=LAYERS)
    fastplug.apply(model)
    return gradients(model, BATCH)


@pytest.mark.parametrize(("choice", "most"), [("auto", 14), (None, 12)])
def test_what_is_left_is_spent_and_nothing_else_changes(
    wanted: dict[str, torch.Tensor], decoded: Counter[str], choice: str | None, most: int
) -> None:
    sizes, counts = [], []
    for memory in ("2MiB", "3MiB", "3200KiB", "6MiB"):
        (model, planner), (other, before) = (planned(memory, base_weights=kind) for kind in (choice, "decoded"))
        for _ in range(6):  # the first plans are cautious
            decoded.clear()
            assert same_bits(gradients(model, BATCH), wanted), memory
            counts.append(decoded["decoded"])
            assert same_bits(gradients(other, BATCH), wanted), memory
        plan, without = plan_of(planner), plan_of(before)
        size = plan.parts.get(DECODED, 0)
        sizes.append(size)
        assert plan.policies == without.policies, "layers come first"
        assert plan.total <= plan.budget
        assert plan.total - without.total == pytest.approx(size, rel=0.1)  # and what the allocator has beside it
        assert (plan.ms < without.ms) is (size > 0)
        assert models.kept_weights(model).held <= size
    assert sizes == sorted(set(sizes))
    assert sizes[0] < 4 * 32 * 64  # the smallest weight
    assert sizes[-1] == 4 * WEIGHTS == models.kept_weights(model).held
    last = counts[5::6]
    assert last == sorted(set(last), reverse=True)
    assert last[0] >= most * LAYERS  # fewer where a backward hands some to the next forward
    assert last[-1] == 0


def test_an_evaluation_finds_its_memory_and_training_goes_on(wanted: dict[str, torch.Tensor]) -> None:
    model, _ = planned("6MiB")
    gradients(model, BATCH)
    assert models.kept_weights(model).held == 4 * WEIGHTS
    with torch.no_grad():
        model(**BATCH)
    assert models.kept_weights(model).held == 0
    assert same_bits(gradients(model, BATCH), wanted)
    assert models.kept_weights(model).held == 4 * WEIGHTS
    model.eval()
    for prompt in (BATCH["input_ids"], SHORT["input_ids"][:, :8]):
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2)
        assert models.kept_weights(model).held == 0
        model.train()
        gradients(model, BATCH)
        assert models.kept_weights(model).held == 4 * WEIGHTS
        model.eval()


def test_batches_of_another_shape_need_some_of_it_back() -> None:
    model, planner = planned("3MiB")
    sizes = {}
    for batch in (SHORT, BATCH, SHORT, BATCH):
        for _ in range(3):
            gradients(model, batch)
        length = batch["input_ids"].shape[1]
        sizes[length] = plan_of(planner).parts.get(DECODED, 0)
        assert models.kept_weights(model).held <= sizes[length]
        assert plan_of(planner).fits
    assert sizes[40] > sizes[120]


def test_they_go_before_anything_that_layers_keep(wanted: dict[str, torch.Tensor]) -> None:
    model, planner = planned("6MiB")
    gradients(model, BATCH)
    loss = model(**BATCH).loss
    assert len(planner.room.records()) == LAYERS
    held = models.kept_weights(model).held
    assert held == 4 * WEIGHTS
    assert planner.room.make("CUDA out of memory. Tried to allocate 20.00 KiB.", 0)
    assert models.kept_weights(model).held == 0
    assert planner.room.dropped == 0
    assert len([record for record in planner.room.records() if record.held]) == LAYERS
    assert planner.room.make("CUDA out of memory. Tried to allocate 20.00 KiB.", 1)
    assert planner.room.dropped > 0
    loss.backward()
    model.zero_grad(set_to_none=True)
    assert same_bits(gradients(model, BATCH), wanted)
    assert 0 < plan_of(planner).parts[DECODED] <= held


def test_what_is_spared_is_not_taken_for_missing() -> None:
    """The next plans are smaller by what was missing, and not by all decoded weights."""
    missing: list[int] = []
    room = Room(lambda: 0, missing.append, lambda: 1000 * MiB)
    assert room.make("CUDA out of memory. Tried to allocate 2.00 MiB.", 0)
    assert missing == [2 * MiB]
    assert not Room(lambda: 0, missing.append).make("CUDA out of memory. Tried to allocate 2.00 MiB.", 0)


def test_a_saved_plan_says_how_many_are_kept() -> None:
    model, planner = planned("3MiB")
    for _ in range(5):
        gradients(model, BATCH)
    plan, agreed = plan_of(planner), planner.agreed
    assert 0 < plan.parts[DECODED] < 4 * WEIGHTS
    assert agreed is not None
    again = Plan.from_json(plan.to_json())
    other, follower = planned("40MiB")
    follower.pin(agreed, [again], "a test says so")
    gradients(other, BATCH)
    assert plan_of(follower) == plan
    assert models.kept_weights(other).held == models.kept_weights(model).held <= plan.parts[DECODED]


@pytest.mark.parametrize("case", ["DoRA", "16 bits", "keep", "full", "decoded", "fp8"])
def test_where_nothing_is_to_be_gained_nothing_is_kept(case: str) -> None:
    base = models.plain(num_hidden_layers=LAYERS)
    plain = models.lora(base if case == "16 bits" else models.quantized(base), use_dora=case == "DoRA")
    memory = case if case in ("keep", "full") else "8MiB"
    options: dict[str, Any] = {"compute": "fp8_backward"} if case == "fp8" else {}
    if case == "decoded":
        options["base_weights"] = "decoded"
    model, planner = planned(memory, plain, **options)
    for _ in range(2):
        gradients(model, BATCH)
    assert DECODED not in plan_of(planner).parts
    weights = model.get_base_model().model.layers[0].__dict__["_fastplug"].runtime.weights
    assert weights is None or weights.held == 0


def test_the_report_and_the_tables_say_it() -> None:
    model, _ = planned("6MiB")
    gradients(model, BATCH)
    assert "layers 3 x keep, 0.00 GiB of the base decoded once and kept; peak" in str(fastplug.report(model))
    assert fastplug.report(model).as_dict()["memory"][0]["plan"]["parts"][DECODED] == 4 * WEIGHTS


def test_what_is_kept_last_goes_first() -> None:
    class Owner:
        pass

    kept, owners, device = KeptWeights(True, limit=100), [Owner() for _ in range(3)], torch.device("cpu")

    def get(owner: Owner) -> bool:
        return kept.get([owner], "form", list, lambda empty: torch.zeros(10), device, size=40)[1]

    assert [get(owner) for owner in owners] == [True, True, False]
    assert kept.held == 80
    assert kept.limit_to(60) == 40
    assert [get(owner) for owner in owners] == [True, False, False]
    assert kept.limit_to(120) == 0
    assert [get(owner) for owner in owners] == [True, True, True]
    assert kept.limit_to(0) == 120
    assert kept.held == 0


@pytest.mark.gpu
def test_a_recording_reads_none_of_it(device: torch.device) -> None:
    kept, made = KeptWeights(True, limit=2**20), []

    class Owner:
        pass

    owner = Owner()

    def get() -> Any:
        return kept.get([owner], "form", list, lambda empty: made.append(1) or torch.zeros(10, device=device), device)

    first = get()
    assert first[1]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        form, stays = get()
    assert not stays
    assert form.data_ptr() != first[0].data_ptr()
    assert len(made) == 2
