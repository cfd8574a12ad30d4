"""Models that no row describes: what structure finds is kept only where it computes the same."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

import fastplug
from fastplug.families.structural import NAME
from tests import models
from tests.engine.step import assert_equal, fallbacks, step
from tests.families import sweep

# Types without a row on which norms, MLPs and the loss are found, as docs/families.md lists them.
TYPES = (
    "afmoe", "aria_text", "axk1", "axk2", "beam", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
    "diffllama", "doge", "dots3_note", "dots3_note_text", "emu3", "exaone_moe", "falcon_h1", "flint",
    "gemma4_unified_text", "glm4_moe_lite", "glm_moe_dsa", "granite_swa", "granitemoehybrid",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "kolibri1", "laguna",
    "mimo_v2_flash", "minicpm3", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "solar_open", "vaultgemma", "youtu",
)  # fmt: skip
SLOW = ("falcon_h1",)  # half a minute for its mixer on a CPU: the sweep runs it
HERE = [name for name in TYPES if name in sweep.model_types() and name not in SLOW]


@pytest.mark.parametrize("model_type", HERE)
def test_model_types_without_a_row(model_type: str) -> None:
    row = sweep.measure(model_type, sweep.tiny(model_type))
    assert row.by_structure("norm", "mlp", "lm_head_loss"), row
    assert row.loss < 1e-5
    assert row.gradient < 1e-4


ODD = [name for name in ("bert", "bart", "mamba", "nanochat", "xlnet", "prophetnet") if name in sweep.model_types()]


@pytest.mark.parametrize("model_type", ODD)
def test_what_does_not_fit_is_left_alone(model_type: str) -> None:
    """Encoders, other losses, dropouts inside an MLP, state spaces: less is patched, nothing is wrong."""
    row = sweep.measure(model_type, sweep.tiny(model_type))
    assert row.loss < 1e-5
    assert row.gradient < 1e-4


# --- a Llama under other names, as a model's remote code might have it ------------------------------------------------


class Scale(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(states.dtype)


class ScaleNorm(Scale):
    pass


class FeedForward(nn.Module):
    """The linear layers stand in another order, and the second one is the gate."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.w2, self.w3, self.w1, self.nonlinearity = mlp.down_proj, mlp.up_proj, mlp.gate_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.nonlinearity(self.w1(x)) * self.w3(x))


class CountingFeedForward(FeedForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.w2(self.nonlinearity(self.w1(x)) * self.w3(x))


class AbsoluteFeedForward(FeedForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.nonlinearity(self.w1(x)) * self.w3(x).abs())


def renamed(feed_forward: type[FeedForward] = FeedForward, **config: Any) -> Any:
    class Renamed(modeling_llama.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            outputs = self.model(input_ids=input_ids, **kwargs)
            logits = 8.0 * torch.tanh(self.lm_head(outputs.last_hidden_state) / 8.0)
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model: Any = models.plain(**config)
    for layer in model.model.layers:
        layer.mlp = feed_forward(layer.mlp)
        layer.input_layernorm = ScaleNorm(layer.input_layernorm)
        layer.post_attention_layernorm = ScaleNorm(layer.post_attention_layernorm)
        own = type("Block", (type(layer),), {"__module__": __name__})
        layer.__class__ = own
    model.__class__ = Renamed
    return model


def decisions(model: nn.Module, role: str) -> list[Any]:
    return [d for d in fastplug.report(model).decisions if d.role == role and d.family == NAME]


@pytest.mark.parametrize("adapters", [False, True])
def test_a_renamed_llama(adapters: bool) -> None:
    model = renamed()
    if adapters:
        model = models.lora(model, target_modules=["q_proj", "v_proj", "w1", "w2", "w3"])
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    assert [d.status for d in decisions(twin, "mlp")] == ["patched"] * 2
    assert [d.status for d in decisions(twin, "lm_head_loss")] == ["patched"]
    assert all("PyTorch's own norm" in d.reason for d in decisions(twin, "norm"))
    assert "by structure, checked" in fastplug.report(twin).summary()
    assert_equal(step(twin, models.padded("left")), step(model, models.padded("left")))
    assert not fallbacks(twin)


def test_the_softcap_is_read_from_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss above is computed without logits: the head's product is never formed."""
    model = renamed()
    fastplug.apply(model)
    monkeypatch.setattr(type(model.lm_head), "forward", lambda *args: pytest.fail("logits were computed"))
    assert model(**models.batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("feed_forward", "reason"),
    [(CountingFeedForward, None), (AbsoluteFeedForward, "output is not that of its own forward")],
)
def test_a_forward_that_does_more_is_left_alone(feed_forward: type[FeedForward], reason: str | None) -> None:
    model = renamed(feed_forward)
    expected = step(copy.deepcopy(model), models.batch())
    fastplug.apply(model)
    calls = getattr(model.model.layers[0].mlp, "calls", 0)  # the check of the loss runs the whole model
    found = decisions(model, "mlp")
    assert not any(d.status == "patched" for d in found)
    assert reason is None or all(reason in d.reason for d in found)
    assert_equal(step(model, models.batch()), expected)
    if feed_forward is CountingFeedForward:
        assert model.model.layers[0].mlp.calls == calls + 1


def test_checks_leave_no_trace() -> None:
    model = renamed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fastplug.apply(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    again = fastplug.apply(model).report
    assert {d.status for d in again.decisions if d.role == "mlp"} == {"patched"}
    fastplug.undo(model)
    assert type(model.model.layers[0].mlp) is FeedForward


def test_hooks_are_not_skipped() -> None:
    model, calls = renamed(), []
    fastplug.apply(model)
    model.model.layers[0].mlp.w1.register_forward_hook(lambda *args: calls.append(1))
    model(**models.batch())
    assert calls


def test_a_head_with_a_loss_of_its_own() -> None:
    model = renamed()

    def forward(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # unshifted
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    kind = type("Unshifted", (modeling_llama.LlamaForCausalLM,), {"forward": forward, "__module__": __name__})
    model.__class__ = kind
    expected = step(copy.deepcopy(model), models.batch())
    fastplug.apply(model)
    assert not any(d.status == "patched" for d in decisions(model, "lm_head_loss"))
    assert_equal(step(model, models.batch()), expected)
    assert isinstance(type(model).forward, types.FunctionType)
