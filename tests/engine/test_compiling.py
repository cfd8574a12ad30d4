"""Kernels that are compiled before the first layer runs: all of them, in threads, and with nothing left behind."""

from __future__ import annotations

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastplug
from fastplug.graphs import compiling, replay
from fastplug.ops import ahead
from fastplug.patching.bind import REMEMBERED
from fastplug.patching.sites import KEY
from tests import models
from tests.ops.test_launch_table import run

pytest.importorskip("peft")
pytest.importorskip("triton")

STEPS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora": {"lora_dropout": 0.3}},
    "qdora": {"base": "qlora", "lora": {"use_dora": True}},
    "qlora": {"base": "qlora"},
    "kept weights": {"base": "qlora", "options": {"base_weights": "kept"}},
    "fp8": {"options": {"compute": "fp8", "fp8_weights": "kept"}},
    "checkpointed": {"checkpointed": True},
}


def build(device: torch.device, base: str = "lora", lora: dict[str, Any] | None = None, **case: Any) -> Any:
    """One layer, in bf16 where products are in FP8."""
    plain = models.plain(num_hidden_layers=1)
    model = models.lora(models.quantized(plain) if base == "qlora" else plain, **lora or {})
    if "compute" in case.get("options", {}):
        model = model.to(torch.bfloat16)
    return model.to(device).train()


def gradients(model: Any, device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    batch = {name: value.to(device) for name, value in models.batch(1, 16).items()}
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "random": torch.rand(4, device=device), **found}


@pytest.fixture
def noted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that were compiled ahead, in Triton's interpreter, which compiles none."""
    seen: list[str] = []

    def note(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        seen.append(self.fn.__name__)

    if device.type == "cpu":
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter.InterpretedFunction, "warmup", note, raising=False)
        monkeypatch.setattr(replay, "possible", lambda device: True)
    return seen


@pytest.mark.interpreter
@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_left_behind(name: str, device: torch.device, noted: list[str], deterministic: None) -> None:
    """What is computed ahead is garbage: neither weights that are kept nor DoRA's norms nor random numbers are its."""
    case = STEPS[name]
    model = build(device, **case)
    if case.get("checkpointed"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    twin = copy.deepcopy(model)
    options = {"kernels": "triton", "graphs": "off", **case.get("options", {})}
    fastplug.apply(twin, **options)
    fastplug.apply(model, **options)
    shared = replay._shared(model.get_base_model().model.layers[0].__dict__[KEY])
    shared.ahead = False
    expected = [gradients(model, device) for _ in range(2)]
    assert not shared.compiled
    found = [gradients(twin, device) for _ in range(2)]
    (layer,) = twin.get_base_model().model.layers
    assert len(replay._shared(layer.__dict__[KEY]).compiled) == 1
    assert REMEMBERED[layer]._changes == REMEMBERED[model.get_base_model().model.layers[0]]._changes  # read no oftener
    if device.type == "cpu":
        assert {"_forward_kernel", "_backward_kernel"} <= set(noted)
    for mine, theirs in zip(found, expected):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(mine[key], value), key


def test_what_does_not_compile_ahead_is_left_to_the_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "possible", lambda device: True)
    model = models.lora(models.plain()).to(device)
    truth = gradients(copy.deepcopy(model), device)

    def fail(*args: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(compiling.KeptGraph, "warm_up", fail)
    fastplug.apply(model, graphs="off")
    found = gradients(model, device)
    assert len(replay._shared(model.get_base_model().model.layers[0].__dict__[KEY]).compiled) == 1
    assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-5) for name, value in truth.items())


def test_other_threads_launch_as_ever() -> None:
    if not ahead.possible():
        pytest.skip("this Triton does not compile in threads")
    seen: list[bool] = []
    with ahead.compiling():
        thread = threading.Thread(target=lambda: seen.append(ahead.going()))
        thread.start()
        thread.join()
        x = torch.ones(2, requires_grad=True)
        y = x * 2
        y.register_hook(lambda grad: seen.append(ahead.going()))
        y.sum().backward()
    assert seen == [False, True]
    assert not ahead.going()


@pytest.mark.parametrize("broken", [False, True])
def test_threads_build_what_launches_a_kernel_too(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """Triton 3.6 has a C compiler do that, at the first launch."""
    if not ahead.possible():
        pytest.skip("this Triton does not compile in threads")
    import triton

    threads: list[str] = []

    class Driver:
        @staticmethod
        def launcher_cls(source: str, metadata: str) -> None:
            threads.append(threading.current_thread().name)
            assert (source, metadata) == ("source", "metadata")
            if broken:
                raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver))
    mode = ahead._with_launchers(triton.AsyncCompileMode)
    names = [*inspect.signature(triton.AsyncCompileMode.submit).parameters][3:]  # what the compiler calls afterwards
    done: list[str] = []
    with ThreadPoolExecutor(2, "ours") as workers, mode(workers, ignore_errors=True) as active:
        for name in ("a", "b"):
            kernel = SimpleNamespace(src="source", metadata="metadata", name=name)
            active.submit(name, lambda kernel=kernel: kernel, *([lambda kernel: done.append(kernel.name)] * len(names)))
        active.submit("c", lambda: 1 / 0, *([lambda kernel: done.append("c")] * len(names)))
    assert {name[:4] for name in threads} == {"ours"}
    assert len(threads) == 2
    assert {"a", "b"} <= set(done)


def test_every_kernel_of_a_layer_is_compiled_ahead(tmp_path: Path) -> None:
    """After it only those of the head are new, and of the last norm, whose input goes nowhere else."""
    pytest.importorskip("bitsandbytes")
    lora, qlora = run("tests.engine.kernels_ahead", tmp_path, "lora,qlora")
    assert lora["kinds"] == qlora["kinds"] == 1
    assert {"rms_norm._forward_kernel", "rms_norm._backward_kernel", "rope._forward_kernel"} <= set(lora["early"])
    assert set(lora["late"]) <= {"logprobs._logprobs_kernel", "rms_norm._forward_kernel", "rms_norm._backward_kernel"}
    assert qlora["early"] == ["nf4._word_kernel"]
    assert not qlora["late"]
