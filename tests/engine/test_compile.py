"""``torch.compile`` on a patched model: whole layers in one graph, fastplug's kernels as opaque nodes in it.

A whole step, with the loss, is compiled in ``test_hosts_behaviour.py``; what compiling gains in ``tests/gpu``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastplug
from tests import models
from tests.engine.step import relative

pytest.importorskip("peft")

BOUND = 2e-5
LAYER_OPS = {"rms_norm_forward", "rope_forward", "glu_forward"}
BACKWARD_OPS = {"rms_norm_backward", "rope_backward", "glu_backward"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs the graphs as they are and counts fastplug's ops in them."""

    def __init__(self) -> None:
        self.forward: list[Counter[str]] = []
        self.backward: list[Counter[str]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        backend = aot_autograd(fw_compiler=self._counting(self.forward), bw_compiler=self._counting(self.backward))
        return backend(module, inputs)  # type: ignore[no-any-return]

    @staticmethod
    def _counting(found: list[Counter[str]]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        def compiler(module: torch.fx.GraphModule, inputs: Any) -> Any:
            names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
            names = [str(node.args[0]) if "auto_functionalized" in str(node.target) else str(node.target)
                     for node in module.graph.nodes if node.op == "call_function"]  # fmt: skip
            found.append(Counter(name.split(".")[1] for name in names if name.startswith("fastplug.")))
            return make_boxed_func(module.forward)

        return compiler


def breaks() -> list[str]:
    from torch._dynamo.utils import counters

    return list(counters["graph_break"])


def inputs_of_layer(model: Any, length: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(length)
    like = next(p for p in model.parameters() if p.is_floating_point())
    hidden = torch.randn(2, length, 64, generator=generator).to(like)
    positions = torch.arange(length, device=hidden.device)[None]
    return hidden.requires_grad_(), model.get_base_model().model.rotary_emb(hidden, positions)


def run_layer(call: Callable[..., Any], model: Any, length: int) -> dict[str, torch.Tensor]:
    """The layer's output and gradients."""
    hidden, angles = inputs_of_layer(model, length)
    model.zero_grad(set_to_none=True)
    out = call(hidden, position_embeddings=angles)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert hidden.grad is not None
    return {"out": out.detach(), "hidden": hidden.grad, **grads}


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_a_decoder_layer_is_one_graph(kernels: str, device: torch.device) -> None:
    """``fullgraph=True`` raises at any break. With the kernels, each is a node of its own, backward included."""
    pytest.importorskip("bitsandbytes")
    model = models.qlora(num_hidden_layers=1).to(device)
    fastplug.apply(model, strict=True, kernels=kernels, graphs="off")
    layer, graphs = model.get_base_model().model.layers[0], Graphs()
    expected = run_layer(layer, model, 6)
    found = run_layer(torch.compile(layer, backend=graphs, fullgraph=True), model, 6)
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative(found[name], expected[name]) <= BOUND, name
    assert len(graphs.forward) == len(graphs.backward) == 1
    triton = kernels == "triton" or device.type == "cuda"
    assert (graphs.forward[0].keys() >= LAYER_OPS) == triton, graphs.forward
    assert (graphs.backward[0].keys() >= BACKWARD_OPS) == triton, graphs.backward
    if triton:
        assert graphs.forward[0]["rms_norm_forward"] == 2
        assert graphs.forward[0]["nf4_decode"] > 0
        assert graphs.backward[0]["nf4_decode"] > 0
    assert not breaks()
    assert not fastplug.report(model).fallbacks


def bf16(model: Any) -> Any:
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.bfloat16()
    for module in model.modules():  # bitsandbytes multiplies in fp32 unless told
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    return model


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dora": (lambda: models.lora(models.plain(num_hidden_layers=1), use_dora=True), {}),
    "dora over nf4": (lambda: models.lora(models.quantized(models.plain(num_hidden_layers=1)), use_dora=True), {}),
    "lora with bias": (lambda: models.lora(models.plain(num_hidden_layers=1), lora_bias=True), {}),
    "kept weights": (lambda: models.qlora(num_hidden_layers=1), {"base_weights": "kept"}),
    "fp8_backward": (lambda: bf16(models.lora(models.plain(num_hidden_layers=1))), {"compute": "fp8_backward"}),
    "fp8, kept": (lambda: bf16(models.qlora(num_hidden_layers=1)), {"compute": "fp8", "fp8_weights": "kept"}),
    "fp8, decoded": (lambda: bf16(models.qlora(num_hidden_layers=1)), {"compute": "fp8", "fp8_weights": "decoded"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_arithmetic_is_one_graph_too(kind: str, device: torch.device) -> None:
    pytest.importorskip("bitsandbytes")
    make, options = KINDS[kind]
    model = make().to(device)
    fastplug.apply(model, strict=True, graphs="off", **options)
    layer, graphs = model.get_base_model().model.layers[0], Graphs()
    for _ in range(2):  # what is kept is there the second time
        expected = run_layer(layer, model, 6)
    found = run_layer(torch.compile(layer, backend=graphs, fullgraph=True), model, 6)
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative(found[name].float(), expected[name].float()) <= (0.03 if "fp8" in kind else BOUND), name
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert not breaks()
    assert not fastplug.report(model).fallbacks


def test_other_lengths_are_compiled_once_more_at_most(device: torch.device) -> None:
    """The first for its own length, the second for all: then nothing is compiled any more."""
    model = models.lora(models.plain(num_hidden_layers=1)).to(device)
    fastplug.apply(model, strict=True, graphs="off")
    layer, graphs = model.get_base_model().model.layers[0], Graphs()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for length in (6, 9, 17, 31):
        found, expected = run_layer(compiled, model, length), run_layer(layer, model, length)
        assert all(relative(found[name], expected[name]) <= BOUND for name in expected)
    assert len(graphs.forward) == 2


def test_all_layers_together_are_one_graph(device: torch.device) -> None:
    """The whole model below the loss, as the head calls it."""
    model = models.lora(models.plain("qwen3")).to(device)
    fastplug.apply(model, strict=True, graphs="off")
    inner, graphs = model.get_base_model().model, Graphs()
    tokens = models.batch(length=8)["input_ids"].to(device)
    expected = inner(input_ids=tokens, use_cache=False).last_hidden_state
    found = torch.compile(inner, backend=graphs, fullgraph=True)(input_ids=tokens, use_cache=False).last_hidden_state
    assert relative(found.detach(), expected.detach()) <= BOUND
    assert len(graphs.forward) == 1
    assert not breaks()


def masks(mask: str) -> dict[str, torch.Tensor]:
    """The arguments of a step whose mask is none, of ones, or with padding."""
    batch = models.batch(length=8)
    if mask == "none":
        del batch["attention_mask"]
    elif mask == "padded":
        batch["attention_mask"][0, 5:] = 0
        batch["labels"][0, 5:] = -100
    return batch


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("mask", ["none", "ones", "padded"])
def test_attention_gets_a_mask_only_of_padding(family: str, mask: str, device: torch.device) -> None:
    """While it is traced, transformers makes one of nothing, and no flash kernel takes it."""
    model = models.lora(models.plain(family, num_hidden_layers=2, sliding_window=64)).to(device)
    fastplug.apply(model, strict=True, graphs="off")
    batch = {name: tensor.to(device) for name, tensor in masks(mask).items()}
    given: list[bool] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in module.graph.nodes:
            if getattr(node.target, "__name__", "") == "scaled_dot_product_attention":
                given.append(node.kwargs.get("attn_mask") is not None)
        return module.forward

    def step(call: Callable[..., Any]) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = call(**batch).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    expected, found = step(model), step(torch.compile(model, backend=backend))
    assert found.keys() == expected.keys()
    assert all(relative(found[name], expected[name]) <= BOUND for name in expected)
    assert given == [mask == "padded"] * 2
    assert not fastplug.report(model).fallbacks


def test_a_window_shorter_than_the_rows_keeps_its_mask(device: torch.device) -> None:
    model = models.lora(models.plain("mistral", num_hidden_layers=1, sliding_window=4)).to(device)
    fastplug.apply(model, strict=True, graphs="off")
    batch = {name: tensor.to(device) for name, tensor in masks("none").items()}
    expected = model(**batch).loss
    found = torch.compile(model, backend="aot_eager")(**batch).loss
    assert relative(found.detach(), expected.detach()) <= BOUND
