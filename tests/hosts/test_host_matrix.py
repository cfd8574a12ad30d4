"""The Trainer and TRL of the installed versions train to the same losses with and without fastplug.

Runs in every ``hf*`` environment of tox.ini, so it keeps to what transformers 4.51 to 5.24 and TRL 0.19 to 1.16 share.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastplug
from fastplug_hf import FastPlugCallback
from tests import models
from tests.hf import tiny

STEPS = 5


def lora(family: str) -> Any:
    return models.lora(models.plain(family))


def qlora(family: str) -> Any:
    return models.qlora(family)


def assert_fused(model: Any) -> None:
    """Every site was patched or had nothing to gain, and no call fell back."""
    report = fastplug.report(model)
    assert {decision.role for decision in report.patched} >= {"decoder_layer", "lm_head_loss"}, report.summary()
    assert not report.refused, report.summary()
    assert not report.fallbacks, report.summary()


def assert_same_run(plain: Any, fused: Any) -> None:
    theirs, ours = tiny.losses(plain), tiny.losses(fused)
    assert len(theirs) == STEPS
    assert len(set(theirs)) == STEPS, "the losses do not move"
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert tiny.losses(fused, "grad_norm") == pytest.approx(tiny.losses(plain, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    ("make", "family"),
    [(models.plain, "llama"), *((lora, family) for family in models.FAMILIES), (qlora, "llama"), (qlora, "qwen3")],
)
def test_trainer(make: Callable[[str], Any], family: str, checkpointing: str | None, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": STEPS}
    if checkpointing:
        changes["gradient_checkpointing"] = True
        changes["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}

    def run(*callbacks: Any) -> Any:
        model = make(family)
        if checkpointing:
            model.enable_input_require_grads()
        trainer = tiny.trainer(model, tmp_path, *callbacks, **changes)
        trainer.train()
        return trainer

    fused = run(FastPlugCallback())
    assert_fused(fused.model)
    assert_same_run(run(), fused)


def test_metrics_and_report_are_where_the_host_keeps_its_own(tmp_path: Path) -> None:
    trainer = tiny.trainer(lora("llama"), tmp_path, FastPlugCallback(), save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert all(entry["fastplug/tokens_per_second"] > 0 for entry in history if "loss" in entry)
    assert json.loads((checkpoint / "fastplug_report.json").read_text())["decisions"]


def test_evaluation_and_metrics_read_the_same_logits(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.mean()), "mean": float(prediction.predictions.mean())}

    def evaluate(*callbacks: Any) -> dict[str, float]:
        found = tiny.trainer(lora("llama"), tmp_path, *callbacks, compute_metrics=accuracy).evaluate()
        return {key: found[key] for key in ("eval_loss", "eval_accuracy", "eval_mean")}

    assert evaluate(FastPlugCallback()) == pytest.approx(evaluate(), rel=1e-5)


def test_generation_and_undo(tmp_path: Path) -> None:
    model = lora("llama").eval()
    prompt = torch.tensor([[5, 6, 7, 8]])

    def answer() -> list[int]:
        return model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0].tolist()  # type: ignore[no-any-return]

    classes = [type(module) for module in model.modules()]
    before = answer()
    fastplug.apply(model)
    assert answer() == before
    fastplug.undo(model)
    assert [type(module) for module in model.modules()] == classes
    assert answer() == before


def sentences(count: int = 32) -> list[str]:
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sky",
        "sea",
        "is",
        "are",
        "blue",
        "green",
        "warm",
        "cold",
        "because",
        "it",
        "they",
        "red",
    ]
    source = random.Random(5)
    return [" ".join(source.choices(words, k=source.randint(4, 12))) for _ in range(count)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(checkpointing: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")

    def run(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model=models.plain("llama"),
            args=trl.SFTConfig(
                output_dir=str(tmp_path), max_steps=STEPS, logging_steps=1, save_strategy="no", report_to=[],
                per_device_train_batch_size=4, learning_rate=1e-2, seed=1, use_cpu=True, disable_tqdm=True,
                bf16=False, gradient_checkpointing=checkpointing, max_length=32, dataset_text_field="text",
                gradient_checkpointing_kwargs={"use_reentrant": False},
            ),
            train_dataset=datasets.Dataset.from_dict({"text": sentences()}),
            processing_class=tiny.tokenizer(),
            peft_config=peft.LoraConfig(r=4, target_modules=list(models.LINEARS), task_type="CAUSAL_LM"),
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train()
        return trainer

    fused = run(FastPlugCallback())
    report = fastplug.report(fused.model)
    assert {decision.role for decision in report.patched} >= {"decoder_layer"}, report.summary()
    assert not report.fallbacks, report.summary()
    plain = run()
    assert_same_run(plain, fused)
    key = "mean_token_accuracy"
    assert tiny.losses(fused, key) == pytest.approx(tiny.losses(plain, key), rel=1e-5)
