"""``fastplug.verify``: finds planted errors, lets right models pass, and leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastplug
from fastplug.ops.glu import reference as glu
from fastplug.ops.lora.group import Group
from fastplug.ops.rms_norm import reference as rms_norm
from fastplug.patching.sites import KEY
from fastplug.verifying import VerifyError
from tests import models

BLOCKS = 128  # an inner width of whole 4-bit blocks: bitsandbytes' CPU decoder is wrong for other widths


WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny(kind: str, **config: Any) -> Any:
    """One of the kinds of model that people train, on the GPU where there is one."""
    dtype = torch.bfloat16 if "bf16" in kind else torch.float16 if "fp16" in kind else torch.float32
    family = kind.split()[0]
    if "qlora" in kind:
        base = models.plain(family, intermediate_size=BLOCKS, **config).to(WHERE, dtype)
        return models.lora(models.quantized(base, compute_dtype=dtype))
    model = models.plain(family, **config).to(WHERE, dtype)
    return models.lora(model) if "lora" in kind else model


@pytest.mark.parametrize(
    "kind",
    [
        "llama lora fp32", "qwen3 lora fp32", "llama qlora fp32", "qwen3 qlora fp32", "qwen2 full fp32",
        "mistral lora bf16", "qwen3 lora bf16", "llama qlora bf16", "llama full bf16", "llama lora fp16",
    ],
)  # fmt: skip
def test_a_right_model_passes(kind: str) -> None:
    result = fastplug.verify(tiny(kind))
    assert result.ok, str(result)
    assert result.dead == ()
    kinds = {row.kind for row in result.rows}
    assert kinds == {"loss", "output", "gradient"}
    judged = [row for row in result.rows if row.ratio is not None]
    assert bool(judged) == ("fp32" not in kind)
    result.raise_if_failed()


@pytest.mark.parametrize("kind", ["llama lora fp32", "llama full fp32"])
def test_every_layer_output_and_every_trainable_gradient_has_a_row(kind: str) -> None:
    model = tiny(kind)
    rows = {(row.name, row.kind) for row in fastplug.verify(model).rows}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "embed_tokens" not in name:
            assert (name, "gradient") in rows
    outputs = [name for name, kind_ in rows if kind_ == "output"]
    assert len(outputs) == model.config.num_hidden_layers


def wrong_norm(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = rms_norm.backward

    def backward(*args: Any, dh: torch.Tensor | None = None, **kwargs: Any) -> Any:
        dx, dweight = right(*args, **kwargs)
        return dx * factor if dh is None else dx * factor + dh, dweight

    monkeypatch.setattr(rms_norm, "backward", backward)


def wrong_glu(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = glu.backward

    def backward(d: Any, gate: Any, up: Any, activation: Any, d_gate: Any, d_up: Any, hidden: Any = None) -> None:
        right(d, gate, up, activation, d_gate, d_up, hidden)
        d_gate.mul_(factor)

    monkeypatch.setattr(glu, "backward", backward)


def wrong_lora_b(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = Group.parameter_gradients

    def parameter_gradients(self: Group, *args: Any) -> Any:
        grads = right(self, *args)
        return [None if g is None else g * factor if i % 4 == 3 else g for i, g in enumerate(grads)]

    monkeypatch.setattr(Group, "parameter_gradients", parameter_gradients)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("plant", [wrong_norm, wrong_glu, wrong_lora_b])
def test_a_gradient_that_is_one_percent_off_is_found(
    plant: Callable[..., None], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(f"llama lora {dtype}")
    fastplug.apply(model, kernels="reference")  # the planted errors are in the references
    assert fastplug.verify(model).ok
    plant(monkeypatch, 1.01)
    result = fastplug.verify(model)
    assert not result.ok
    assert {row.kind for row in result.failed} >= {"gradient"}
    with pytest.raises(VerifyError, match="MISMATCH"):
        result.raise_if_failed()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_lost_gradient_and_a_nan_are_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(f"llama lora {dtype}")
    fastplug.apply(model, kernels="reference")
    right = Group.parameter_gradients

    def lost(self: Group, *args: Any) -> Any:
        grads = right(self, *args)
        return [None if i == 2 and len(self.projections) == 3 else g for i, g in enumerate(grads)]

    monkeypatch.setattr(Group, "parameter_gradients", lost)
    result = fastplug.verify(model)
    assert not result.ok
    q_proj = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.default.weight" for i in range(2)]
    assert list(result.dead) == q_proj

    wrong_lora_b(monkeypatch, float("nan"))
    result = fastplug.verify(model)
    assert any("not finite" in row.reason for row in result.failed)


def test_a_tensor_that_is_dead_in_both_runs_is_named() -> None:
    model = tiny("llama lora fp32")
    model.register_parameter("forgotten", torch.nn.Parameter(torch.ones(3)))
    result = fastplug.verify(model)
    assert result.ok
    assert result.dead == ("forgotten",)
    assert "forgotten" in str(result)


def test_a_new_adapter_is_randomised_and_restored() -> None:
    """With B = 0 the gradient of A is zero: an error in it could not be seen, and every A would count as dead."""
    import peft

    model = peft.get_peft_model(models.plain(), peft.LoraConfig(r=4, target_modules="all-linear"))
    zeros = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    pointers = {name: p.data_ptr() for name, p in zeros.items()}
    result = fastplug.verify(model)
    assert result.ok
    assert result.dead == ()
    assert any(f"{len(zeros)} LoRA tensors" in note for note in result.notes)
    for name, p in zeros.items():
        assert not p.any()
        assert p.data_ptr() == pointers[name]


class Trace:
    """All that a verification could leave behind."""

    def __init__(self, model: Any) -> None:
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.classes = [type(module) for module in model.modules()]
        self.keys = [set(module.__dict__) for module in model.modules()]
        self.bindings = [module.__dict__.get(KEY) for module in model.modules()]
        self.fallbacks = [copy.copy(b.fallbacks) for b in self.bindings if b]
        self.modes = [module.training for module in model.modules()]
        self.hooks = [len(module._forward_hooks) for module in model.modules()]
        self.checkpointing = [module.__dict__.get("gradient_checkpointing") for module in model.modules()]
        self.dropout = [module.__dict__.get("p") for module in model.modules()]
        self.config = model.config.to_dict()
        self.grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        self.random = torch.get_rng_state(), random.getstate(), torch.get_float32_matmul_precision()

    def assert_same(self, other: Trace) -> None:
        assert all(torch.equal(value, other.state[name]) for name, value in self.state.items())
        for name in ("classes", "keys", "fallbacks", "modes", "hooks", "checkpointing", "dropout", "config"):
            assert getattr(self, name) == getattr(other, name), name
        assert all(mine is theirs for mine, theirs in zip(self.bindings, other.bindings, strict=True))
        for (mine, value), (theirs, _) in zip(self.grads, other.grads, strict=True):
            assert mine is theirs
            assert mine is None or torch.equal(mine, value)
        assert torch.equal(self.random[0], other.random[0])
        assert self.random[1:] == other.random[1:]


def used_model(patched: bool) -> Any:
    """In a mixed mode, with gradients, checkpointing and dropout."""
    model = models.lora(models.plain("qwen3"), lora_dropout=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if patched:
        fastplug.apply(model)
    model(**models.batch()).loss.backward()
    model.eval()
    model.base_model.model.model.layers[1].train()
    return model


@pytest.mark.parametrize("patched", [False, True])
def test_no_trace_is_left(patched: bool) -> None:
    model = used_model(patched)
    before = Trace(model)
    assert fastplug.verify(model, models.padded("right")).ok
    before.assert_same(Trace(model))
    if patched:
        fastplug.undo(model)
    else:
        with pytest.raises(fastplug.ModelError, match="not patched"):
            fastplug.report(model)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("call", [1, 2, 5, 9, 12])
def test_no_trace_is_left_after_an_exception(patched: bool, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention raises at its n-th call: in the original run, in the patched one, in a single layer."""
    model = used_model(patched)
    before = Trace(model)
    count = 0
    right = torch.nn.functional.scaled_dot_product_attention

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt
        return right(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", failing)
    with pytest.raises(KeyboardInterrupt):
        fastplug.verify(model)
    monkeypatch.undo()
    before.assert_same(Trace(model))
    assert fastplug.verify(model).ok


def test_optimizers_inside_the_backward_do_not_step() -> None:
    model = tiny("llama full fp32")
    steps = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(steps.append)
    assert fastplug.verify(model).ok
    assert steps == []
    batch = {name: value.to(WHERE) for name, value in models.batch().items()}
    model(**batch).loss.backward()
    assert len(steps) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dropout(dtype: str) -> None:
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = models.lora(models.plain(attention_dropout=0.1).to(WHERE, torch_dtype), lora_dropout=0.2)
    result = fastplug.verify(model)
    assert result.ok, str(result)
    assert any("attention dropout was off" in note for note in result.notes) == (dtype == "bf16" or WHERE == "cuda")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny("llama lora fp32")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    result = fastplug.verify(model)
    assert result.ok, str(result)
    assert result.dead == ()


def test_under_autocast() -> None:
    model = tiny("llama lora fp32")
    with torch.autocast(WHERE, torch.bfloat16):
        result = fastplug.verify(model)
    assert result.ok, str(result)
    assert any(row.ratio for row in result.rows)


def test_calls_that_were_not_fused_are_noted() -> None:
    """4-bit weights that compute in fp32 under a bf16 residual stream, without autocast: precisions mix there."""
    base = models.plain(intermediate_size=BLOCKS).to(WHERE, torch.bfloat16)
    model = models.lora(models.quantized(base, compute_dtype=torch.float32))
    result = fastplug.verify(model)
    assert any("original forward in" in note for note in result.notes)


@pytest.mark.parametrize(
    ("layers", "found"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3]), ([1, -1], [1, 3])]
)
def test_layers(layers: Any, found: list[int]) -> None:
    result = fastplug.verify(tiny("llama lora bf16", num_hidden_layers=4), layers=layers)
    assert result.ok, str(result)
    names = [row.name for row in result.rows if row.kind == "output"]
    assert names == [f"base_model.model.model.layers.{index}" for index in found]


