"""Every policy: the same bits as KEEP, what it keeps, what it computes again, and where it gives way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.memory import host_memory, offload
from fastplug.memory.checkpoint import effective
from fastplug.memory.policy import Policy
from fastplug.ops.lora.group import Group
from fastplug.patching.sites import KEY
from tests import models
from tests.engine.step import Step, assert_equal, fallbacks, step
from tests.families import cases
from tests.memory.under import calls, layers, under

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("deterministic")

OTHERS = [policy for policy in Policy if policy is not Policy.KEEP]
LENGTH = 70  # above what a GPU's attention kernels ask for


@pytest.fixture(autouse=True)
def everything_is_large_enough_to_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    for module in (offload, host_memory):
        monkeypatch.setattr(module, "PIECE", 2**16)


def patched(model: Any, device: torch.device, **options: Any) -> Any:
    model = model.to(device)
    fastplug.apply(model, graphs="off", **options)
    return model


def batch(device: torch.device, seed: int = 3, length: int = LENGTH) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in models.batch(2, length, seed).items()}


def with_kernel(device: torch.device, **options: Any) -> Any:
    """A patched model in a dtype for which the device has a kernel of attention with grouped heads."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return patched(models.lora(models.plain("llama").to(dtype), **options).to(dtype), device)


def same_bits(model: Any, device: torch.device, policies: Sequence[Policy], **kwargs: Any) -> None:
    """Loss and gradients of a step under each policy are those of KEEP, bit for bit, without a fallback."""
    inputs = batch(device)
    truth = step(copy.deepcopy(model), inputs, logits=False, **kwargs)
    for policy in policies:
        twin = under(copy.deepcopy(model), policy)
        assert_equal(step(twin, inputs, logits=False, **kwargs), truth, 0)
        assert fallbacks(twin) == fallbacks(model), policy


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_policies_give_the_same_bits(device: torch.device, dtype: torch.dtype, dropout: float) -> None:
    model = models.lora(models.plain("llama").to(dtype), lora_dropout=dropout).to(dtype)
    same_bits(patched(model, device), device, OTHERS)


@pytest.mark.parametrize("name", ["qwen3", "gemma 3", "granite", "olmo 2", "phi 3", "cohere 2", "qwen3 moe"])
def test_other_families(device: torch.device, name: str) -> None:
    if name not in cases.CASES or not cases.available(name):
        pytest.skip(f"this transformers version has no {name}")
    same_bits(patched(cases.adapted(name), device), device, [Policy.DROP_GATE_UP, Policy.OFFLOAD_ATTENTION])


def test_four_bits(device: torch.device) -> None:
    pytest.importorskip("bitsandbytes")
    model = patched(models.qlora("llama"), device)
    same_bits(model, device, [Policy.DROP_GATE_UP, Policy.KEEP_ATTENTION, Policy.OFFLOAD])


def test_full_fine_tuning(device: torch.device) -> None:
    same_bits(patched(models.plain("llama"), device), device, OTHERS)


def test_autocast_holds_in_the_second_pass(device: torch.device) -> None:
    model = patched(models.lora(models.plain("llama")), device)
    with torch.autocast(device.type, torch.bfloat16):
        same_bits(model, device, OTHERS)


def test_masks(device: torch.device) -> None:
    """A padding mask, with which transformers repeats k and v: attention is still kept."""
    model = with_kernel(device)
    inputs = {name: tensor.to(device) for name, tensor in models.padded("left", length=LENGTH).items()}
    truth = step(copy.deepcopy(model), inputs, logits=False)
    twin = under(copy.deepcopy(model), Policy.KEEP_ATTENTION)
    assert_equal(step(twin, inputs, logits=False), truth, 0)
    assert calls(lambda: step(twin, inputs, logits=False)) == 2


@pytest.mark.parametrize("policy", Policy)
def test_attention_runs_again_only_where_the_policy_says_so(device: torch.device, policy: Policy) -> None:
    model = under(with_kernel(device), policy)
    again = policy in (Policy.RESIDUAL, Policy.OFFLOAD)
    assert calls(lambda: step(model, batch(device), logits=False)) == (4 if again else 2)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """The groups whose base products have run."""
    seen: list[Group] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Group, *args: Any, **kwargs: Any) -> Any:
            seen.append(group)
            return original(group, *args, **kwargs)

        return call

    for name in ("products", "onto"):  # the latter adds them to the residual stream
        monkeypatch.setattr(Group, name, counted(getattr(Group, name)))
    return seen


@pytest.mark.parametrize(
    ("policy", "tile_rows", "count"),
    [
        (Policy.KEEP, None, 4),  # qkv, out, gate and up, down
        (Policy.DROP_GATE_UP, None, 5),
        (Policy.DROP_GATE_UP, 100, 4 + 2 + 2),  # two tiles: gate/up and down twice, gate/up twice again
        (Policy.RESIDUAL, None, 4 + 3),  # not down
        (Policy.RESIDUAL, 100, 4 + 2 + 2 + 2),  # the second pass stops before the MLP
        (Policy.KEEP_ATTENTION, None, 4 + 3),
    ],
)
def test_products_that_run(
    device: torch.device, products: list[Group], policy: Policy, tile_rows: int | None, count: int
) -> None:
    model = under(patched(models.lora(models.plain("llama", num_hidden_layers=1)), device), policy, tile_rows)
    step(model, batch(device), logits=False)
    assert len(products) == count


