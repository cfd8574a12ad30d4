"""DoRA on the fused path: the op against its definition, models against PEFT's own."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from fastplug.layers import quantize, quantize_
from fastplug.memory.policy import Policy
from fastplug.ops.column_dots import kernel as column_kernel
from fastplug.ops.column_dots import reference as column_reference
from fastplug.ops.lora.dora import DoraGroup
from fastplug.ops.lora.linear import lora_linear
from fastplug.ops.lora.projection import Kept, Projection
from fastplug.ops.lora.reference import dora_linear
from fastplug.ops.table import table_for
from fastplug.quant.plain import Plain
from tests import models
from tests.accuracy import assert_as_accurate
from tests.engine.step import assert_equal, assert_parity, fallbacks, patched, step
from tests.memory.under import under
from tests.ops.test_adapter_gradients import Always

pytest.importorskip("peft")


@pytest.mark.interpreter
@pytest.mark.parametrize("op", [column_reference, column_kernel], ids=["reference", "kernel"])
@pytest.mark.parametrize("shape", [(700, 300), (5, 1), (1, 513), (64, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_column_dots(op, device, shape, dtype):
    x = torch.randn(shape[0], shape[1] + 3, device=device).to(dtype)[:, :-3]
    y = torch.randn(shape, device=device).to(dtype)
    truth = (x.double() * y.double()).sum(0)
    out = op.column_dots(x, y)
    assert out.dtype == torch.float32
    assert_as_accurate([out], [(x.float() * y.float()).sum(0)], [truth])


@pytest.mark.parametrize("op", [column_reference, column_kernel], ids=["reference", "kernel"])
def test_column_dots_of_nothing(op, device):
    assert not op.column_dots(torch.randn(0, 8, device=device), torch.randn(0, 8, device=device)).any()
    with pytest.raises(ValueError, match="no dot products"):
        op.column_dots(torch.randn(2, 8, device=device), torch.randn(2, 7, device=device))


WIDTHS = (48, 32, 80)


class Case:
    """Three projections of one tensor; the second has no adapter."""

    def __init__(self, device, dtype, tokens=50, bias=True, quantized=False):
        self.dtype = dtype
        self.linears = [
            nn.Linear(64, width, bias, dtype=dtype, device=device).requires_grad_(False) for width in WIDTHS
        ]
        if quantized:
            self.linears = [quantize(linear) for linear in self.linears]
        self.weights = [l.dequantize() if quantized else l.weight for l in self.linears]
        self.x = torch.randn(tokens, 64, device=device, dtype=dtype, requires_grad=True)
        self.g = torch.randn(tokens, sum(WIDTHS), device=device, dtype=dtype)
        self.adapters = {}
        for i in (0, 2):
            a = (torch.randn(4, 64, device=device) * 0.3).requires_grad_()
            b = (torch.randn(WIDTHS[i], 4, device=device) * 0.3).requires_grad_()
            m = (torch.rand(WIDTHS[i], device=device) + 0.5).requires_grad_()
            self.adapters[i] = (a, b, m, 0.7 + i)

    def inputs(self):
        return [self.x, *(t for a, b, m, _ in self.adapters.values() for t in (a, b, m))]

    def group(self, kernels="auto"):
        made = []
        for i, linear in enumerate(self.linears):
            read = linear.read if hasattr(linear, "read") else functools.partial(Plain().read, linear)
            p = Projection(read, (linear.out_features, 64), bias=linear.bias, owner=linear)
            if i in self.adapters:
                p.a, p.b, p.magnitude, p.scaling = self.adapters[i]
            made.append(p)
        return DoraGroup(made, self.dtype, table_for(self.x.device, kernels))

    def truth(self, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in self.inputs()]
        x, rest = inputs[0], iter(inputs[1:])
        outputs = []
        for i, linear in enumerate(self.linears):
            weight, bias = self.weights[i].to(dtype), None if linear.bias is None else linear.bias.to(dtype)
            if i in self.adapters:
                a, b, m = next(rest), next(rest), next(rest)
                outputs.append(dora_linear(x, weight, m, a, b, self.adapters[i][3], bias))
            else:
                outputs.append(nn.functional.linear(x, weight, bias))
        y = torch.cat(outputs, -1)
        return [y, *torch.autograd.grad(y, inputs, self.g.to(dtype))]

    def names(self):
        return ["y", "dx", *(f"{what}{i}" for i in self.adapters for what in ("dA", "dB", "dm"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("tokens", [50, 200])
def test_group_is_the_formula(device, dtype, quantized, tokens):
    case = Case(device, dtype, tokens, quantized=quantized)
    y = lora_linear(case.group(), case.x)
    ours = [y, *torch.autograd.grad(y, case.inputs(), case.g)]
    assert_as_accurate(ours, case.truth(dtype), case.truth(torch.float64), case.names())


def test_group_whose_gradients_of_b_come_along_with_gb(device, monkeypatch):
    one_pass, case = Always(), Case(device, torch.float32)
    a, b, m = (t.detach().clone().requires_grad_() for t in case.adapters[0][:3])
    case.adapters = {0: case.adapters[0], 1: (a, b[: WIDTHS[1]], m[: WIDTHS[1]], 0.9), 2: case.adapters[2]}
    monkeypatch.setattr(table_for(case.x.device, "auto"), "adapter_gradients", one_pass)
    y = lora_linear(case.group(), case.x)
    ours = [y, *torch.autograd.grad(y, case.inputs(), case.g)]
    assert one_pass.calls == 1
    assert_as_accurate(ours, case.truth(torch.float32), case.truth(torch.float64), case.names())


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [10, 70])
def test_group_with_the_kernels(device, tokens):
    case = Case(device, torch.float32, tokens)
    y = lora_linear(case.group("triton"), case.x)
    ours = [y, *torch.autograd.grad(y, case.inputs(), case.g)]
    assert_as_accurate(ours, case.truth(torch.float32), case.truth(torch.float64), case.names())


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
def test_stored_weights_are_not_scaled(device, quantized):
    """More tokens than input channels: the backward scales the weight, where it lies only if it was decoded."""
    case = Case(device, torch.float32, tokens=100, quantized=quantized)
    before = [[t.clone() for t in linear.state_dict().values()] for linear in case.linears]
    y = lora_linear(case.group(), case.x)
    first = torch.autograd.grad(y, case.inputs(), case.g, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, torch.autograd.grad(y, case.inputs(), case.g)))
    after = [list(linear.state_dict().values()) for linear in case.linears]
    assert all(torch.equal(one, two) for old, new in zip(before, after) for one, two in zip(old, new, strict=True))


def test_one_scaling_for_all(device):
    """A factor that all projections share goes into the products, not into B."""
    case = Case(device, torch.float32)
    case.adapters = {i: (*adapter[:3], 1.7) for i, adapter in case.adapters.items()}
    y = lora_linear(case.group(), case.x)
    ours = [y, *torch.autograd.grad(y, case.inputs(), case.g)]
    assert_as_accurate(ours, case.truth(torch.float32), case.truth(torch.float64), case.names())


def test_without_a_stream_and_with_a_factor(device):
    case = Case(device, torch.bfloat16)
    for known in (False, True):  # z is kept, and z is not
        group = case.group()
        group.output_known = known
        with torch.no_grad():
            kept = group.adapters(case.x.detach())
            once = None if kept.output is None else kept.output.clone()
            y = group.products(case.x.detach(), kept)
            half = group.products(case.x.detach(), kept, factor=0.5)
        assert once is None or torch.equal(kept.output, once)
        assert_as_accurate([half], [(0.5 * y.float()).to(half.dtype)], [0.5 * y.double()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [50, 200])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
def test_z_from_the_output_that_a_node_keeps(device, dtype, tokens, quantized):
    """Of many tokens, which are more than the input channels, it is the decoded weight that the forward scales."""
    case = Case(device, dtype, tokens, quantized=quantized)
    group = case.group()
    group.output_known = True
    with torch.no_grad():
        y, kept = group.forward(case.x.detach())
        assert kept.output is None
        again = group.adapters(case.x.detach())
        assert torch.equal(again.scale, kept.scale)
        assert torch.equal(group.products(case.x.detach(), again), y)  # what is recomputed has the same bits
        kept = group.knowing(Kept.of(kept.tensors()), y)
        needs = [t is not None and t.requires_grad for t in group.tensors()]
        dx, gb = group.input_gradient(case.g, kept, True, needs)
        grads = group.parameter_gradients(case.g, gb, case.x.detach(), kept, needs)
    theirs, truth = case.truth(dtype), case.truth(torch.float64)
    which = (0, 1, 4, 7)  # y, dx and the magnitudes' gradients, which stand behind those of the projections
    assert_as_accurate([y, dx, grads[12], grads[14]], [theirs[i] for i in which], [truth[i] for i in which])


def test_added_to_a_stream_with_a_factor(device):
    case = Case(device, torch.bfloat16)
    group = case.group()
    with torch.no_grad():
        kept = group.adapters(case.x.detach())
        y = group.products(case.x.detach(), kept)
        stream = torch.randn_like(y)
        expected = stream + 0.5 * y.float()
        out = group.products(case.x.detach(), kept, out=stream.clone(), factor=0.5)
    assert_as_accurate([out], [expected.to(out.dtype)], [expected])


def test_the_norm_of_a_changed_weight_is_taken_anew(device):
    case = Case(device, torch.float32)
    lora_linear(case.group(), case.x)
    with torch.no_grad():
        case.linears[0].weight.mul_(3.0)
        case.weights[0] = case.linears[0].weight
    y = lora_linear(case.group(), case.x)
    assert_as_accurate([y], case.truth(torch.float32)[:1], case.truth(torch.float64)[:1])


@pytest.fixture(scope="module")
def batch():
    return models.batch()


def dora(model, **options):
    made = models.lora(model, use_dora=True, **options)
    for name, parameter in made.named_parameters():  # magnitudes begin as the norms
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("family", models.FAMILIES)
def test_models(batch, family):
    assert_parity(dora(models.plain(family)), batch)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"r": 7, "lora_alpha": 3},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"gate_proj": 5}},
    ],
)
def test_options(batch, options):
    assert_parity(dora(models.plain("qwen2"), **options), batch)


@pytest.mark.parametrize("base", ["bitsandbytes", "QuantLinear"])
def test_quantized_bases(batch, base):
    if base == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    model = models.plain("qwen2")
    assert_parity(dora(models.quantized(model) if base == "bitsandbytes" else quantize_(model)), batch)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_draws_peft_s_numbers(batch, dropout):
    assert_parity(dora(models.plain("qwen2"), lora_dropout=dropout), batch)


def test_evaluation_drops_nothing(batch):
    assert_parity(dora(models.plain(), lora_dropout=0.5).eval(), batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(batch, reentrant):
    model = dora(models.plain())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_parity(model, batch)


def test_beside_plain_adapters(batch):
    """Another adapter of the same model, without magnitudes, and none."""
    model = dora(models.plain())
    models.add(model)
    twin = patched(model)
    for change in (lambda m: m.set_adapter("other"), lambda m: m.set_adapter("default")):
        change(model)
        change(twin)
        assert_equal(step(twin, batch), step(model, batch))
    assert not fallbacks(twin)


def test_bf16(batch):
    """Against an fp64 judge: no further from it than twice PEFT's own error, over all gradients together."""
    model = dora(models.plain()).to(torch.bfloat16)
    truth = step(copy.deepcopy(model).double(), batch).gradients
    errors = []
    for part in (model, patched(model)):
        found = step(part, batch).gradients
        pairs = [(found[name].double(), grad) for name, grad in truth.items() if grad is not None]
        errors.append(sum(float((mine - true).pow(2).sum()) for mine, true in pairs) ** 0.5)
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("tile_rows", [None, 8])
def test_memory_policies(batch, policy, tile_rows, dropout):
    """Layers that compute gate and up again, in tiles or whole, or that are checkpointed."""
    model = dora(models.plain(), lora_dropout=dropout)
    twin = under(patched(model), policy, tile_rows)
    if dropout and tile_rows:  # every tile draws its own numbers
        step(twin, batch)
        return
    assert_equal(step(twin, batch), step(model, batch))
    assert not fallbacks(twin)
