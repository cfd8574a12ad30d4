"""TRL's fused head, served by fastplug: the same numbers and gradients as TRL's own."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch

import fastplug
from fastplug.patching.forwards import trl_head
from fastplug.patching.sites import KEY
from tests import models
from tests.engine.step import fallbacks, relative
from tests.families import cases

utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("this TRL puts no such head on a model", allow_module_level=True)

NAME = "log-probabilities in TRL's head"
OUTPUTS = {
    "SFT": ("log_probs", "entropy", "is_top1"),
    "DPO": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "GRPO": ("log_probs", "entropy"),
    "reference": ("log_probs",),
}


def with_head(adapted: bool = True, capped: bool = False, **options: Any) -> Any:
    """A model that TRL has put its head on, as its trainers do; Gemma 2 where it is to have a softcap."""
    model = cases.build("gemma 2") if capped else models.plain()
    if adapted:
        model = models.lora(model)
    utils.add_fused_lm_head(model.get_base_model() if adapted else model, **options)
    return model


def pair(**options: Any) -> tuple[Any, Any]:
    ours, theirs = with_head(**options), with_head(**options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run(model: Any, batch: dict[str, Any], through_entropy: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(**batch, fused_lm_head=True)
    weights = torch.linspace(0.5, 1.5, output.log_probs.numel()).view_as(output.log_probs)
    total = (output.log_probs * weights).sum() + output.loss
    if through_entropy:
        total = total - (output.entropy * weights.flip(0)).sum()
    total.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Any, dict[str, torch.Tensor]], theirs: tuple[Any, dict[str, torch.Tensor]]) -> None:
    (mine, gradients), (other, expected) = ours, theirs
    for name in trl_head.FIELDS:
        value, truth = getattr(mine, name), getattr(other, name)
        assert (value is None) == (truth is None), name
        if truth is not None and truth.is_floating_point():
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023
        elif truth is not None:
            assert torch.equal(value, truth), name
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(gradients[name], gradient) < 2e-5, name


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_same_outputs_and_gradients(outputs: tuple[str, ...], prompts: bool, adapted: bool) -> None:
    ours, theirs = pair(adapted=adapted, outputs=outputs, temperature=0.7)
    report = fastplug.apply(ours).report
    assert [d.implementation for d in report.patched if d.role == "lm_head_loss"] == [NAME]
    assert not report.refused
    batch = models.prompted() if prompts else models.batch(3, 40, ignored=0.0)
    assert_same(run(ours, batch), run(theirs, batch))
    if "entropy" in outputs:
        assert_same(run(ours, batch, True), run(theirs, batch, True))
    assert not fallbacks(ours), fallbacks(ours)


def test_shifted_labels_items_and_a_softcap() -> None:
    ours, theirs = pair(capped=True, outputs=OUTPUTS["SFT"])
    fastplug.apply(ours)
    batch = models.prompted()
    labels = batch.pop("labels")
    batch["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert_same(run(ours, batch), run(theirs, batch))
    items = {**batch, "num_items_in_batch": torch.tensor(50)}
    assert_same(run(ours, items), run(theirs, items))
    assert not fallbacks(ours), fallbacks(ours)


def test_nobody_looks_for_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which transformers would wait for the device, where there is neither a mask nor a cache."""
    model = with_head(outputs=OUTPUTS["SFT"])
    batch = {name: models.batch()[name] for name in ("input_ids", "labels")}
    asked: list[Any] = []
    found = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(found, lambda *args, **kwargs: asked.append(args))
    run(model, batch)
    assert asked
    asked.clear()
    fastplug.apply(model)
    run(model, batch)
    assert not asked
    assert not fallbacks(model)


