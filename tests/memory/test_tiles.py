"""The gated MLP in tiles: as accurate as the whole, sums in fp32, no tile's memory beyond its rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.memory.policy import Policy
from tests import models
from tests.accuracy import assert_as_accurate
from tests.engine.step import assert_equal, step
from tests.families import cases
from tests.memory.under import layers, under

pytest.importorskip("peft")

Result = tuple[list[torch.Tensor | None], list[str]]


def run(model: Any, layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Result:
    """Output, gradient of x, and of all parameters, of one decoder layer."""
    dtype = next(layer.parameters()).dtype
    x, g = x.to(dtype).requires_grad_(), g.to(dtype)
    model.zero_grad(set_to_none=True)
    position = torch.arange(x.shape[1], device=x.device)[None]
    rotary = model.get_base_model().model.rotary_emb
    out = layer(x, position_embeddings=rotary(x, position), attention_mask=None)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(g)
    trained = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return [out.detach(), x.grad, *trained.values()], ["out", "x", *trained]


@pytest.mark.parametrize("tile_rows", [16, 64, 65])
@pytest.mark.parametrize("policy", [Policy.DROP_GATE_UP, Policy.OFFLOAD])
def test_as_accurate_as_pytorch(device: torch.device, policy: Policy, tile_rows: int) -> None:
    model = models.lora(models.plain("llama", num_hidden_layers=1).to(torch.bfloat16)).to(device, torch.bfloat16)
    x, g = (torch.randn(1, 65, 64, device=device).to(torch.bfloat16) for _ in range(2))
    exact, theirs = copy.deepcopy(model).double(), copy.deepcopy(model)
    truth, _ = run(exact, exact.get_base_model().model.layers[0], x, g)
    pytorch, _ = run(theirs, theirs.get_base_model().model.layers[0], x, g)
    fastplug.apply(model, graphs="off")
    (layer,) = layers(under(model, policy, tile_rows))
    ours, names = run(model, layer, x, g)
    assert_as_accurate(ours, pytorch, truth, names)


@pytest.mark.parametrize("name", ["gemma 3", "granite", "olmo 2"])
def test_other_families(device: torch.device, name: str) -> None:
    """A second norm after the MLP, a factor on what is added, no norm before."""
    if not cases.available(name):
        pytest.skip(f"this transformers version has no {name}")
    model = cases.adapted(name).to(device)
    fastplug.apply(model, graphs="off")
    batch = {key: value.to(device) for key, value in models.batch(2, 40).items()}
    truth = step(copy.deepcopy(model), batch, logits=False)
    for policy in (Policy.DROP_GATE_UP, Policy.RESIDUAL):
        assert_equal(step(under(copy.deepcopy(model), policy, 17), batch, logits=False), truth, 2e-5)


def test_dropout_is_the_same_in_forward_and_backward(device: torch.device) -> None:
    """Tiles draw other random numbers than the whole, but the same in every policy."""
    model = models.lora(models.plain("llama").double(), lora_dropout=0.4).double().to(device)
    fastplug.apply(model, graphs="off")
    batch = {key: value.to(device) for key, value in models.batch(2, 40).items()}
    truth = step(under(copy.deepcopy(model), Policy.DROP_GATE_UP, 33), batch, logits=False)
    for policy in (Policy.RESIDUAL, Policy.OFFLOAD_ATTENTION):
        assert_equal(step(under(copy.deepcopy(model), policy, 33), batch, logits=False), truth, 0)


def test_gradients_under_dropout_fit_the_output(device: torch.device) -> None:
    """Against finite differences, with the same random numbers each time."""
    model = models.lora(models.plain("llama", num_hidden_layers=1).double(), lora_dropout=0.4).double().to(device)
    fastplug.apply(model, graphs="off")
    (layer,) = layers(under(model, Policy.DROP_GATE_UP, 33))
    x, g = (torch.randn(1, 80, 64, device=device, dtype=torch.float64) for _ in range(2))

    def output() -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        return run(model, layer, x, g)[0]

    _, _, *gradients = output()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    for name, grad in zip(names, gradients):
        if "mlp" not in name:
            continue
        p, losses = layer.get_parameter(name), []
        direction = torch.randn_like(p) * 1e-6
        for sign in (1, -2, 1):  # there, to the other side, and back
            with torch.no_grad():
                p.add_(direction, alpha=sign)
            out = output()[0]
            assert out is not None
            losses.append(float((out * g).sum()))
        assert grad is not None
        assert 2 * float((grad * direction).sum()) == pytest.approx(losses[0] - losses[1], rel=1e-4), name


def test_no_tile_is_longer_than_asked(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastplug.ops.lora.group import Group

    seen: list[int] = []
    original = Group.products

    def products(group: Group, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if group.out_features == 2 * 128:
            seen.append(len(x))
        return original(group, x, *args, **kwargs)

    monkeypatch.setattr(Group, "products", products)
    model = models.lora(models.plain("llama", num_hidden_layers=1)).to(device)
    fastplug.apply(model, graphs="off")
    step(under(model, Policy.DROP_GATE_UP, 30), {k: v.to(device) for k, v in models.batch(2, 40).items()}, logits=False)
    assert seen == [30, 30, 20] * 2
