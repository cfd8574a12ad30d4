"""Models that are not what their row says: right numbers, or refused site by site with the reason, the rest patched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import fastplug
from fastplug.families import Family, QKNormRow
from fastplug.manager import manager
from tests import models
from tests.engine.step import assert_equal, fallbacks, step

BATCH = models.padded("left")


def patched(model: nn.Module) -> tuple[nn.Module, Any]:
    twin = copy.deepcopy(model)
    return twin, fastplug.apply(twin).report


def statuses(report: Any, role: str) -> list[str]:
    return [decision.status for decision in report.decisions if decision.role == role]


# --- an attention that returns something else -------------------------------------------------------------------------


class Wordy(modeling_llama.LlamaAttention):
    """Returns a third value, which its layer expects."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (*super().forward(*args, **kwargs)[:2], {"entropy": 0.0})


class WordyLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mixed, _, said = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        assert said == {"entropy": 0.0}
        h = hidden_states + mixed
        out = h + self.mlp(self.post_attention_layernorm(h))
        return (out,) if models_return_tuples() else out


def models_return_tuples() -> bool:
    import inspect

    return "output_attentions" in inspect.signature(modeling_llama.LlamaDecoderLayer.forward).parameters


@pytest.mark.parametrize("adapters", [False, True])
def test_an_attention_with_three_results(adapters: bool) -> None:
    model = models.plain()
    for layer in model.model.layers:
        layer.self_attn.__class__, layer.__class__ = Wordy, WordyLayer
    model = models.lora(model) if adapters else model
    twin, report = patched(model)
    assert statuses(report, "mlp") == ["patched"] * 2
    assert statuses(report, "lm_head_loss") == ["patched"]
    assert not statuses(report, "attention")
    assert statuses(report, "linear") == ["patched"] * 2 * adapters
    assert_equal(step(twin, BATCH), step(model, BATCH))


class Silent(nn.Module):
    """Adapted projections, but no tensor comes back that could be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        hidden_states.add_(0.1 * torch.tanh(self.q_proj(hidden_states) + self.k_proj(hidden_states)))
        return None


class SilentLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = hidden_states.clone()
        self.self_attn(hidden_states=x)
        return (x,) if models_return_tuples() else x


def test_an_attention_that_works_in_place() -> None:
    model = models.plain()
    for layer in model.model.layers:
        layer.self_attn, layer.__class__ = Silent(), SilentLayer
    model = models.lora(model, target_modules=["q_proj", "k_proj"])
    with torch.no_grad():
        expected = model(**BATCH).logits
        twin, report = patched(model)
        assert statuses(report, "linear") == ["left alone"] * 2
        assert torch.equal(twin(**BATCH).logits, expected)


# --- a row for another version of transformers ------------------------------------------------------------------------

OTHER_VERSIONS = {
    "a joint projection": {"qkv": ("qkv_proj",)},
    "other names in the MLP": {"gate": "w1", "up": "w3", "down": "w2"},
    "another activation": {"activation": "activation_fn"},
    "another output projection": {"out": "dense"},
    "another attention": {"attention_name": "attention"},
    "a norm that is not there": {"mlp_post_norm": "post_feedforward_layernorm"},
    "norms on q and k that are not there": {"qk_norm": QKNormRow()},
    "another epsilon": {"norm": fastplug.families.NormRow(eps="eps")},
    "a factor that is not there": {"residual_multiplier": "residual_multiplier"},
    "a window that is not there": {"attention_arguments": {"sliding_window": "sliding_window"}},
    "another width of heads": {"head_dim": "head_size"},
    "a dropout that is not there": {"dropouts": ("resid_dropout", "resid_dropout")},
    "a switch that is not there": {"parallel": "use_parallel_residual"},
    "another head": {"head": "embed_out"},
}


@pytest.fixture(params=OTHER_VERSIONS)
def row(request: pytest.FixtureRequest) -> Iterator[str]:
    """Llama's row with one field as another version might have it, in place of the real one."""
    family = Family("llama", "transformers.models.llama.modeling_llama", "Llama", **OTHER_VERSIONS[request.param])

    class Plugin:
        @staticmethod
        @fastplug.hookimpl
        def fastplug_families() -> list[Family]:
            return [family]

    plugins = manager()._manager
    plugins.register(Plugin, "a row of another version")
    yield request.param
    plugins.unregister(Plugin)


