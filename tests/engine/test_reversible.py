"""Patching is reversible and leaves no trace: in the model, in memory, in files."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.manager import manager
from fastplug.patching import engine
from fastplug.patching.sites import KEY
from tests import models
from tests.engine.step import assert_equal, patched, step

KINDS = {
    "plain": lambda: models.plain("qwen3"),
    "lora": lambda: models.lora(models.plain("llama"), lora_dropout=0.1, modules_to_save=["lm_head"]),
    "nf4": lambda: models.qlora("qwen2"),
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything an undo has to bring back: classes, attributes by identity, hooks, and the bits of every tensor."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}: class"] = type(module)
        state[f"{name}: attributes"] = {key: id(value) for key, value in module.__dict__.items()}
        state[f"{name}: hooks"] = [list(module.__dict__[key]) for key in module.__dict__ if key.endswith("_hooks")]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[f"{name}: tensor"] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad)
        state[f"{name}: bits"] = tensor.detach().clone()
    return state


def assert_same_state(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert after.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[key], value), key
        else:
            assert after[key] == value, key


def bindings(model: nn.Module) -> dict[str, int]:
    return {name: id(module.__dict__[KEY]) for name, module in model.named_modules() if KEY in module.__dict__}


@pytest.mark.parametrize("kind", KINDS)
def test_undo_restores_everything(kind: str) -> None:
    model = KINDS[kind]()
    step(model, models.batch())
    before = snapshot(model)
    applied = fastplug.apply(model)
    assert bindings(model)
    tensors = {key for key in before if key.endswith((": tensor", ": bits"))}
    now = snapshot(model)
    assert_same_state({key: now[key] for key in tensors}, {key: before[key] for key in tensors})
    reference = step(copy.deepcopy(model), models.batch())
    applied.undo()
    assert_same_state(snapshot(model), before)
    assert not bindings(model)
    assert_equal(step(model, models.batch()), reference)
    applied.undo()  # once more is nothing
    assert [type(module) for module in model.modules()] == [type(module) for module in KINDS[kind]().modules()]


def test_undo_after_steps_frees_everything() -> None:
    model = KINDS["lora"]()
    step(model, models.batch(), output_hidden_states=True)  # transformers installs its recorders at the first request
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    fastplug.apply(model)
    for _ in range(2):
        step(model, models.batch(), output_hidden_states=True)
    traces = [weakref.ref(module.__dict__[KEY]) for module in model.modules() if KEY in module.__dict__]
    traces += [weakref.ref(traces[0]().runtime), weakref.ref(traces[0]().report)]  # type: ignore[union-attr]
    fastplug.undo(model)
    gc.collect()
    assert [trace() for trace in traces] == [None] * len(traces)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes


def test_a_step_keeps_no_tensor_alive() -> None:
    """After a step and zero_grad, nothing but the model's own tensors is left."""
    model = patched(KINDS["nf4"]())
    step(model, models.batch())
    model.zero_grad(set_to_none=True)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}
    step(model, models.batch())
    model.zero_grad(set_to_none=True)
    gc.collect()
    after = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and id(thing) not in before]
    assert [tuple(thing.shape) for thing in after] == []


def test_a_patched_model_goes_when_it_is_dropped() -> None:
    model = KINDS["lora"]()
    applied: Any = fastplug.apply(model)
    step(model, models.batch())
    trace = weakref.ref(model)
    del model, applied
    gc.collect()
    assert trace() is None


def test_apply_twice_changes_nothing() -> None:
    model = KINDS["lora"]()
    first = fastplug.apply(model)
    before, report = snapshot(model), first.report
    second = fastplug.apply(model)
    assert_same_state(snapshot(model), before)
    assert second.report == report
    second.undo()
    assert not bindings(model)


def test_apply_again_with_other_options_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = KINDS["lora"]()
    fastplug.apply(model)
    before = snapshot(model)
    again = fastplug.apply(model, disable="mlp")
    assert_same_state(snapshot(model), before)
    assert again.options.disable == ()
    assert "fastplug.undo" in caplog.text


def test_apply_covers_what_is_new() -> None:
    model = KINDS["lora"]()
    fastplug.apply(model)
    layers = model.get_base_model().model.layers
    fresh = copy.deepcopy(layers[0])
    fastplug.undo(fresh)
    layers[0] = fresh
    old = bindings(model)
    fastplug.apply(model)
    assert old.items() < bindings(model).items()
    assert len(fastplug.report(model).patched) == len(bindings(model))


def test_from_the_model_alone_and_on_copies() -> None:
    model = KINDS["lora"]()
    fastplug.apply(model)
    step(model, models.batch())
    twin = copy.deepcopy(model)
    assert bindings(twin).keys() == bindings(model).keys()
    assert fastplug.report(twin) == fastplug.report(model)
    report = fastplug.undo(twin)
    assert report is not None
    assert len(report.patched) == len(bindings(model)) > 0
    assert not bindings(twin)
    assert fastplug.undo(twin) is None
    with pytest.raises(fastplug.ModelError, match="not patched"):
        fastplug.report(twin)
    assert_equal(step(twin, models.batch()), step(model, models.batch()))
    # The copy's end is not the original's, and parts answer for themselves.
    assert fastplug.report(model).patched
    inner = model.get_base_model()
    assert fastplug.report(inner) == fastplug.report(model)
    fastplug.undo(inner)
    assert not bindings(model)
    with pytest.raises(fastplug.ModelError, match="not patched"):
        fastplug.report(model)


def test_shallow_copies_of_modules() -> None:
    model = KINDS["plain"]()
    fastplug.apply(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 64, requires_grad=True)
    assert torch.equal(copy.copy(mlp)(x), mlp(x))


