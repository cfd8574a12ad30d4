"""What people combine with the Trainer gives the same losses with the callback as without it.

Accumulation, packing and TRL's own features are in ``test_callback.py`` and ``test_trl.py``, several processes in
``test_distributed.py``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback

import fastplug
from fastplug.metrics import TOKENS_PER_SECOND, Meter
from fastplug_hf import FastPlugCallback
from tests import models
from tests.hf import tiny


def full() -> Any:
    return models.plain("llama")


def adapted() -> Any:
    return models.lora(models.plain("llama"))


def both(make: Callable[[], Any], folder: Path, *callbacks: Any, **changes: Any) -> tuple[Trainer, Trainer]:
    """Trainers that ran without and with fastplug, with the same losses; the second ran fused all the way."""
    plain = tiny.trainer(make(), folder / "plain", *callbacks, **changes)
    plain.train()
    fused = tiny.trainer(make(), folder / "fused", FastPlugCallback(), *callbacks, **changes)
    fused.train()
    tiny.assert_fused(fused.model)
    assert_same(plain, fused)
    return plain, fused


def assert_same(plain: Trainer, fused: Trainer, rel: float = 1e-5) -> None:
    losses = tiny.losses(plain)
    assert len(set(losses)) == len(losses) >= 2, "the losses do not move"
    for key in ("loss", "eval_loss", "eval_accuracy"):
        assert tiny.losses(fused, key) == pytest.approx(tiny.losses(plain, key), rel=rel), key


def weighted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    summed = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return 2.0 * summed / num_items_in_batch


def accuracy(predicted: Any) -> dict[str, float]:
    guesses = predicted.predictions.argmax(-1)[:, :-1]
    return {
        "accuracy": float((guesses == predicted.label_ids[:, 1:]).mean()),
        "sum": float(predicted.predictions.sum()),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": weighted_loss},
        {"compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "neftune_noise_alpha": 1.0},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"optim": "adafactor"},
        {"train_sampling_strategy": "group_by_length", "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
    ids=["accumulation", "label_smoothing", "compute_loss_func", "compute_metrics", "neftune", "reentrant",
         "non_reentrant", "adafactor", "group_by_length"],
)  # fmt: skip
def test_one_option(changes: dict[str, Any], tmp_path: Path) -> None:
    plain, fused = both(full, tmp_path, **changes)
    assert tiny.losses(fused, "eval_sum") == pytest.approx(tiny.losses(plain, "eval_sum"), rel=1e-4)


@pytest.mark.parametrize("make", [full, adapted])
def test_8bit_optimizer(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Its states are 8-bit only from 4096 values on.
    _, fused = both(make, tmp_path, optim="adamw_8bit", max_steps=4)
    states = {s["state1"].dtype for s in fused.optimizer.optimizer.state.values()} if make is full else {torch.uint8}
    assert torch.uint8 in states


def test_qlora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    models.plain("llama").save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip

    def make() -> Any:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
        return models.lora(base)

    both(make, tmp_path, max_steps=4)


def test_early_stopping(tmp_path: Path) -> None:
    plain, fused = both(
        adapted, tmp_path, EarlyStoppingCallback(1, early_stopping_threshold=100.0), max_steps=8, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    assert plain.state.global_step == fused.state.global_step == 2


def test_load_best_model_at_end(tmp_path: Path) -> None:
    plain, fused = both(
        adapted, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, save_only_model=True,
    )  # fmt: skip
    # "Best" is the highest loss here, so that the best is not the last.
    assert Path(plain.state.best_model_checkpoint).name == Path(fused.state.best_model_checkpoint).name
    assert Path(fused.state.best_model_checkpoint).name != "checkpoint-4"
    best = max(tiny.losses(fused, "eval_loss"))
    assert fused.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
    assert plain.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


# --- resume, continue, share ------------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, Any] = dict(max_steps=4, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four steps, ``plain`` and ``fused``, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("halves")
    plain, _ = both(adapted, folder, **CHECKPOINTS)
    (folder / "losses.json").write_text(json.dumps(tiny.losses(plain)))
    return folder


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("fused", {}),
        ("fused", None),
        ("plain", {}),
        ("fused", {"disable": ["mlp", "decoder_layer"]}),
        ("fused", {"disable": ["lm_head_loss"], "kernels": "reference", "undo_at_end": True}),
    ],
    ids=["fused to fused", "fused to plain", "plain to fused", "other roles", "other options"],
)
def test_resume(source: str, options: dict[str, Any] | None, halves: Path, tmp_path: Path) -> None:
    callbacks = [] if options is None else [FastPlugCallback(**options)]
    resumed = tiny.trainer(adapted(), tmp_path, *callbacks, **CHECKPOINTS)
    resumed.train(resume_from_checkpoint=str(halves / source / "checkpoint-2"))
    assert tiny.losses(resumed) == pytest.approx(json.loads((halves / "losses.json").read_text()), rel=1e-5)
    if options is None:
        assert not tiny.patched(resumed.model)
    elif not options.get("undo_at_end"):
        assert not fastplug.report(resumed.model).fallbacks


@pytest.mark.parametrize("source", ["plain", "fused"])
def test_an_existing_adapter_trains_on(source: str, halves: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    checkpoint = halves / source / "checkpoint-4"

    def make() -> Any:
        return peft.PeftModel.from_pretrained(models.plain("llama"), checkpoint, is_trainable=True)

    plain, _ = both(make, tmp_path)
    assert tiny.losses(plain)[0] < json.loads((halves / "losses.json").read_text())[0]


def test_what_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``push_to_hub=True`` with the network replaced by a folder."""

    class Hub:
        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: Any = (), **kwargs: Any) -> Any:
            ignored = shutil.ignore_patterns(*(ignore_patterns or ()))
            shutil.copytree(folder_path, tmp_path / repo_id, ignore=ignored, dirs_exist_ok=True)
            return SimpleNamespace(done=lambda: True, result=lambda: None)

    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    else:  # older transformers
        monkeypatch.setattr(transformers.trainer, "create_repo", Hub().create_repo)
        monkeypatch.setattr(transformers.trainer, "upload_folder", Hub().upload_folder)
    for name, callbacks in {"plain": [], "fused": [FastPlugCallback()]}.items():
        made = tiny.trainer(
            full(), tmp_path / "out" / name, *callbacks, push_to_hub=True, hub_model_id=name,
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        made.train()
        made.push_to_hub(dataset_tags="dialogs")
    plain, fused = (
        {str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*") if file.is_file()}
        for name in ("plain", "fused")
    )
    assert fused - plain == {"fastplug_report.json"}
    assert plain - fused == set()
    assert {"model.safetensors", "README.md", "tokenizer.json", "config.json"} <= fused
    card, other = ((tmp_path / name / "README.md").read_text() for name in ("plain", "fused"))
    assert other.replace("fused", "plain") == card
    theirs, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "fused"))
    assert type(ours) is type(theirs)
    batch = models.batch()
    with torch.no_grad():
        assert float(ours(**batch).loss) == pytest.approx(float(theirs(**batch).loss), rel=1e-5)


