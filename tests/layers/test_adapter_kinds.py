"""Kinds of LoRA adapters: each fused, or left to PEFT with the reason, and equal to PEFT in either case."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import fastplug
from fastplug.layers import quantize_
from tests import models
from tests.engine.step import assert_equal, assert_parity, fallbacks, patched, step

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def batch():
    return models.batch()


def several(family="qwen2", first=None, second=None, quantized=False):
    """A model with two active adapters of different ranks."""
    base = models.plain(family)
    model = models.lora(quantize_(base) if quantized else base, **(first or {}))
    models.add(model, "second", r=3, **(second or {}))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "second",
    [
        {},
        {"lora_alpha": 9},
        {"lora_alpha": 5},
        {"target_modules": ["q_proj", "down_proj"]},
        {"lora_bias": True},
        {"use_rslora": True},
    ],
    ids=str,
)
def test_several_active_adapters(batch, second, quantized):
    model = several(second=second, quantized=quantized)
    twin = assert_parity(model, batch)
    for part in (model, twin):
        part.base_model.set_adapter("second")
    assert_equal(step(twin, batch), step(model, batch))
    assert not fallbacks(twin)


def test_several_of_which_one_is_frozen(batch):
    model = several()
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(False)
    assert_parity(model, batch)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"lora_dropout": 0.1}, "2 active adapters that drop"), ({"use_dora": True}, "2 active adapters, with DoRA")],
)
def test_several_that_are_left_to_peft(batch, options, reason):
    model = several(first=options)
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    assert any(reason in str(decision.reason) for decision in fastplug.report(twin).refused)
    assert_equal(step(twin, batch), step(model, batch))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases of the base
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"target_modules": ["v_proj", "o_proj", "up_proj"]}])
def test_lora_bias(batch, family, options):
    assert_parity(models.lora(models.plain(family), lora_bias=True, **options), batch)


def test_lora_bias_of_a_trained_base_bias(batch):
    assert_parity(models.lora(models.plain("qwen2"), lora_bias=True, bias="all"), batch)


def test_mixed_batches_run_as_peft_runs_them():
    model = models.lora(models.plain())
    models.add(model, "second", r=3)
    twin = patched(model)
    ids = models.batch(3)["input_ids"]
    names = ["default", "second", "__base__"]
    outputs = [part.eval()(ids, adapter_names=names).logits.detach() for part in (model, twin)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert any("pre-hook" in reason for reason in fallbacks(twin))


class OnTheCPU(TorchFunctionMode):
    """Tensors that go to ``cuda`` stay: PEFT's LoftQ computes there and asks nobody."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def stay(value):
            return "cpu" if str(value).startswith("cuda") and isinstance(value, (str, torch.device)) else value

        return function(*map(stay, args), **{name: stay(value) for name, value in (kwargs or {}).items()})


INITIAL = ["pissa", "pissa_niter_4", "olora", "loftq", "gaussian", "eva", "orthogonal"]


@pytest.mark.parametrize("kind", INITIAL)
def test_initialisations(batch, kind):
    """They change A and B, some the base weight too: what was initialised is what the fused path reads."""
    options = {"init_lora_weights": kind, "r": 4, "lora_alpha": 4, "target_modules": list(models.LINEARS)}
    if kind == "loftq":
        pytest.importorskip("scipy")
        pytest.importorskip("bitsandbytes")
        options["loftq_config"] = peft.LoftQConfig(loftq_bits=4)
    if kind == "eva":
        options["eva_config"] = peft.EvaConfig(rho=1.0)
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        base = models.plain()
        weight = base.model.layers[0].mlp.up_proj.weight.detach().clone()
        with contextlib.nullcontext() if torch.cuda.is_available() else OnTheCPU():
            model = peft.get_peft_model(base, config)
    except ValueError as error:
        pytest.skip(f"this PEFT does not know it: {error}")
    if kind == "eva":
        loader = [models.batch(2, 13, seed) for seed in range(3)]
        for rows in loader:
            rows.pop("labels")
        peft.initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    changed = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(changed, weight) == (kind in ("gaussian", "eva", "orthogonal"))
    twin = assert_parity(model.train(), batch)
    optimizers = [torch.optim.SGD([p for p in part.parameters() if p.requires_grad], 0.05) for part in (model, twin)]
    for _ in range(2):
        for part, optimizer in zip((model, twin), optimizers):
            step(part, batch)
            optimizer.step()
    assert_equal(step(twin, batch), step(model, batch), bound=1e-4)


def test_pissa_on_a_residual_that_is_quantized_afterwards(batch):
    model = peft.get_peft_model(
        models.plain(), peft.LoraConfig(init_lora_weights="pissa", r=4, target_modules=list(models.LINEARS))
    )
    assert_parity(quantize_(model).train(), batch)


def test_initialisations_that_need_the_matrix_say_so():
    with pytest.raises(TypeError):
        peft.get_peft_model(
            quantize_(models.plain()), peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"])
        )


def test_modules_to_save_and_embeddings(batch):
    model = models.lora(
        models.plain(), modules_to_save=["lm_head", "embed_tokens"], target_modules=["q_proj", "v_proj"]
    )
    assert_parity(model, batch)
    assert_parity(models.lora(models.plain(), target_modules=["embed_tokens", "q_proj"], use_rslora=True), batch)


def test_target_parameters(batch):
    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no target_parameters")
    model = models.lora(models.plain(), target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    assert_equal(step(twin, batch), step(model, batch))
    assert {d.role for d in fastplug.report(twin).patched} >= {"attention"}


def test_rank_and_alpha_patterns_with_rslora(batch):
    options = {"rank_pattern": {"q_proj": 8, "down_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    assert_parity(models.lora(models.plain(), **options), batch)


def test_an_adapter_of_another_base():
    wide = models.lora(models.plain(hidden_size=128))
    state = peft.get_peft_model_state_dict(wide)
    model = models.lora(models.plain())
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(model, state)


def test_an_adapter_of_wrong_shapes_is_named_before_the_first_step():
    model = models.lora(models.plain())
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(4, 63))
    with pytest.raises(fastplug.ModelError, match=r"layers\.1\.mlp\.up_proj.*lora_A.*\(4, 63\)"):
        fastplug.apply(model)