@pytest.mark.parametrize("fail_at", [0, 3, 6])
def test_a_failing_bind_leaves_nothing(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    model = KINDS["lora"]()
    before = snapshot(model)
    calls = []

    def failing(module: nn.Module, *args: Any) -> None:
        if len(calls) == fail_at:
            raise MemoryError("planted")
        calls.append(module)
        original(module, *args)

    original = engine.bind
    monkeypatch.setattr(engine, "bind", failing)
    with pytest.raises(MemoryError, match="planted"):
        fastplug.apply(model)
    assert_same_state(snapshot(model), before)
    with pytest.raises(fastplug.ModelError, match="not patched"):
        fastplug.report(model)


def test_a_plugin_that_fails_after_apply_leaves_nothing() -> None:
    """Its error reaches the caller, who has no handle then, so the model is given back."""

    class Broken:
        @fastplug.hookimpl
        def fastplug_after_apply(self, applied: fastplug.Applied) -> None:
            raise RuntimeError("planted")

    model = KINDS["lora"]()
    before = snapshot(model)
    plugins = manager(True)._manager
    plugin = Broken()
    plugins.register(plugin)
    try:
        with pytest.raises(RuntimeError, match="planted"):
            fastplug.apply(model)
    finally:
        plugins.unregister(plugin)
    assert_same_state(snapshot(model), before)
    with pytest.raises(fastplug.ModelError, match="not patched"):
        fastplug.report(model)


def test_strict() -> None:
    good = KINDS["lora"]()
    assert fastplug.apply(good, strict=True).report.patched
    refusing = KINDS["lora"]()
    refusing.get_base_model().model.layers[1].mlp.act_fn = nn.Tanh()
    before = snapshot(refusing)
    with pytest.raises(fastplug.StrictError, match=r"layers\.1.*Tanh.*disable="):
        fastplug.apply(refusing, strict=True)
    assert_same_state(snapshot(refusing), before)
    with pytest.raises(fastplug.StrictError, match=r"nothing was patched.*no family row"):
        fastplug.apply(nn.Sequential(nn.Linear(3, 3)), strict=True)


# --- files ------------------------------------------------------------------------------------------------------------

LOADER = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("fastplug"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())
import pickle, torch
folder = sys.argv[1]
for kind in sys.argv[2:]:
    tokens = torch.arange(3, 29).view(2, 13)
    expected = torch.load(f"{folder}/{kind}.expected", weights_only=True)
    with open(f"{folder}/{kind}.pickle", "rb") as file:
        pickled = pickle.load(file)
    for model in (torch.load(f"{folder}/{kind}.pt", weights_only=False), pickled):
        assert not any("fastplug" in key for module in model.modules() for key in module.__dict__)
        assert not any(hasattr(type(module), "_fastplug_base") for module in model.modules())
        assert torch.equal(model.train()(input_ids=tokens).logits, expected), kind
assert not any(name.startswith("fastplug") for name in sys.modules)
print("loaded")
"""


def test_pickles_load_without_fastplug(tmp_path: Path) -> None:
    tokens = torch.arange(3, 29).view(2, 13)
    kinds = {**KINDS, "lora": lambda: models.lora(models.plain("llama"), modules_to_save=["lm_head"])}
    for kind, make in kinds.items():
        model = make()
        with torch.no_grad():
            torch.save(model(input_ids=tokens).logits, tmp_path / f"{kind}.expected")
        fastplug.apply(model)
        step(model, models.batch())
        model.zero_grad()
        torch.save(model, tmp_path / f"{kind}.pt")
        (tmp_path / f"{kind}.pickle").write_bytes(pickle.dumps(model))
        assert bindings(model)  # saving changed nothing
        again = pickle.loads(pickle.dumps(model))
        assert [type(m) for m in again.modules()] == [
            getattr(type(m), "_fastplug_base", type(m)) for m in model.modules()
        ]
    (tmp_path / "load.py").write_text(LOADER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "load.py"), str(tmp_path), *kinds],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loaded" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_the_same(kind: str) -> None:
    model = KINDS[kind]()
    before = model.state_dict()
    fastplug.apply(model)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    if kind != "nf4":  # bitsandbytes refuses its own state_dict
        model.load_state_dict(before)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in KINDS[kind]().named_parameters()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """save_pretrained of a model, of a PEFT model, and PEFT's config without a task type, which names classes."""
    model = KINDS[kind]()
    if kind != "plain":
        model.peft_config["default"].task_type = None
    model.save_pretrained(tmp_path / "before")
    fastplug.apply(model)
    step(model, models.batch())
    model.save_pretrained(tmp_path / "after")
    expected = files(tmp_path / "before")
    assert any(name.endswith(".safetensors") for name in expected)
    assert files(tmp_path / "after") == expected
    if kind != "plain":
        import peft

        fastplug.undo(model)
        reloaded = peft.PeftModel.from_pretrained(model.unload(), tmp_path / "after", is_trainable=True)
        assert len([p for p in reloaded.parameters() if p.requires_grad])


def test_a_checkpoint_resumes_in_a_patched_model(tmp_path: Path) -> None:
    """State of model and optimizer saved from a patched run continues an unpatched one, and the other way round."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
        losses = []
        for seed in seeds:
            loss = model(**models.batch(seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def build(is_patched: bool) -> tuple[Any, torch.optim.Optimizer]:
        model = models.lora(models.plain("llama"))
        if is_patched:
            fastplug.apply(model)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    expected = run(*build(False), range(6))  # type: ignore[arg-type]
    for first in (True, False):
        model, optimizer = build(first)
        assert run(model, optimizer, range(3)) == pytest.approx(expected[:3], rel=1e-5)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        model, optimizer = build(not first)
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        assert run(model, optimizer, range(3, 6)) == pytest.approx(expected[3:], rel=1e-5)
