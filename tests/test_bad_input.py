"""Bad input: one clear sentence that names the module and the way out, or a fallback that the report shows.

A failing bind, uncovered adapters and weights on the meta device behind accelerate's hooks are in tests/engine.
"""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.ops.table import table_for
from tests import models
from tests.engine.step import assert_equal, fallbacks, patched, relative, step


def unpatched(model: nn.Module) -> None:
    with pytest.raises(fastplug.ModelError, match="not patched"):
        fastplug.report(model)


@pytest.mark.parametrize("call", [fastplug.apply, fastplug.undo, fastplug.report, fastplug.verify])
@pytest.mark.parametrize("thing", ["meta-llama/Llama-3.1-8B", None, {"model": 1}, nn.Linear])
def test_not_a_model(call: Any, thing: Any) -> None:
    with pytest.raises(fastplug.ModelError, match=rf"needs a torch\.nn\.Module, not {type(thing).__name__}"):
        call(thing)


def test_nothing_to_patch() -> None:
    with pytest.raises(fastplug.ModelError, match="Identity has no parameters"):
        fastplug.apply(nn.Identity())
    model = nn.Sequential(nn.Linear(3, 3))
    report = fastplug.apply(model).report
    assert not report.patched
    assert "no family row matches torch.nn.modules.container.Sequential" in report.notes[0]
    assert report.notes[0] in report.summary()


@pytest.mark.parametrize("part", ["all", "one"])
def test_weights_on_the_meta_device(part: str) -> None:
    model = models.plain()
    if part == "all":
        model.to("meta")
    else:
        model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(fastplug.ModelError, match=r"parameter \S+ is on the meta device.*load them first.*doctor"):
        fastplug.apply(model)
    unpatched(model)
    assert not any(hasattr(type(module), "_fastplug_base") for module in model.modules())


