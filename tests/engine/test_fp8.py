"""FP8 base products in a whole model: what stays exact stays so, gradients point where exact ones do, and refusals."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import fastplug
from fastplug.errors import OptionError
from fastplug.ops.fp8 import device as fp8_device
from fastplug.ops.fp8 import reference
from fastplug.ops.lora import fp8_base
from fastplug.ops.table import table_for
from tests import models
from tests.engine.step import fallbacks, patched, step
from tests.quant.test_step import pair

BASES = ["lora", "qlora"]


def build(base: str, **config):
    model = models.qlora(**config) if base == "qlora" else models.lora(models.plain(**config))
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.bfloat16()
    return model


def forget(value, memo=None):
    return value


def cosines(ours, theirs) -> torch.Tensor:
    return torch.stack([
        torch.nn.functional.cosine_similarity(g.double().flatten(), theirs[name].double().flatten(), 0)
        for name, g in ours.items()
    ])  # fmt: skip


@pytest.fixture(params=BASES)
def model(request, device):
    model = build(request.param).to(device)
    for module in model.modules():  # bitsandbytes multiplies in fp32 unless told
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    return model


@pytest.fixture
def batch(device):
    return {name: value.to(device) for name, value in models.batch(2, 32).items()}


def test_the_forward_stays_exact_and_gradients_point_the_same_way(model, batch):
    exact = step(patched(model), batch)
    ours = step(patched(model, compute="fp8_backward"), batch)
    assert torch.equal(ours.loss, exact.loss)
    assert torch.equal(ours.logits, exact.logits)
    found = cosines(ours.gradients, exact.gradients)
    assert found.median() > 0.997
    assert found.min() > 0.98
    last = [name for name in exact.gradients if "layers.1.mlp.down_proj" in name]
    assert len(last) == 2
    for name in last:  # no FP8 product stands before these
        assert torch.equal(ours.gradients[name], exact.gradients[name])
    assert any(not torch.equal(ours.gradients[name], exact.gradients[name]) for name in exact.gradients)


def test_the_forward_too(model, batch):
    exact = step(patched(model), batch)
    ours = step(patched(model, compute="fp8"), batch)
    assert not torch.equal(ours.logits, exact.logits)
    assert abs(float(ours.loss - exact.loss)) < 0.02 * float(exact.loss)
    assert cosines(ours.gradients, exact.gradients).median() > 0.94


def test_recomputation_is_in_fp8_too(model, batch):
    twin = patched(model, compute="fp8_backward")
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin.enable_input_require_grads()
    ours = step(twin, batch)
    exact = step(patched(model), batch)
    assert torch.equal(ours.loss, exact.loss)
    assert cosines(ours.gradients, exact.gradients).median() > 0.99
    once = step(patched(model, compute="fp8_backward"), batch)
    assert any(not torch.equal(ours.gradients[name], once.gradients[name]) for name in once.gradients)


@pytest.mark.parametrize("exact", ["*.down_proj", "down_proj", "layers.0"])
def test_named_modules_stay_exact(model, batch, exact):
    twin = patched(model, compute="fp8", exact=(exact,))
    everything = patched(model, compute="fp8")
    note = fastplug.report(twin).notes[-1]
    assert f"{2 if 'down' in exact else 7} stay exact as told" in note
    assert not torch.equal(step(twin, batch).logits, step(everything, batch).logits)


def test_all_of_them_exact_is_exact(model, batch):
    assert torch.equal(step(patched(model, compute="fp8", exact="layers"), batch).logits,
                       step(patched(model), batch).logits)  # fmt: skip


def test_sizes_that_fp8_cannot_take_stay_exact(batch, device):
    model = build("lora", intermediate_size=136).to(device)
    exact, ours = patched(model), patched(model, compute="fp8", exact=("self_attn",))
    assert torch.equal(step(ours, batch).logits, step(exact, batch).logits)
    assert "6 stay exact because their sizes are no multiples of 16" in fastplug.report(ours).notes[-1]


def test_weights_are_quantized_once_or_each_time(model, batch, monkeypatch):
    made = []
    quantize = fp8_base._quantize

    def counted(group, transposed):
        made.append(transposed)
        return quantize(group, transposed)

    monkeypatch.setattr(fp8_base, "_quantize", counted)
    for how, expected in (("kept", 15), ("decoded", 30)):
        made.clear()
        twin = patched(model, compute="fp8", fp8_weights=how)
        first, second = step(twin, batch), step(twin, batch)
        assert len(made) == expected  # four groups a layer in two directions, but no gradient of the embedding
        assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


def test_a_memory_budget_has_no_room_for_weights_that_auto_would_keep(model):
    def keep(**options):
        fastplug.apply(model, compute="fp8", **options)
        found = next(m for m in model.modules() if "_fastplug" in m.__dict__).__dict__["_fastplug"].runtime.fp8.keep
        fastplug.undo(model)
        return found

    assert keep() is None
    assert keep(memory="keep") is False
    assert keep(memory="keep", fp8_weights="kept") is True


def test_a_kept_weight_that_changes_is_quantized_again(batch, device):
    model = build("lora").to(device)
    twin = patched(model, compute="fp8", fp8_weights="kept")
    before = step(twin, batch)
    with torch.no_grad():
        twin.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.mul_(2)
        model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.mul_(2)
    after = step(twin, batch)
    assert not torch.equal(after.logits, before.logits)
    assert torch.equal(after.logits, step(patched(model, compute="fp8"), batch).logits)


def test_trained_weights_stay_exact(batch, device):
    model = models.plain().to(torch.bfloat16).to(device)
    exact, ours = step(patched(model), batch), step(patched(model, compute="fp8"), batch)
    assert all(torch.equal(ours.gradients[name], exact.gradients[name]) for name in exact.gradients)


def test_undo_gives_the_exact_model_back(model, batch):
    before = step(model, batch)
    fastplug.apply(model, compute="fp8")
    step(model, batch)
    fastplug.undo(model)
    assert torch.equal(step(model, batch).logits, before.logits)


def test_bad_input(model, monkeypatch):
    with pytest.raises(OptionError, match="names no frozen linear module"):
        fastplug.apply(model, compute="fp8", exact=("k_projection",))
    with pytest.raises(OptionError, match="set compute"):
        fastplug.Options(exact=("down_proj",))
    with pytest.raises(OptionError, match="compute cannot be 'fp4'"):
        fastplug.Options(compute="fp4")
    monkeypatch.setattr("fastplug.patching.fp8.fp8_reason", lambda *_: "FP8 products need compute capability 8.9")
    with pytest.raises(OptionError, match=r"8\.9; leave compute='exact'"):
        fastplug.apply(model, compute="fp8_backward")
    assert not any("_fastplug" in module.__dict__ for module in model.modules())


# --- what a device has ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for a GPU: ``gpu(capability)`` is one of this compute capability."""

    def make(*capability):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
        return torch.device("cuda", 0)

    forget_products = fp8_device.attempt.cache_clear
    forget_products()
    yield make
    forget_products()


