"""FastPlugCallback in the Trainer: same losses, same files, its metrics where the host shows metrics."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.utils.logging import get_verbosity, set_verbosity

import fastplug
from fastplug.errors import OptionError, StrictError
from fastplug.metrics import PEAK_MEMORY, TOKENS_PER_SECOND, Meter
from fastplug.patching.sites import KEY
from fastplug_hf import FastPlugCallback
from fastplug_hf.metrics import TokenCounter
from tests import models
from tests.hf import tiny


def full(family: str) -> Any:
    return models.plain(family)


def adapted(family: str) -> Any:
    return models.lora(models.plain(family))


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """Trainers set transformers' verbosity for the whole process."""
    before = get_verbosity()
    yield
    set_verbosity(before)


def both(make: Any, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """Trainers that ran without and with fastplug; the second must have run fused all the way."""
    plain = tiny.trainer(make(), folder / "plain", **changes)
    plain.train()
    fused = tiny.trainer(make(), folder / "fused", FastPlugCallback(), **changes)
    fused.train()
    tiny.assert_fused(fused.model)
    return plain, fused


@pytest.mark.parametrize("make", [full, adapted])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_twenty_steps_give_the_same_losses(make: Any, family: str, tmp_path: Path) -> None:
    plain, fused = both(lambda: make(family), tmp_path, max_steps=20)
    assert len(tiny.losses(plain)) == 20
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=1e-5)
    assert tiny.losses(fused, "grad_norm") == pytest.approx(tiny.losses(plain, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("make", [full, adapted])
def test_uneven_accumulation_equals_one_large_batch(make: Any, tmp_path: Path) -> None:
    changes = dict(max_steps=2, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, train_sampling_strategy="sequential")
    small = tiny.trainer(
        make("llama"), tmp_path / "a", FastPlugCallback(), per_device_train_batch_size=2,
        gradient_accumulation_steps=4, **changes,
    )  # fmt: skip
    large = tiny.trainer(make("llama"), tmp_path / "b", FastPlugCallback(), per_device_train_batch_size=8, **changes)
    small.train()
    large.train()
    assert tiny.losses(small) == pytest.approx(tiny.losses(large), rel=1e-5)
    for (name, ours), theirs in zip(small.model.named_parameters(), large.model.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6), name


def accuracy(predicted: Any) -> dict[str, float]:
    guesses = predicted.predictions.argmax(-1)[:, :-1]
    return {
        "accuracy": float((guesses == predicted.label_ids[:, 1:]).mean()),
        "sum": float(predicted.predictions.sum()),
    }


@pytest.mark.parametrize("make", [full, adapted])
def test_bf16_autocast_stays_fused(make: Any, tmp_path: Path) -> None:
    plain, fused = both(lambda: make("llama"), tmp_path, bf16=True, max_steps=5)
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=5e-3)
    with torch.no_grad():
        logits = fused.model(**models.batch()).logits
    assert logits.dtype == torch.float32  # accelerate's cast of what autocast puts out
    assert not logits.computed
    again = fused.train()  # prepares the model anew
    assert not fastplug.report(fused.model).refused
    assert again.training_loss > 0
    fused.callback_handler.callbacks[1].undo()
    assert not tiny.patched(fused.model)
    fused.train()  # patches again, inside the autocast wrapper that accelerate left on the model
    report = fastplug.report(fused.model)
    assert not report.refused
    assert not report.fallbacks


WITHOUT_FASTPLUG = """
import sys, torch
for name in ("fastplug", "fastplug_hf"):
    sys.modules[name] = None
folder = sys.argv[1]
tokens = torch.load(f"{folder}/tokens.pt")
whole = torch.load(f"{folder}/whole.pt", weights_only=False)
from transformers import AutoModelForCausalLM
saved = AutoModelForCausalLM.from_pretrained(f"{folder}/saved")
with torch.no_grad():
    torch.save([model.eval()(input_ids=tokens).logits for model in (whole, saved)], f"{folder}/logits.pt")
"""


class SaveWhole(TrainerCallback):
    """``torch.save(model)`` in the middle of a run, with every hook in place."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.save(model, Path(args.output_dir, "whole.pt"))


def test_saved_files_load_without_fastplug(tmp_path: Path) -> None:
    made = tiny.trainer(full("qwen3"), tmp_path, FastPlugCallback(), SaveWhole(), max_steps=2)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    tokens = torch.randint(3, models.VOCABULARY, (2, 9))
    torch.save(tokens, tmp_path / "tokens.pt")
    with torch.no_grad():
        expected = made.model.eval()(input_ids=tokens).logits
    subprocess.run([sys.executable, "-c", WITHOUT_FASTPLUG, str(tmp_path)], check=True)
    for logits in torch.load(tmp_path / "logits.pt"):
        assert torch.allclose(logits, expected, atol=1e-5)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every TensorBoard event file below a folder."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = event_accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_metrics_reach_tensorboard_and_the_state_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    take = Meter.take
    monkeypatch.setattr(Meter, "take", lambda self: counts.append(take(self)) or counts[-1])
    data = tiny.rows(16)
    made = tiny.trainer(
        adapted("llama"), tmp_path, FastPlugCallback(), data=data, max_steps=4, logging_steps=2, eval_strategy="steps",
        eval_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True,
        train_sampling_strategy="sequential", save_strategy="steps", save_steps=4, report_to=["tensorboard"],
    )  # fmt: skip
    made.train()
    # Unpadded tokens of the training batches, once each: no evaluation, no recomputation.
    assert counts == [tiny.tokens_in(data[:8]), tiny.tokens_in(data[8:])]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    for key in (TOKENS_PER_SECOND, PEAK_MEMORY):
        logged = [(entry["step"], entry[key]) for entry in state["log_history"] if key in entry]
        assert [step for step, _ in logged] == [2, 4]
        assert all(value > 0 for _, value in logged)
        assert all("loss" in entry for entry in state["log_history"] if key in entry)  # not in evaluations
        assert scalars(tmp_path)[f"train/{key}"] == [(step, pytest.approx(value)) for step, value in logged]


class SlowEvaluation(TrainerCallback):
    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.2)


def test_evaluation_time_is_not_training_time(tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(max_steps=4, logging_steps=4, eval_strategy="steps", eval_steps=1)
    made = tiny.trainer(full("llama"), tmp_path, FastPlugCallback(), SlowEvaluation(), **changes)
    started = time.perf_counter()
    made.train()
    elapsed = time.perf_counter() - started
    (rate,) = tiny.losses(made, TOKENS_PER_SECOND)
    trained = 4 * 4 * 10 / rate  # about ten tokens a row
    assert elapsed > 1.6
    assert trained < elapsed - 1.6


def test_other_callbacks_are_called_once_each_in_their_order(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []

    class Note(TrainerCallback):
        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            calls.append((type(self).__name__, "init"))

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            calls.append((type(self).__name__, "train"))

    class First(Note):
        pass

    class Last(Note):
        pass

    tiny.trainer(full("llama"), tmp_path, First(), FastPlugCallback(), Last(), max_steps=1).train()
    assert calls == [("First", "init"), ("Last", "init"), ("First", "train"), ("Last", "train")]


RANK = """
import sys, torch
import torch.distributed as dist
from fastplug.metrics import Meter, TOKENS_PER_SECOND
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
meter = Meter()
meter.start()
meter._seconds = 2.0
meter.count(torch.ones(3, 5), torch.ones(3, 5) if rank else torch.eye(5)[:3])
print(meter.read(torch.device("cpu"))[TOKENS_PER_SECOND], flush=True)
dist.barrier()
dist.destroy_process_group()  # gloo's threads do not survive an exit that leaves them running
"""


def test_tokens_are_those_of_all_ranks(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(i), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for i in range(2)
    ]
    assert [float(rank.communicate(timeout=60)[0]) for rank in ranks] == [9.0, 9.0]  # (3 + 15) / 2 s


@pytest.mark.gpu
def test_counting_does_not_wait_for_the_device(device: torch.device) -> None:
    model = models.plain("llama").to(device)
    batch = {key: value.to(device) for key, value in models.padded("right").items()}
    meter, mask = Meter(), batch["attention_mask"]
    expected = int(mask.sum())
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        TokenCounter(meter)(model, (), batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.take() == expected
    meter.read(device)
    assert torch.cuda.max_memory_allocated() >= peak


def test_reports_lie_beside_the_checkpoints(tmp_path: Path) -> None:
    made = tiny.trainer(
        full("llama"), tmp_path, FastPlugCallback(disable=["mlp"]), max_steps=2, save_strategy="steps", save_steps=1
    )
    made.train()
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        report = json.loads((folder / "fastplug_report.json").read_text())
        assert report["options"]["disable"] == ["mlp"]
        assert {d["role"] for d in report["decisions"] if d["status"] == "patched"} >= {"decoder_layer", "attention"}


def test_summary_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastplug"):
        made = tiny.trainer(full("llama"), tmp_path, FastPlugCallback(), max_steps=1)
        made.train()
        made.train()
    lines = [record for record in caplog.records if record.name == "fastplug"]
    assert len(lines) <= 3
    assert "2 x decoder_layer (fused layer)" in lines[0].getMessage()
    assert {record.levelname for record in lines} == {"INFO"}


def test_a_quiet_host_makes_a_quiet_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = tiny.trainer(full("llama"), tmp_path, FastPlugCallback(), log_level="error")
    assert tiny.patched(made.model)
    assert not [record for record in caplog.records if record.name == "fastplug"]


def test_undo_at_end_gives_the_model_back(tmp_path: Path) -> None:
    model = full("llama")
    kinds, state = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    tiny.trainer(model, tmp_path, FastPlugCallback(undo_at_end=True), max_steps=1).train()
    assert [type(m) for m in model.modules()] == kinds
    del model._is_accelerate_prepared  # the Trainer's own mark
    assert [set(m.__dict__) for m in model.modules()] == state
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_waits_for_the_next_step_goes_at_the_end(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    waiting = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            waiting.append(models.kept_weights(model).handed)

    model = models.qlora()
    callbacks = FastPlugCallback(base_weights="once", graphs="off"), Look()
    tiny.trainer(model, tmp_path, *callbacks, data=tiny.rows(length=80), max_steps=2).train()
    assert len(waiting) == 2
    assert all(waiting)
    assert tiny.patched(model)
    assert models.kept_weights(model).handed == 0


class Interrupt(TrainerCallback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "options", "remains"),
    [
        (KeyboardInterrupt, {}, False),
        (ValueError, {}, True),
        (ValueError, {"undo_at_end": True}, False),
    ],
)
def test_ctrl_c_gives_the_model_back(
    error: type[BaseException], options: dict[str, Any], remains: bool, tmp_path: Path
) -> None:
    made = tiny.trainer(full("llama"), tmp_path, FastPlugCallback(**options), Interrupt(error))
    with pytest.raises(error):
        made.train()
    assert tiny.patched(made.model) == remains
    assert not made.model._forward_pre_hooks
    made.pop_callback(Interrupt)
    made.train()  # and it can go on
    assert made.state.global_step == 3


def test_a_with_block_gives_the_model_back(tmp_path: Path) -> None:
    made = tiny.trainer(full("llama"), tmp_path)

    def run() -> None:
        with FastPlugCallback() as callback:
            made.add_callback(callback)  # after the constructor: only the block sees the interrupt
            made.add_callback(Interrupt(KeyboardInterrupt))
            made.train()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not tiny.patched(made.model)


def test_evaluate_and_predict_alone_are_patched(tmp_path: Path) -> None:
    plain = tiny.trainer(full("llama"), tmp_path, compute_metrics=accuracy)
    fused = tiny.trainer(full("llama"), tmp_path, FastPlugCallback(), compute_metrics=accuracy)
    assert tiny.patched(fused.model)
    ours, theirs = fused.evaluate(), plain.evaluate()
    for key in ("eval_loss", "eval_accuracy", "eval_sum"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    assert fused.predict(tiny.rows(4)).predictions.shape == (4, 12, models.VOCABULARY)
    assert not any(key.startswith("fastplug") for key in ours)


def test_the_trainer_still_reads_the_signature(tmp_path: Path) -> None:
    fresh = tiny.trainer(full("llama"), tmp_path)
    model = full("llama")
    fastplug.apply(model)
    data = [{**row, "text": "dropped by remove_unused_columns"} for row in tiny.rows(8)]
    made = tiny.trainer(model, tmp_path, FastPlugCallback(), max_steps=1)
    assert made.model_accepts_loss_kwargs == fresh.model_accepts_loss_kwargs is True
    assert (made.label_names, made.can_return_loss) == (fresh.label_names, fresh.can_return_loss)
    for which in (made, fresh):
        which._set_signature_columns_if_needed()
    assert made._signature_columns == fresh._signature_columns
    made.train_dataset = data
    made.train()


def foreign_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TakeOver(TrainerCallback):
    """What Liger does inside train(), after on_init_end: a forward on the instance."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        mlp = model.model.layers[0].mlp
        mlp.forward = types.MethodType(foreign_forward, mlp)


def test_sites_that_liger_takes_over_are_let_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = tiny.trainer(full("llama"), tmp_path)
    plain.train()
    with caplog.at_level(logging.INFO, "fastplug"):
        made = tiny.trainer(full("llama"), tmp_path, FastPlugCallback(), TakeOver())
        made.train()
    first, second = made.model.model.layers
    assert [KEY in m.__dict__ for m in (first, first.mlp, first.self_attn)] == [False, False, True]
    assert KEY in second.__dict__
    assert f"its forward was replaced on the instance by {__name__}" in caplog.text
    assert not fastplug.report(made.model).fallbacks
    assert tiny.losses(made) == pytest.approx(tiny.losses(plain), rel=1e-5)


LIGER = """
import types
def swiglu(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
def _apply_liger_kernel_to_instance(model, **kwargs):
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(swiglu, layer.mlp)
"""


def test_use_liger_kernel_keeps_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Liger replaces forwards on instances, as this stand-in for it does."""
    fake = types.ModuleType("liger_kernel.transformers")
    exec(LIGER, fake.__dict__)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    plain = tiny.trainer(adapted("llama"), tmp_path, use_liger_kernel=True)
    plain.train()
    with caplog.at_level(logging.INFO, "fastplug"):
        made = tiny.trainer(adapted("llama"), tmp_path, FastPlugCallback(), use_liger_kernel=True)
        made.train()
    assert "refused 2 x mlp: its forward was replaced on the instance by liger_kernel.transformers" in caplog.text
    report = fastplug.report(made.model)
    assert {d.role for d in report.patched} >= {"attention", "lm_head_loss"}
    assert not report.fallbacks
    assert tiny.losses(made) == pytest.approx(tiny.losses(plain), rel=1e-5)
    with pytest.raises(StrictError, match=r"liger_kernel\.transformers"):
        tiny.trainer(adapted("llama"), tmp_path, FastPlugCallback(strict=True), use_liger_kernel=True).train()


def test_a_hook_does_not_hide_a_replaced_forward() -> None:
    model = full("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(foreign_forward, mlp)
    mlp.register_forward_pre_hook(lambda module, args: None)
    refused = {d.name: d.reason for d in fastplug.apply(model).report.refused}
    assert refused["model.layers.0.mlp"] == f"its forward was replaced on the instance by {__name__}"


def test_a_bound_copy_of_the_own_forward_is_put_aside() -> None:
    model = full("llama")
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = own
    batch = models.batch()
    applied = fastplug.apply(model)
    model(**batch).loss.backward()
    assert "forward" not in layer.__dict__
    assert not applied.report.fallbacks
    applied.undo()
    assert layer.__dict__["forward"] == own


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'kernels'"):
        FastPlugCallback(kernel="triton")
    with pytest.raises(OptionError, match="did you mean 'export'"):
        FastPlugCallback(exports="merged_16bit")
    with pytest.raises(OptionError, match="undo_at_end must be true or false"):
        FastPlugCallback(undo_at_end="no")  # type: ignore[arg-type]


def test_two_callbacks_are_one_too_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = FastPlugCallback(), FastPlugCallback(disable=["mlp"])
    made = tiny.trainer(full("llama"), tmp_path, *callbacks, max_steps=1)
    made.train()
    assert caplog.text.count("two FastPlugCallbacks; the second does nothing, remove it") == 1
    assert fastplug.report(made.model).options["disable"] == ()
    assert len(made.model._forward_pre_hooks) == 0
    assert len(tiny.losses(made, TOKENS_PER_SECOND)) == 1


class AddLate(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.trainer.add_callback(FastPlugCallback())

    trainer: Any = None


def test_added_in_mid_training_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    late = AddLate()
    made = tiny.trainer(full("llama"), tmp_path, late)
    late.trainer = made
    made.train()
    assert caplog.text.count("was added after training began") == 1
    assert not tiny.patched(made.model)
    made.train()
    assert tiny.patched(made.model)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": F.mse_loss(self.linear(x)[..., 0], labels)}


def test_a_model_that_is_no_transformer_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data: Any = [{"x": torch.randn(3), "labels": torch.tensor(1.0)} for _ in range(8)]
    with caplog.at_level(logging.INFO, "fastplug"):
        made = tiny.trainer(Regression(), tmp_path, FastPlugCallback(), data=data)
        made.train()
    assert "no family row matches" in caplog.text
    with pytest.raises(StrictError, match="nothing was patched"):
        tiny.trainer(Regression(), tmp_path, FastPlugCallback(strict=True), data=data)


def test_the_counter_pickles_into_nothing() -> None:
    counter = TokenCounter(Meter())
    assert pickle.loads(pickle.dumps(counter))(None, (), {}) is None
