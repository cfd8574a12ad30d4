"""TRL's trainers run unchanged with the callback and give the losses they give without it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

import fastplug
from fastplug.layers import loraplus_groups
from fastplug.metrics import PEAK_MEMORY, TOKENS_PER_SECOND
from fastplug.patching.sites import KEY
from fastplug_hf import FastPlugCallback
from tests import models
from tests.hf import tiny

pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

SENTENCES = [
    "the sky is blue .",
    "a dog is warm , a cat is warm .",
    "why is the sea cold ? because the sky is cold .",
    "who ? they .",
    "which dog ? the red dog , because it is green .",
]
COMMON = dict(
    max_steps=3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False, use_cpu=True,
    gradient_checkpointing=False, per_device_train_batch_size=4, learning_rate=3e-3, seed=1, data_seed=1,
)  # fmt: skip


# Times, and how often two equal rewards compare as greater: at DPO's first step policy and reference are the same.
NOT_COMPARED = {"step_time", "rewards/accuracies"} | {
    f"{mode}_{what}"
    for mode in ("train", "eval")
    for what in ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second")
}


def texts() -> Any:
    return Dataset.from_list([{"text": sentence} for sentence in SENTENCES * 4])


def preferences() -> Any:
    pairs = itertools.permutations(SENTENCES, 2)
    return Dataset.from_list([{"prompt": "what is the sky ?", "chosen": a, "rejected": b} for a, b in pairs])


def judged() -> Any:
    answers = [{"prompt": "what ?", "completion": text, "label": i % 2 == 0} for i, text in enumerate(SENTENCES * 4)]
    return Dataset.from_list(answers)


def prompts() -> Any:
    return Dataset.from_list([{"prompt": "the sky is"}, {"prompt": "why ?"}] * 8)


def length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def build(
    name: str,
    folder: Path,
    callbacks: list[Any],
    *,
    adapted: Any = None,
    optimizers: Any = (None, None),
    **changes: Any,
) -> Any:
    import trl

    if "loss_type" in changes and tuple(map(int, trl.__version__.split(".")[:2])) < (1, 4):
        pytest.skip(f"TRL {trl.__version__} has no chunked_nll")
    data = {"SFT": texts, "DPO": preferences, "KTO": judged, "Reward": preferences, "GRPO": prompts}[name]()
    own: dict[str, Any] = {}
    model = models.plain("llama")
    if name == "GRPO":
        changes = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, **changes}
        own = {"reward_funcs": length_reward}
    if name == "Reward":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.config.num_labels = 1
            model = LlamaForSequenceClassification(model.config)
    model = adapted or models.lora(model, task_type="SEQ_CLS" if name == "Reward" else "CAUSAL_LM")
    config = getattr(trl, f"{name}Config")(output_dir=str(folder), **{**COMMON, **changes})
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        eval_dataset=data.select(range(4)) if "eval_strategy" in changes else None,
        callbacks=callbacks,
        optimizers=optimizers,
        **own,
    )


SERVED = "log-probabilities in TRL's head"
Cases = list[tuple[str, dict[str, Any]]]
CASES: Cases = [
    ("SFT", {}),
    ("SFT", {"loss_type": "chunked_nll"}),
    ("SFT", {"packing": True, "max_length": 24}),
    ("SFT", {"padding_free": True, "max_length": None}),
    ("SFT", {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}),
    ("DPO", {}),
    ("KTO", {}),
    ("Reward", {}),
    ("GRPO", {}),
]


@pytest.mark.parametrize(
    ("name", "changes"), CASES, ids=[" ".join([name, *map(str, changes)]) for name, changes in CASES]
)
def test_same_losses_with_and_without(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    plain = build(name, tmp_path / "plain", [], **changes)
    plain.train()
    fused = build(name, tmp_path / "fused", [FastPlugCallback()], **changes)
    fused.train()
    report = fastplug.report(fused.model)
    assert {"decoder_layer", "attention", "mlp"} <= {decision.role for decision in report.patched}
    assert not report.fallbacks
    assert [set(entry) - {TOKENS_PER_SECOND, PEAK_MEMORY} for entry in fused.state.log_history] == [
        set(entry) for entry in plain.state.log_history
    ]
    for entry, ours in zip(plain.state.log_history, fused.state.log_history):
        for key in entry.keys() - NOT_COMPARED:
            cancels = 1e-3 if key.startswith("logits/") else 1e-5  # means over all logits, of either sign
            assert ours[key] == pytest.approx(entry[key], rel=1e-4, abs=cancels), key
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=1e-5, abs=1e-6)
    assert len(tiny.losses(fused, TOKENS_PER_SECOND)) == 3


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_lora_plus(name: str, tmp_path: Path) -> None:
    """An optimizer of LoRA+'s groups, given to the trainer; TRL passes ``optimizers`` on to transformers."""
    runs = []
    for ratio, callbacks in ((4.0, []), (4.0, [FastPlugCallback()]), (1.0, [FastPlugCallback()])):
        model = models.lora(models.plain("llama"))
        optimizer = torch.optim.AdamW(loraplus_groups(model, COMMON["learning_rate"], ratio))  # type: ignore[arg-type]
        runs.append(build(name, tmp_path / str(len(runs)), callbacks, adapted=model, optimizers=(optimizer, None)))
        runs[-1].train()
    plain, fused, equal = runs
    assert {"decoder_layer", "attention", "mlp"} <= {d.role for d in fastplug.report(fused.model).patched}
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=1e-5, abs=1e-6)
    assert tiny.losses(fused)[-1] != pytest.approx(tiny.losses(equal)[-1], rel=1e-4)
    rates = {group["name"]: group["initial_lr"] for group in fused.optimizer.param_groups}
    assert rates["B"] == pytest.approx(4 * rates["A and others"])