def test_a_row_for_another_version(row: str) -> None:
    """Refused with the name of what is missing, or right all the same."""
    model = models.lora(models.plain())
    expected = step(model, BATCH)
    twin, report = patched(model)
    assert_equal(step(twin, BATCH), expected)
    if row in ("norms on q and k that are not there", "another head"):
        assert not report.refused  # configurations without the former are usual; transformers itself knows the latter
        assert not fallbacks(twin)
    else:
        assert report.refused
        assert all("version" in str(d.reason) or "has no eps" in str(d.reason) for d in report.refused)
        assert len(report.patched) >= 3  # the rest
    fastplug.undo(twin)
    assert_equal(step(twin, BATCH), expected, bound=0)


# --- modules that several layers share --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm", "whole layer", "q_proj"])
@pytest.mark.parametrize("adapters", [False, True])
def test_layers_that_share_a_module(part: str, adapters: bool) -> None:
    model = models.plain()
    first, second = model.model.layers
    if part == "whole layer":
        model.model.layers[1] = first
    elif part == "q_proj":
        second.self_attn.q_proj = first.self_attn.q_proj
    else:
        setattr(second, part, getattr(first, part))
    model = models.lora(model) if adapters else model
    twin, report = patched(model)
    assert not report.refused
    assert_equal(step(twin, BATCH, use_cache=False), step(model, BATCH, use_cache=False))
    fastplug.undo(twin)
    assert not any("_fastplug" in module.__dict__ for module in twin.modules())


# --- half there, or in pieces -----------------------------------------------------------------------------------------


def test_a_model_without_a_row_on_the_meta_device() -> None:
    from tests.families import sweep

    if "phi" not in sweep.model_types():
        pytest.skip("needs transformers with Phi")
    model = models.lora(sweep.tiny("phi"), target_modules=["q_proj", "v_proj"])
    model.get_base_model().model.layers[1].mlp.fc1.to("meta")
    with pytest.raises(fastplug.ModelError, match="meta device"):
        fastplug.apply(model)


def test_empty_weights_of_a_model_without_a_row() -> None:
    """As ZeRO-3 leaves them between calls: nothing can be checked, so nothing is kept."""
    from tests.families import sweep

    model = sweep.tiny("hyperclovax" if "hyperclovax" in sweep.model_types() else "olmo")
    for parameter in model.model.layers.parameters():
        parameter.data = torch.empty(0)
    report = fastplug.apply(model).report
    found = [d for d in report.decisions if d.role in ("mlp", "norm", "lm_head_loss")]
    assert found
    assert all(d.status != "patched" for d in found if ".layers." in d.name or d.role == "lm_head_loss")
    assert any("sharded" in str(d.reason) for d in found)


# --- hooks and kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["self_attn", "self_attn.q_proj", "mlp", "mlp.act_fn", "post_attention_layernorm", ""]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks(where: str, when: str) -> None:
    """A hook that changes what a module returns is called as often and has the same effect."""
    model = models.lora(models.plain())
    counts = []

    def scaled(module: nn.Module, args: Any, out: Any) -> Any:
        counts.append(module)
        return tuple(part * 1.5 if isinstance(part, torch.Tensor) else part for part in out) if isinstance(
            out, tuple
        ) else out * 1.5  # fmt: skip

    def attach(part: Any) -> None:
        part.get_base_model().model.layers[1].get_submodule(where).register_forward_hook(scaled)

    if when == "before":
        attach(model)
    twin, _ = patched(model)
    if when == "after":
        attach(model)
        attach(twin)
    assert_equal(step(twin, BATCH), step(model, BATCH))
    assert len(counts) == 2


def test_a_kernel_from_the_hub() -> None:
    """``kernelize`` sets forwards on instances, again at every change of mode: they stay, whenever they come."""
    model = models.lora(models.plain())

    def kernel(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return 1.01 * type(self).forward(self, hidden_states)

    def kernelize(part: Any) -> None:
        for module in part.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = kernel.__get__(module)

    before = copy.deepcopy(model)
    kernelize(before)
    expected = step(before, BATCH)
    twin, report = patched(before)
    assert any(d.role == "norm" and "replaced on the instance" in str(d.reason) for d in report.decisions)
    assert_equal(step(twin, BATCH), expected)
    late, _ = patched(model)
    kernelize(late)
    assert_equal(step(late, BATCH), expected)
    assert fallbacks(late)