class OddlyQuantized(nn.Module):
    """A linear layer in a format that nobody registered."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight.detach() * 100).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) / 100)  # type: ignore[operator]


def test_a_quantization_without_a_codec() -> None:
    model = models.plain()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = OddlyQuantized(mlp.up_proj)
    twin = copy.deepcopy(model)
    report = fastplug.apply(twin).report
    reasons = {(d.role, d.name): d.reason for d in report.refused}
    assert reasons.keys() == {("decoder_layer", "model.layers.0"), ("mlp", "model.layers.0.mlp")}
    assert all("up_proj" in str(why) and "OddlyQuantized" in str(why) for why in reasons.values())
    assert "OddlyQuantized" in report.summary()
    assert_equal(step(twin, models.batch()), step(model, models.batch()))
    with pytest.raises(fastplug.StrictError, match="OddlyQuantized"):
        fastplug.apply(copy.deepcopy(model), strict=True)


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    if distributed.is_initialized():
        pytest.skip("a process group is running")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_head_that_is_sharded(mesh: Any) -> None:
    """Never a wrong number: the loss is the unsharded one's, or the head is refused by name."""
    from torch.distributed.tensor import Shard, distribute_tensor

    whole, model = models.plain(), models.plain()
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    applied = fastplug.apply(model)
    refused = {d.role: str(d.reason) for d in applied.report.refused}
    if "lm_head_loss" in refused:
        assert "lm_head" in refused["lm_head_loss"]
        assert "DTensor" in refused["lm_head_loss"] or "shard" in refused["lm_head_loss"]
    else:
        assert relative(step(model, models.batch(), logits=False).loss, step(whole, models.batch()).loss) < 1e-5
    applied.undo()
    unpatched(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_not_a_number_in_the_inputs(value: float, kind: str) -> None:
    """It goes where PyTorch lets it go and nowhere else."""
    model = models.lora(models.plain()) if kind == "lora" else models.plain()
    twin = patched(model)
    batch = models.batch()
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().clone()
    embedded[1, 6, 3] = value
    clean, dirty = step(twin, {**batch, "inputs_embeds": embedded}), step(model, {**batch, "inputs_embeds": embedded})
    assert clean.loss.isnan()
    assert dirty.loss.isnan()
    assert clean.logits is not None
    assert dirty.logits is not None
    assert torch.equal(clean.logits.isfinite(), dirty.logits.isfinite())
    finite = dirty.logits.isfinite()
    assert finite[0].all()
    assert not finite[1, 6:].any()
    torch.testing.assert_close(clean.logits[finite], dirty.logits[finite], rtol=1e-4, atol=1e-4)
    for name, grad in dirty.gradients.items():
        mine = clean.gradients[name]
        assert (mine is None) == (grad is None), name
        assert mine is None or mine.isfinite().all() == grad.isfinite().all(), name
    # The next step does not remember it.
    assert_equal(step(twin, models.batch()), step(model, models.batch()))


@pytest.mark.parametrize("label", [models.VOCABULARY, 10**9, -1, -101])
def test_labels_out_of_range(label: int) -> None:
    model = models.lora(models.plain())
    twin, batch = patched(model), models.batch()
    batch["labels"][1, 4] = label
    with pytest.raises((ValueError, IndexError), match=rf"target.* {label}\b.*{models.VOCABULARY}"):
        step(twin, batch)
    with pytest.raises((RuntimeError, IndexError)):
        step(model, batch)
    assert_equal(step(twin, models.batch()), step(model, models.batch()))


# --- devices and installations ----------------------------------------------------------------------------------------


def run(code: str, *blocked: str, platform: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a Python in which packages are not installed, and that says it is another platform."""
    head = f"""
import importlib.util, sys
blocked = {blocked!r}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in blocked else find(name, package)
"""
    if platform is not None:
        head += f"import torch, transformers.models.llama.modeling_llama\nsys.platform = {platform!r}\n"
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, cwd=root, env=environment, timeout=300
    )


STEP = """
import copy
import torch
import fastplug
from tests import models
model = models.lora(models.plain()) if LORA else models.plain()
twin = copy.deepcopy(model)
applied = fastplug.apply(twin)
assert applied.report.patched and not applied.report.refused, applied.report.summary()
assert set(applied.report.ops.values()) <= {"reference", "bitsandbytes"}, applied.report.ops
for part in (twin, model):
    part(**models.batch()).loss.backward()
for mine, other in zip(twin.parameters(), model.parameters()):
    assert (mine.grad is None) == (other.grad is None)
    assert mine.grad is None or float((mine.grad - other.grad).abs().max()) <= 1e-5 * float(other.grad.abs().max())
assert "triton" not in sys.modules
try:
    fastplug.apply(copy.deepcopy(model), kernels="triton")
except fastplug.OptionError as error:
    print(error)
"""


@pytest.mark.parametrize(("platform", "lora"), [(None, True), ("win32", False), ("darwin", False)])
def test_without_triton(platform: str | None, lora: bool) -> None:
    """Linux without Triton; Windows and macOS, for which there is none, and without PEFT and bitsandbytes at that."""
    blocked = ("triton",) if lora else ("triton", "peft", "bitsandbytes", "accelerate")
    done = run(f"LORA = {lora}\n" + STEP, *blocked, platform=platform)
    assert done.returncode == 0, done.stderr
    message = done.stdout.strip().splitlines()[-1]
    assert message.startswith("fastplug: kernels='triton' is not possible on cpu: triton is not installed")
    assert message.endswith("leave kernels='auto'")


EXTRAS = """
import importlib
import fastplug
for name, use in {
    "hf": lambda: __import__("fastplug_hf").FastPlugCallback,
    "cli": lambda: importlib.import_module("fastplug.cli.loading").outline("model"),
}.items():
    try:
        use()
    except fastplug.MissingExtra as error:
        assert isinstance(error, ImportError)
        print(error)
"""


def test_a_missing_extra_is_named() -> None:
    done = run(EXTRAS, "transformers", "peft")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, lines
    for line in lines:
        assert "needs the package transformers: pip install 'fastplug[hf]'" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    report = fastplug.apply(models.plain()).report
    assert report.device == "cpu"
    assert set(report.ops.values()) <= {"reference", "bitsandbytes"}


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    table_for.cache_clear()
    yield
    table_for.cache_clear()


class OutOfResources(Exception):
    """Named as Triton's."""


@pytest.mark.usefixtures("fresh_tables")
def test_a_device_too_small_for_a_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel's launch fails, the reference takes its place from then on, the report shows it."""
    pytest.importorskip("triton")
    from fastplug.ops.glu import kernel

    if not torch.cuda.is_available():  # the other ops run their references: the interpreter is slow
        import fastplug.ops.table as table

        monkeypatch.setattr(table, "wanted", lambda kernels, device: ("triton",))
        for op in ("rms_norm", "rope", "nf4", "logprobs"):
            reference = importlib.import_module(f"fastplug.ops.{op}.reference")
            monkeypatch.setitem(sys.modules, f"fastplug.ops.{op}.kernel", reference)
    calls = []

    def launch(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise OutOfResources("out of resource: shared memory, Required: 131072, Hardware limit: 101376.")

    monkeypatch.setattr(kernel, "backward", launch)
    model = models.plain()
    twin = patched(model)
    assert fastplug.report(twin).ops["glu"] == "triton"
    for _ in range(2):
        assert_equal(step(twin, models.batch()), step(model, models.batch()))
    assert len(calls) == 1
    shown = fastplug.report(twin).ops["glu"]
    assert "backward runs the reference" in shown
    assert "Required: 131072" in shown
    assert caplog.text.count("the device is too small for the kernel") == 1
    assert not fallbacks(twin)


@pytest.mark.usefixtures("fresh_tables")
def test_other_errors_of_a_kernel_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastplug.ops.table import Guarded

    class Functions:
        @staticmethod
        def forward() -> None:
            raise RuntimeError("planted")

    guarded = Guarded(Functions, Functions, "glu", {"glu": "triton"})
    with pytest.raises(RuntimeError, match="planted"):
        guarded.forward()


def test_kernels_do_not_compute_fp64() -> None:
    """They would do it in fp32."""
    from fastplug.ops.glu import reference
    from fastplug.ops.table import Guarded

    class Functions:
        @staticmethod
        def forward(*args: object) -> None:
            raise AssertionError("a kernel was given fp64")

    guarded = Guarded(Functions, reference, "glu", {"glu": "triton"})
    gate, up = torch.randn(2, 3, 8, dtype=torch.float64)
    out = torch.empty_like(gate)
    guarded.forward(gate, up, "silu", out)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up, rtol=1e-12, atol=0)
