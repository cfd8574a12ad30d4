"""FSDP2 in this process alone: its classes, hooks and swapped parameters are there, the other processes are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastplug
from tests import models

pytest.importorskip("peft")
fsdp: Any = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("FSDP2 is in torch.distributed.fsdp from PyTorch 2.6 on", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(model: Any, *, head: bool = True) -> Any:
    """As accelerate 1.15 does it: layers, embedding and head by themselves, the rest with the root."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    inner = model.get_base_model()
    for layer in inner.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    if head:
        fsdp.fully_shard(inner.lm_head, mesh=mesh, reshard_after_forward=False)
    return fsdp.fully_shard(model, mesh=mesh)


def step(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(**models.batch())
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return {"loss": out.loss.detach(), **whole}


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-6, msg=name)


def make(kind: str) -> Any:
    return models.qlora() if kind == "qlora" else models.lora(models.plain())


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("late", [False, True], ids=["patched first", "sharded first"])
@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
def test_a_sharded_model_trains_the_same(late: bool, head: bool) -> None:
    wanted = step(make("lora"))
    model = make("lora")
    if not late:
        fastplug.apply(model)
    shard(model, head=head)
    report = fastplug.apply(model).report
    assert not report.refused
    roles = [decision.role for decision in report.patched]
    assert (roles.count("decoder_layer"), roles.count("lm_head_loss")) == (2, 1)
    for _ in range(2):
        agree(step(model), wanted)
    assert not fastplug.report(model).fallbacks


def test_logits_can_be_read_where_the_head_is_sharded() -> None:
    wanted = make("lora")(**models.batch()).logits
    model = make("lora")
    fastplug.apply(model)
    shard(model)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(**models.batch()).logits + 0, wanted, rtol=1e-4, atol=1e-4)
    out = model(**models.batch())
    torch.testing.assert_close(out.logits + 0, wanted, rtol=1e-4, atol=1e-4)
    out.loss.backward()


def test_a_trained_head_gets_its_gradient() -> None:
    def build() -> Any:
        model = make("lora")
        model.get_base_model().lm_head.weight.requires_grad_()
        return model

    wanted = step(build())
    assert any("lm_head" in name for name in wanted)
    model = build()
    fastplug.apply(model)
    agree(step(shard(model)), wanted)
    assert not fastplug.report(model).fallbacks


def test_mixed_precision_leaves_the_loss_in_fp32() -> None:
    model = make("lora")
    fastplug.apply(model)
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    inner = model.get_base_model()
    for part in (*inner.model.layers, inner.lm_head):
        fsdp.fully_shard(part, mp_policy=policy)
    fsdp.fully_shard(model, mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    out = model(**models.batch())
    assert out.loss.dtype == torch.float32
    assert out.loss.bfloat16().float() != out.loss
    out.loss.backward()
    assert not fastplug.report(model).fallbacks


def test_undo_and_apply_again_on_a_sharded_model() -> None:
    wanted = step(make("lora"))
    model = make("lora")
    fastplug.apply(model)
    shard(model)
    kinds = [type(module) for module in model.modules()]
    fastplug.undo(model)
    agree(step(model), wanted)
    fastplug.apply(model)
    assert [type(module) for module in model.get_base_model().model.layers] == [
        kind for kind in kinds if kind.__name__ == "FSDPLlamaDecoderLayer"
    ]
    agree(step(model), wanted)
    assert not fastplug.report(model).fallbacks


@pytest.mark.parametrize("odd", [0, 1])
def test_no_layer_is_lost_by_a_policy_that_takes_the_first_class_of_a_name(odd: int) -> None:
    dataclasses = pytest.importorskip("accelerate.utils.dataclasses")
    model = make("lora")
    layers = model.get_base_model().model.layers
    layers[odd].forward = lambda *args, **kwargs: None  # somebody else's: fastplug leaves that layer alone
    fastplug.apply(model)
    assert type(layers[0]) is not type(layers[1])
    kind = dataclasses.get_module_class_from_name(model, "LlamaDecoderLayer")
    assert all(isinstance(layer, kind) for layer in layers)
    assert not isinstance(layers[0].mlp, kind)


def test_layers_whose_weights_move_are_not_recorded() -> None:
    from fastplug.graphs.state import LayerState

    model = shard(make("lora"))
    layer = model.get_base_model().model.layers[0]
    assert LayerState.of(layer).off
