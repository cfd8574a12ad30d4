"""Training with and without fastplug: loss curves, accumulation, mixed precision, repeatability."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

import fastplug
from tests import models
from tests.engine.step import Step, assert_equal, assert_parity, fallbacks, patched, step


def train(model: Any, steps: int = 20, seed: int = 5) -> list[float]:
    """Losses of AdamW steps on batches of varying length."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for i in range(steps):
        output = model(**models.batch(2, 9 + i % 5, seed=100 + i % 4))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["lora", "lora, dropout", "nf4", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_twenty_steps(family: str, kind: str) -> None:
    model = models.plain(family)
    if kind == "nf4":
        model = models.qlora(family)
    elif kind != "full":
        model = models.lora(model, lora_dropout=0.1 if kind == "lora, dropout" else 0.0)
    twin = patched(model)
    ours, theirs = train(twin), train(model)
    assert theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert not fallbacks(twin)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_accumulation_with_uneven_label_counts(family: str) -> None:
    """Four passes that share num_items_in_batch give the gradients of one batch of all rows."""
    model = models.lora(models.plain(family))
    twin = patched(model)
    batch = models.batch(8, 11)
    for row, count in enumerate((0, 9, 3, 10, 1, 10, 5, 7)):  # labels to ignore
        batch["labels"][row, :count] = -100
    items = int((batch["labels"][:, 1:] != -100).sum())
    whole = step(model, batch, logits=False)
    twin.zero_grad()
    total = torch.zeros(())
    for start in range(0, 8, 2):
        part = {name: value[start : start + 2] for name, value in batch.items()}
        loss = twin(**part, num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert_equal(Step(total, None, gradients), whole)


class Errors:
    """Root mean square errors over several batches, patched and unpatched, of everything in a step.

    One batch of a tiny model is a single draw: PyTorch's error of its loss may happen to be next to nothing.
    """

    def __init__(self) -> None:
        self.ours: Counter[str] = Counter()
        self.theirs: Counter[str] = Counter()

    def add(self, ours: Step, theirs: Step, truth: Step) -> None:
        for total, part in ((self.ours, ours), (self.theirs, theirs)):
            for name, value in _tensors(part).items():
                total[name] += float((value.double() - _tensors(truth)[name].double()).pow(2).sum())  # type: ignore
        for name, value in _tensors(theirs).items():
            assert _tensors(ours)[name].dtype == value.dtype, name

    def check(self) -> None:
        for name, theirs in self.theirs.items():
            factor = 4.0 if name == "loss" else 1.5  # the loss is one number a batch, the rest are thousands
            ours = self.ours[name]
            assert ours**0.5 <= factor * theirs**0.5, f"{name}: error {ours**0.5:.2e}, PyTorch's own {theirs**0.5:.2e}"


def _tensors(part: Step) -> dict[str, torch.Tensor]:
    gradients = {name: grad for name, grad in part.gradients.items() if grad is not None}
    return {"loss": part.loss, **({} if part.logits is None else {"logits": part.logits}), **gradients}


@pytest.mark.parametrize("kind", ["lora", "nf4", "full", "prepared nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast(family: str, dtype: torch.dtype, kind: str) -> None:
    """As near to fp32 as PyTorch in the same autocast."""
    model = precision_case(family, kind)
    twin, errors = patched(model), Errors()
    for seed in range(6):
        batch = models.batch(2, 21, seed=seed)
        truth = step(model, batch)
        with torch.autocast("cpu", dtype):
            errors.add(step(twin, batch), step(model, batch), truth)
    errors.check()
    assert not fallbacks(twin), fallbacks(twin)


def test_autocast_with_dropout() -> None:
    """The masks are PEFT's under autocast too: the losses differ by rounding, not by a mask."""
    model = precision_case("llama", "lora, dropout")
    twin, batch = patched(model), models.batch(2, 21)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(step(twin, batch, seed=3), step(model, batch, seed=3), bound=0.15)


def precision_case(family: str, kind: str) -> Any:
    if kind == "full":
        return models.plain(family)
    if kind == "lora":
        return models.lora(models.plain(family))
    if kind == "lora, dropout":
        return models.lora(models.plain(family), lora_dropout=0.2)
    base = models.quantized(models.plain(family))
    if kind == "prepared nf4":
        import peft

        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return models.lora(base)


@pytest.mark.parametrize("adapters", ["same dtype", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_sixteen_bit_models(family: str, dtype: torch.dtype, adapters: str) -> None:
    """Weights in 16 bits: with adapters in 16 bits and no autocast, and as PEFT makes them: in fp32, with autocast."""
    low = models.lora(models.plain(family).to(dtype))
    assert next(p for p in low.parameters() if p.requires_grad).dtype == torch.float32
    if adapters != "fp32":
        low = low.to(dtype)
    exact = copy.deepcopy(low).float()
    twin, errors = patched(low), Errors()
    for seed in range(4):
        batch = models.batch(2, 21, seed=seed)
        with torch.autocast("cpu", dtype, enabled=adapters == "fp32"):
            errors.add(step(twin, batch), step(low, batch), step(exact, batch))
    errors.check()
    assert not fallbacks(twin), fallbacks(twin)


def test_mixed_precision_without_autocast_falls_back() -> None:
    """An fp32 stream over a 16-bit base is PEFT's own mixture of precisions: the original forward runs."""
    model = models.lora(models.plain())
    for module in model.modules():
        if type(module).__module__ == "peft.tuners.lora.layer" and hasattr(module, "base_layer"):
            module.base_layer.to(torch.bfloat16)
    twin = patched(model)
    outcome = []
    for part in (twin, model):
        try:
            outcome.append(step(part, models.batch()))
        except RuntimeError as error:
            outcome.append(str(error))
    if isinstance(outcome[1], str):  # what PyTorch refuses, the patched model refuses with the same words
        assert outcome[0] == outcome[1]
    else:
        assert_equal(outcome[0], outcome[1])  # type: ignore[arg-type]
    assert any("without autocast" in reason for reason in fallbacks(twin))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["lora, dropout", "nf4", "full"])
def test_the_same_seed_gives_the_same_bits(kind: str) -> None:
    twin = patched(precision_case("qwen3", kind))
    batch = models.batch(2, 21)
    first = step(twin, batch, seed=11)
    assert_equal(step(twin, batch, seed=11), first, bound=0)
    with deterministic():
        assert_equal(step(twin, batch, seed=11), first, bound=0)
    if kind == "lora, dropout":
        assert step(twin, batch, seed=12).loss != first.loss


def test_residual_dtype() -> None:
    """residual_dtype makes the stream bf16 where PEFT's preparation had made it fp32."""
    model = precision_case("llama", "prepared nf4")
    twin = patched(model, residual_dtype="bfloat16")
    dtypes: set[torch.dtype] = set()
    inner = twin.get_base_model().model  # type: ignore[operator]
    inner.layers[-1].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(twin, models.batch()), step(model, models.batch())
    assert dtypes == {torch.bfloat16}
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=2e-2)


def test_the_adapter_of_a_loaded_4_bit_model(tmp_path: Any) -> None:
    """The whole way: from_pretrained in 4 bits, prepare_model_for_kbit_training, a LoRA adapter."""
    import peft
    import transformers

    models.plain("llama").save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    base = peft.prepare_model_for_kbit_training(base)
    model = models.lora(base)
    batch: Mapping[str, Any] = models.batch()
    assert_parity(model, batch)


@pytest.mark.parametrize("double", [True, False])
def test_evaluation_between_two_4_bit_steps(double: bool) -> None:
    """bitsandbytes repacks its weights in evaluation on CPUs with AVX512-bf16, rounding their scales, and cannot train
    on what comes out. The patched model can, and more evaluations change nothing."""
    model = models.qlora(double=double)
    twin, batch = patched(model), models.batch()
    before = step(twin, batch)
    after = []
    for _ in range(3):
        with torch.no_grad():
            ours, theirs = twin.eval()(**batch).loss, model.eval()(**batch).loss
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
        after.append(step(twin.train(), batch))
    assert_equal(after[0], before, bound=0.1)
    assert_equal(after[1], after[0], bound=0)
    assert_equal(after[2], after[0], bound=0)
    fastplug.undo(twin)
    assert_equal(step(twin, batch), after[0])