def never(*args):
    pytest.fail("a product where there can be none")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_gpus_that_multiply_no_fp8(gpu, capability):
    reason = fp8_device.fp8_reason(gpu(*capability), never)
    assert "8.9 or newer" in reason
    assert f"NVIDIA Test has {capability[0]}.{capability[1]}" in reason


def test_devices_that_are_no_nvidia_gpu(monkeypatch):
    assert fp8_device.fp8_reason(torch.device("cpu"), never) is None
    assert "not mps" in fp8_device.fp8_reason(torch.device("mps"), never)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "not ROCm" in fp8_device.fp8_reason(torch.device("cuda", 0), never)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_one_product_is_tried_for_each_device(gpu, monkeypatch, capability):
    """By the product that the model will use, on the device: here, the reference on a CPU that stands in for it."""
    device, tried = gpu(*capability), []
    monkeypatch.setattr(torch, "ones", lambda *size, device, make=torch.ones: make(*size))
    monkeypatch.setattr(torch, "arange", lambda *ends, device, make=torch.arange: make(*ends))

    def product(a, a_scale, b, b_scale, dtype):
        tried.append((a.dtype, tuple(a.shape), tuple(b.shape), a_scale.dtype, tuple(a_scale.shape), dtype))
        return reference.product(a, a_scale, b, b_scale, dtype)

    for _ in range(2):
        assert fp8_device.fp8_reason(device, product) is None
    assert tried == [(torch.float8_e4m3fn, (16, 16), (16, 16), torch.float32, (16,), torch.bfloat16)]
    assert fp8_device.fp8_reason(device, lambda *args: 2 * reference.product(*args)).endswith("its result is wrong")

    def unsupported(*args):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nand more")

    reason = fp8_device.fp8_reason(device, unsupported)
    assert reason == (
        f"PyTorch {torch.__version__} has no FP8 product with a scale for each row on NVIDIA Test: "
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"
    )


def test_the_error_of_the_product_refuses_fp8_before_the_first_step(gpu, monkeypatch):
    """Exact arithmetic does not ask."""
    model, device, calls = build("lora"), gpu(12, 0), []

    def attempt(*args):
        calls.append(args)
        return "CUBLAS_STATUS_NOT_SUPPORTED"

    monkeypatch.setattr(fp8_device, "attempt", attempt)
    reason = fp8_device.fp8_reason
    monkeypatch.setattr("fastplug.patching.fp8.fp8_reason", lambda _, product: reason(device, product))
    fastplug.apply(model).undo()
    assert not calls
    with pytest.raises(OptionError, match=r"on NVIDIA Test: CUBLAS_STATUS_NOT_SUPPORTED; leave compute='exact'"):
        fastplug.apply(model, compute="fp8")
    assert calls == [(device, table_for(torch.device("cpu")).fp8.product)]
    assert not any("_fastplug" in module.__dict__ for module in model.modules())