def test_without_gradients_and_without_a_label() -> None:
    ours, theirs = pair(outputs=OUTPUTS["SFT"])
    fastplug.apply(ours)
    with torch.no_grad():
        mine, other = (part.eval()(**models.prompted(), fused_lm_head=True) for part in (ours, theirs))
    assert_same((mine, {}), (other, {}))
    batch = models.prompted()
    batch["labels"].fill_(-100)
    found, gradients = run(ours.train(), batch)
    assert float(found.loss.detach()) == 0.0
    assert gradients
    assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_calls_without_it_are_ordinary_ones() -> None:
    ours, theirs = pair()
    fastplug.apply(ours)
    batch = models.prompted()
    mine, other = (part(**batch) for part in (ours, theirs))
    torch.testing.assert_close(mine.loss, other.loss)
    tokens = batch["input_ids"][:, :5]
    assert torch.equal(*(part.generate(tokens, max_new_tokens=4, do_sample=False) for part in (ours, theirs)))
    assert not fallbacks(ours), fallbacks(ours)


@pytest.mark.parametrize("first", ["TRL", "fastplug"])
def test_undo_gives_trls_forward_back(first: str) -> None:
    """Whoever came first: later versions of TRL put their head on a model that is patched already."""
    model = models.lora(models.plain())
    base = model.get_base_model()
    if first == "fastplug":
        fastplug.apply(model)
    utils.add_fused_lm_head(base, outputs=OUTPUTS["SFT"])
    own = base.__dict__["forward"]
    report = fastplug.apply(model).report
    assert [d.implementation for d in report.decisions if d.role == "lm_head_loss"] == [NAME]
    assert "forward" not in base.__dict__
    batch = models.prompted()
    served = run(model, batch)
    logits = model(input_ids=batch["input_ids"]).logits
    fastplug.undo(model)
    torch.testing.assert_close(logits, model(input_ids=batch["input_ids"]).logits)
    assert base.__dict__["forward"] is own
    assert KEY not in base.__dict__
    assert_same(served, run(model, batch))


def test_a_copy_runs_on_its_own() -> None:
    model = with_head(outputs=OUTPUTS["SFT"])
    fastplug.apply(model)
    batch = models.prompted()
    expected = run(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(run(twin, batch), expected)
    own = twin.get_base_model().__dict__[KEY].stands_in_for
    assert own.__self__ is twin.get_base_model()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"outputs": ("log_probs", "log_sum_sq_probs")}, "TRL wants log_sum_sq_probs of its head"),
        ({"cast_lm_head_to_fp32": True}, "TRL's head is to be computed in fp32"),
        ({"capped": True, "outputs": OUTPUTS["DPO"]}, "TRL wants the mean of logits with a softcap of its head"),
    ],
)
def test_what_is_not_served_is_left_to_trl(options: dict[str, Any], reason: str) -> None:
    ours, theirs = pair(**options)
    fastplug.apply(ours)
    batch = models.prompted()
    assert_same(run(ours, batch), run(theirs, batch))
    assert fallbacks(ours) == {reason}


def test_a_head_that_is_not_known_keeps_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_head, "SETTINGS", (*trl_head.SETTINGS, "later"))
    model = with_head()
    own = model.get_base_model().__dict__["forward"]
    (refused,) = fastplug.apply(model).report.refused
    assert refused.reason == "its forward was replaced on the instance by trl.trainer.utils"
    assert model.get_base_model().__dict__["forward"] is own


def test_a_head_around_somebody_elses_forward_keeps_running() -> None:
    model = models.lora(models.plain())
    base = model.get_base_model()
    own = base.forward

    def elsewhere(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    base.forward = types.MethodType(elsewhere, base)
    utils.add_fused_lm_head(base)
    (refused,) = fastplug.apply(model).report.refused
    assert refused.reason == "its forward was replaced on the instance by trl.trainer.utils"


def test_dispatched_over_devices() -> None:
    model = with_head()
    model.get_base_model()._hf_hook = object()
    (refused,) = fastplug.apply(model).report.refused
    assert "accelerate's device hooks" in str(refused.reason)


def test_under_a_plan_and_on_a_quantized_base() -> None:
    model = models.qlora()
    twin = copy.deepcopy(model)
    for part in (model, twin):
        utils.add_fused_lm_head(part.get_base_model(), outputs=OUTPUTS["GRPO"])
    fastplug.apply(model, memory="full")
    batch = models.prompted()
    assert_same(run(model, batch), run(twin, batch))
    assert not fallbacks(model), fallbacks(model)