# --- several models in one run ----------------------------------------------------------------------------------------


def test_model_init_as_in_a_search(tmp_path: Path) -> None:
    """Each ``train()`` makes a new model; the losses of the second run are those of the first."""

    def run(*callbacks: Any) -> tuple[Trainer, list[list[float]]]:
        made = tiny.trainer(None, tmp_path, *callbacks, model_init=full)
        found, seen = [], {id(made.model)}
        for _ in range(2):
            made.train()
            found.append(tiny.losses(made))
            seen.add(id(made.model))
        assert len(seen) > 1
        return made, found

    (_, theirs), (fused, ours) = run(), run(FastPlugCallback())
    tiny.assert_fused(fused.model)
    assert len(tiny.losses(fused, TOKENS_PER_SECOND)) == 3
    assert ours[0] == ours[1] == pytest.approx(theirs[0], rel=1e-5)


class TooLarge(TrainerCallback):
    """Runs out of memory at every batch size above two."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.train_batch_size > 2:
            raise RuntimeError("CUDA out of memory. (Not really.)")


def test_auto_find_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda *args: 0)  # accelerate's search calls it nine times, nearly a second each
    _, fused = both(adapted, tmp_path, TooLarge(), auto_find_batch_size=True)
    assert fused.state.train_batch_size == 2
    assert len(tiny.losses(fused, TOKENS_PER_SECOND)) == 3


@pytest.mark.slow
def test_torch_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses as without, and tokens are counted in compiled runs too."""
    counts: list[int] = []
    take = Meter.take
    monkeypatch.setattr(Meter, "take", lambda self: counts.append(take(self)) or counts[-1])
    data = tiny.rows(8)
    torch._dynamo.reset()

    def run(*callbacks: Any, **changes: Any) -> Trainer:
        made = tiny.trainer(
            models.lora(models.plain("llama", num_hidden_layers=1)), tmp_path, *callbacks, data=data, max_steps=2,
            train_sampling_strategy="sequential", **changes,
        )  # fmt: skip
        made.train()
        return made

    backend = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
    fused = run(FastPlugCallback(), torch_compile=True, torch_compile_backend=backend)
    tiny.assert_fused(fused.model)
    assert_same(run(), fused)
    assert counts == [tiny.tokens_in(data[:4]), tiny.tokens_in(data[4:])]