def test_a_batch_of_the_user() -> None:
    model = tiny("mistral lora fp32", window=True)
    given = models.padded("left")
    before = {name: value.clone() for name, value in given.items()}
    assert fastplug.verify(model, given).ok
    assert all(torch.equal(given[name], value) for name, value in before.items())
    del given["labels"]
    result = fastplug.verify(model, given)
    assert result.ok
    assert any("no labels" in note for note in result.notes)


def test_a_model_in_which_nothing_is_patched() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    result = fastplug.verify(model)
    assert result.ok
    assert result.rows == ()
    assert "nothing to compare" in result.notes[0]


def test_bad_input() -> None:
    model = tiny("llama lora fp32")
    with pytest.raises(fastplug.ModelError, match=r"needs a torch\.nn\.Module, not str"):
        fastplug.verify("model")  # type: ignore[arg-type]
    with pytest.raises(fastplug.OptionError, match="tolerance must be at least 1"):
        fastplug.verify(model, tolerance=0.5)
    with pytest.raises(fastplug.OptionError, match="there is no layer 7"):
        fastplug.verify(model, layers=[7])
    with pytest.raises(fastplug.ModelError, match="neither labels nor input_ids"):
        fastplug.verify(model, {"inputs_embeds": torch.zeros(1, 4, 64)})
    with torch.device("meta"), pytest.raises(fastplug.ModelError, match="meta device"):
        fastplug.verify(torch.nn.Linear(2, 2))


def test_the_result_can_be_read() -> None:
    from rich.console import Console

    result = fastplug.verify(tiny("llama lora bf16"))
    console = Console(width=200, record=True)
    console.print(result.table())
    text = console.export_text()
    assert "layers.0.self_attn.q_proj.lora_A" in text
    assert "ratio" in text
    short = result.table(worst=3)
    assert short.row_count == 3
    assert "\n" not in str(result)
    with pytest.raises(AttributeError):
        result.rows = ()  # type: ignore[misc]