def test_accumulated_and_interleaved_steps(device: torch.device) -> None:
    """Two forwards before their backwards, in either order, added up."""
    model = patched(models.lora(models.plain("llama"), lora_dropout=0.2), device)
    found = {}
    for policy in Policy:
        twin = under(copy.deepcopy(model), policy)
        torch.manual_seed(0)
        losses = [twin(**batch(device, seed)).loss for seed in (1, 2, 3)]
        for loss in (losses[1], losses[0], losses[2]):
            loss.backward()
        found[policy] = [p.grad for p in twin.parameters() if p.requires_grad]
    for policy in OTHERS:
        assert all(torch.equal(mine, truth) for mine, truth in zip(found[policy], found[Policy.KEEP])), policy


@pytest.mark.parametrize("policy", OTHERS)
def test_a_graph_that_is_retained(device: torch.device, policy: Policy) -> None:
    model = under(patched(models.lora(models.plain("llama")), device), policy)
    loss = model(**batch(device)).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(b, 2 * a) for a, b in zip(once, twice))


def test_what_is_not_covered_is_checkpointed_all_the_same(device: torch.device, products: list[Group]) -> None:
    """A hook on the MLP's activation: the layer's original forward, whose parts are fused, runs twice."""
    model = patched(models.lora(models.plain("llama", num_hidden_layers=1)), device)
    (layer,) = layers(model)
    seen: list[int] = []
    layer.mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    truth = step(copy.deepcopy(model), batch(device), logits=False)
    seen.clear()
    under(model, Policy.RESIDUAL)
    assert_equal(step(model, batch(device), logits=False), truth, 0)
    assert len(seen) == 2
    assert fallbacks(model) == {"act_fn has a forward hook"} or len(fallbacks(model)) == 1


class Reasons:
    """:func:`effective` for one layer of a model."""

    def __init__(self, model: Any) -> None:
        self.layer: nn.Module = layers(model)[0]
        self.binding = self.layer.__dict__[KEY]

    def __call__(self, policy: Policy, **kwargs: Any) -> tuple[Policy, str | None]:
        return effective(policy, self.layer, self.binding, kwargs)


def test_where_a_policy_gives_way(device: torch.device) -> None:
    model = patched(models.lora(models.plain("llama")), device)
    reasons = Reasons(model)
    for policy in Policy:
        assert reasons(policy) == (policy, None)
    with torch.no_grad():
        assert reasons(Policy.RESIDUAL) == (Policy.KEEP, None)
    found, reason = reasons(Policy.OFFLOAD, past_key_values=object())
    assert found is Policy.KEEP
    assert "use_cache=False" in str(reason)
    assert reasons(Policy.DROP_GATE_UP, past_key_values=object()) == (Policy.DROP_GATE_UP, None)
    reasons.layer.self_attn.attention_dropout = 0.1  # type: ignore[union-attr, assignment]
    assert reasons(Policy.KEEP_ATTENTION) == (Policy.RESIDUAL, "attention has dropout")
    reasons.layer.self_attn.attention_dropout = 0.0  # type: ignore[union-attr, assignment]
    reasons.layer.self_attn.config._attn_implementation = "eager"  # type: ignore[union-attr]
    found, reason = reasons(Policy.OFFLOAD_ATTENTION)
    assert found is Policy.OFFLOAD
    assert "'eager'" in str(reason)


@pytest.mark.parametrize("name", ["starcoder 2", "qwen3 moe"])
def test_only_gated_mlps_drop_gate_and_up(device: torch.device, name: str) -> None:
    """An MLP without a gate, a mixture of experts: nothing to drop."""
    if not cases.available(name):
        pytest.skip(f"this transformers version has no {name}")
    reasons = Reasons(patched(cases.build(name), device))
    assert reasons(Policy.DROP_GATE_UP) == (Policy.KEEP, "its MLP is not a gated one")
    assert reasons(Policy.RESIDUAL) == (Policy.RESIDUAL, None)


def test_eager_attention_is_computed_again(device: torch.device) -> None:
    model = patched(models.lora(models.plain("llama", attention="eager")), device)
    same_bits(model, device, OTHERS)


def test_inside_the_hosts_checkpoint_nothing_is_checkpointed_twice(device: torch.device) -> None:
    model = patched(models.lora(models.plain("llama")), device)
    truth = step(copy.deepcopy(model), batch(device), logits=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    under(model, Policy.OFFLOAD_ATTENTION)
    found: list[Step] = []
    assert calls(lambda: found.append(step(model, batch(device), logits=False))) == 4
    assert_equal(found[0], truth, 0)


def test_undo_gives_the_model_back(device: torch.device) -> None:
    model = models.lora(models.plain("llama")).to(device)
    before = {name: type(module) for name, module in model.named_modules()}
    under(patched(model, device), Policy.OFFLOAD)
    twin = copy.deepcopy(model)
    assert_equal(step(twin, batch(device)), step(model, batch(device)), 0)
    fastplug.undo(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(KEY in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("policy", [Policy.OFFLOAD_KEEP, Policy.OFFLOAD_DROP_GATE_UP])
def test_only_what_the_layer_keeps_is_offloaded(device: torch.device, policy: Policy) -> None:
    """No weights, no cos and sin: they are on the device anyway."""
    model = under(patched(models.lora(models.plain("llama")), device), policy)
    loss = model(**batch(device)).loss
    mover = layers(model)[0].__dict__[KEY].runtime.offload
    addresses = {address for group in mover._alive() for address, _ in group._known}
    assert len(addresses) > 2 * 6
    assert not addresses & {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    del loss