def test_token_accuracy_and_entropy_are_those_of_the_logits(tmp_path: Path) -> None:
    """Learns by heart, so that the accuracy is not zero; what it is without fastplug, TRL says in its way."""
    changes: dict[str, Any] = dict(max_steps=6, learning_rate=3e-2, gradient_accumulation_steps=2)
    plain = build("SFT", tmp_path / "plain", [], **changes)
    plain.train()
    fused = build("SFT", tmp_path / "fused", [FastPlugCallback()], **changes)
    fused.train()
    accuracies = tiny.losses(plain, "mean_token_accuracy")
    assert max(accuracies) > 0.2
    assert tiny.losses(fused, "mean_token_accuracy") == pytest.approx(accuracies, abs=1e-6)
    assert tiny.losses(fused, "entropy") == pytest.approx(tiny.losses(plain, "entropy"), rel=1e-4)


def test_trls_own_head(tmp_path: Path) -> None:
    """TRL 1.4 to 1.14 replace the forward before on_init_end and keep theirs; that of later ones, put on after it, is
    served; older ones have none."""
    trainer = build("SFT", tmp_path, [FastPlugCallback()])
    head = trainer.model.get_base_model()
    assert KEY in head.__dict__ or "forward" in head.__dict__
    own = head.__dict__.get("forward")
    trainer.train()
    report = fastplug.report(trainer.model)
    refused = {decision.role: decision.reason for decision in report.refused}
    if getattr(own, "__name__", None) == "forward" and own.__func__.__code__.co_name == "_fused_forward":
        assert [d.implementation for d in report.patched if d.role == "lm_head_loss"] == [SERVED]
        assert not report.fallbacks
        fastplug.undo(trainer.model)
        assert head.__dict__["forward"] is own
    else:
        assert refused.keys() == ({"lm_head_loss"} if own else set())
        assert all(reason.startswith("its forward was replaced on the instance by trl.") for reason in refused.values())
        assert (KEY in head.__dict__) == (own is None)