# --- bases that are quantized themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp8_backward", "fp8"])
@pytest.mark.parametrize("base", ["fp8 blocks", "fp8 rows, compressed", "gptq", "gptq, act-order", "awq"])
def test_over_bases_of_other_formats(base, compute, device):
    """Their weights are decoded and rounded to e4m3 with scales of its own: every adapter gets its gradient."""
    model = pair(base)[0]
    for name, p in model.named_parameters():
        if p.dtype == torch.float32 and "scale" not in name:
            p.data = p.data.bfloat16()
    model, batch = model.to(device), {name: value.to(device) for name, value in models.batch(2, 32).items()}
    exact = step(patched(model), batch)
    twin = patched(model, compute=compute)
    assert any("14 frozen linear modules are computed in FP8" in note for note in fastplug.report(twin).notes)
    ours = step(twin, batch)
    assert not fallbacks(twin), fallbacks(twin)
    assert len(ours.gradients) == 28
    assert all(gradient is not None and gradient.isfinite().all() for gradient in ours.gradients.values())
    found = cosines(ours.gradients, exact.gradients)
    assert torch.equal(ours.loss, exact.loss) == (compute == "fp8_backward")
    assert abs(float(ours.loss - exact.loss)) < 0.02 * float(exact.loss)
    assert found.median() > (0.997 if compute == "fp8_backward" else 0.94)
    assert any(not torch.equal(ours.gradients[name], exact.gradients[name]) for name in exact.gradients)


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp8_backward", "fp8"])
def test_verify_reports_the_deviation_of_each_layer(model, batch, compute):
    fastplug.apply(model, compute=compute)
    found = fastplug.verify(model, batch)
    assert found.ok, [(row.name, row.error) for row in found.failed]
    assert any("passes with errors up to" in note for note in found.notes)
    layers = {row.name: row.error for row in found.rows if row.kind == "output" and "layers" in row.name}
    assert len(layers) == 2
    assert all((0.02 if compute == "fp8" else 0.0) < error < 0.12 for error in layers.values())

    norm = model.get_base_model().model.layers[1].post_attention_layernorm
    with torch.no_grad():
        norm.weight[5] *= 1e3  # an outlier: what stands beside it in a row is too small for e4m3
    found = fastplug.verify(model, batch)
    assert not found.ok
    named = [row for row in found.failed if "layers." in row.name]
    assert named
    assert all("layers.1" in row.name for row in named), [row.name for row in named]
    assert max(row.error / row.limit for row in named) > 3  # it stands out
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table(worst=0))
    assert any("NO" in line and "layers.1" in line for line in console.export_text().splitlines())


def test_verify_still_finds_a_wrong_factor_beside_fp8(model, batch, monkeypatch):
    fastplug.apply(model, compute="fp8_backward")
    quantized = fp8_base._quantize
    monkeypatch.setattr(
        fp8_base,
        "_quantize",
        lambda group, transposed: (lambda q: q._replace(scale=q.scale * 1.3))(quantized(group, transposed)),
    )
    assert not fastplug.verify(model, batch).ok


def test_an_op_that_adds_the_adapters_share_does(model, batch, device, monkeypatch):
    """The same model with the share added inside the product and after it, in every product that has one."""
    fp8, added = table_for(device).fp8, []

    def product_add(a, a_scale, b, b_scale, left, right, dtype, alpha=1.0):
        added.append(a.shape)
        y = fp8.product(a, a_scale, b, b_scale, torch.bfloat16 if a.is_cuda else torch.float32).float()
        return (y + alpha * left.float() @ right.float().t()).to(dtype)

    apart = step(patched(model, compute="fp8", kernels="reference"), batch)
    monkeypatch.setattr(reference, "product_add", product_add)
    ours = step(patched(model, compute="fp8", kernels="reference"), batch)
    assert len(added) == 15  # four groups a layer in two directions, but no gradient of the embedding
    assert abs(float(ours.loss - apart.loss)) < 0.005 * float(apart.loss)
    assert cosines(ours.gradients, apart.gradients).min() > 0.98


def test_dora_stays_exact_and_the_report_says_so(batch, device):
    model = models.lora(models.plain().bfloat16(), use_dora=True).bfloat16().to(device)
    exact = step(patched(model), batch)
    twin = patched(model, compute="fp8")
    assert any("14 stay exact because they have DoRA" in note for note in fastplug.report(twin).notes)
    ours = step(twin, batch)
    assert torch.equal(ours.logits, exact.logits)
    assert all(torch.equal(ours.gradients[name], exact.gradients[name]) for name in exact.gradients)
