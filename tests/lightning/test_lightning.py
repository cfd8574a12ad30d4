"""FastPlug in the Trainer and in Fabric: the same losses, adapter checkpoints, clean hand-back, clear refusals."""

from __future__ import annotations

import gc
import importlib
import logging
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastplug
from fastplug.errors import FastPlugError, OptionError, StrictError
from fastplug_lightning import FastPlug, plugin
from fastplug_lightning.plugin import sharding
from tests import models
from tests.lightning.setups import NAMES, Hooks, Late, Module, batches, fit, io, loader, pl, trainer

ROOT = Path(__file__).parents[2]
FUSED = {"decoder_layer", "attention", "mlp", "lm_head_loss"}


def assert_fused(model: nn.Module) -> None:
    report = fastplug.report(model)
    assert {decision.role for decision in report.patched} >= FUSED, report.summary()
    assert not report.refused, report.summary()
    assert not report.fallbacks, report.summary()


def is_patched(model: nn.Module) -> bool:
    return any("_fastplug" in module.__dict__ for module in model.modules())


def assert_same(fused: Any, plain: Any, rel: float = 1e-5) -> None:
    assert len(set(plain.losses)) > 1, "the losses do not move"
    assert fused.losses == pytest.approx(plain.losses, rel=rel)
    assert fused.validations == pytest.approx(plain.validations, rel=rel)


class Faster(Module):
    """B of the adapters learns four times as fast as A."""

    def configure_optimizers(self) -> Any:
        groups = fastplug.layers.loraplus_groups(self.llm, lr=self.rate, ratio=4, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", NAMES)
def test_losses_equal_those_without(package: str, tmp_path: Path) -> None:
    host = importlib.import_module(package)
    kind = type("Module", (Hooks, host.LightningModule), {})
    plain, fused = kind(), kind()
    fit(plain, tmp_path, package=host, validate=True)
    fit(fused, tmp_path, FastPlug(), package=host, validate=True)
    assert_fused(fused)
    assert_same(fused, plain)
    theirs = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:  # Adam turns rounding in a tiny gradient into a whole step
            assert torch.allclose(parameter, theirs[name], rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize(
    ("changes", "rel"),
    [
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, 1e-5),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 1e-5),
        ({"precision": "bf16-mixed"}, 2e-2),
        ({"precision": "bf16-true"}, 2e-2),
    ],
    ids=str,
)
def test_trainer_options(changes: dict[str, Any], rel: float, tmp_path: Path) -> None:
    plain, fused = Module(), Module()
    fit(plain, tmp_path, **changes)
    fit(fused, tmp_path, FastPlug(), **changes)
    assert_fused(fused)
    assert_same(fused, plain, rel)


def test_lora_plus(tmp_path: Path) -> None:
    plain, fused, slower = Faster(), Faster(), Module()
    fit(plain, tmp_path)
    host = fit(fused, tmp_path, FastPlug())
    fit(slower, tmp_path, FastPlug())
    assert_fused(fused)
    assert_same(fused, plain)
    assert fused.losses[0] == pytest.approx(slower.losses[0])
    assert fused.losses[-1] != pytest.approx(slower.losses[-1], rel=1e-3)
    rates = {group["name"]: group["lr"] for group in host.optimizers[0].param_groups}
    assert rates["B"] == pytest.approx(4 * rates["A and others"])
    trained = {name: parameter for name, parameter in fused.named_parameters() if parameter.requires_grad}
    of_b = {id(p) for group in host.optimizers[0].param_groups if group["name"] == "B" for p in group["params"]}
    assert of_b == {id(parameter) for name, parameter in trained.items() if "lora_B" in name}


def test_model_built_in_configure_model_and_a_trainer_used_again(tmp_path: Path) -> None:
    plain, fused = Late(), Late()
    used = {}
    for module, plugins in ((plain, ()), (fused, (FastPlug(),))):
        torch.manual_seed(0)
        host = used[module] = trainer(tmp_path, *plugins)
        host.fit(module, loader(3), loader(2))
        host.validate(module, loader(2), verbose=False)
        host.fit_loop.max_epochs = 2
        host.fit(module, loader(3), loader(2))
        assert "convert_module" not in vars(host.strategy.precision_plugin)
    assert_fused(fused)
    assert_same(fused, plain)
    assert len(fused.losses) == 6
    assert sum(type(callback).__name__ == "FastPlugCallback" for callback in used[fused].callbacks) == 1
    fastplug.undo(fused)
    assert {type(m) for m in fused.modules()} == {type(m) for m in plain.modules()}


class Pair(Module):
    """A student that learns from a frozen teacher; both are transformers, held where it suits the user."""

    def __init__(self) -> None:
        super().__init__(lambda: models.lora(models.plain()))
        self.parts = nn.ModuleDict({"teacher": models.plain("qwen2").requires_grad_(False).eval()})

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        with torch.no_grad():
            target = self.parts["teacher"](input_ids=batch["input_ids"]).logits.softmax(-1)
        out = self.llm(**batch)
        loss = out.loss - (target * out.logits.log_softmax(-1)).mean()
        self.losses.append(loss.item())
        return loss  # type: ignore[no-any-return]


def test_several_models_in_one_module(tmp_path: Path) -> None:
    plain, fused = Pair(), Pair()
    fit(plain, tmp_path)
    fit(fused, tmp_path, FastPlug())
    assert_same(fused, plain)
    patched = {decision.name.split(".")[0] for decision in fastplug.report(fused).patched}
    assert patched == {"llm", "parts"}


def test_early_stopping_stops_at_the_same_epoch(tmp_path: Path) -> None:
    ends = []
    runs = Module(), Module()
    for module, plugins in zip(runs, ((), (FastPlug(),))):
        stop = pl.callbacks.EarlyStopping("val_loss", patience=0, min_delta=0.4)
        host = fit(module, tmp_path, *plugins, validate=True, max_epochs=5, count=2, callbacks=[stop])
        ends.append((host.current_epoch, stop.best_score.item()))
    assert ends[0][0] == ends[1][0] < 5
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-5)
    assert_same(runs[1], runs[0])


class Ranked(Module):
    """Writes what its rank saw, since a forked process hands no attribute back."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def train_dataloader(self) -> Any:
        rank, data = self.global_rank, batches(6)
        return torch.utils.data.DataLoader(data[rank::2], batch_size=None)  # type: ignore[arg-type]

    def on_train_end(self) -> None:
        wrapped = type(self.trainer.model).__name__
        torch.save((self.losses, wrapped, is_patched(self)), self.folder / f"rank{self.global_rank}")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_ddp_on_two_processes(tmp_path: Path) -> None:
    seen = []
    for name, plugins in (("plain", ()), ("fused", (FastPlug(),))):
        folder = tmp_path / name
        folder.mkdir()
        host = trainer(tmp_path, *plugins, strategy="ddp_fork", devices=2, use_distributed_sampler=False)
        host.fit(Ranked(folder))
        seen.append([torch.load(folder / f"rank{rank}") for rank in (0, 1)])
    for plain, fused in zip(*seen):
        assert (plain[1], plain[2]) == ("DistributedDataParallel", False)
        assert (fused[1], fused[2]) == ("DistributedDataParallel", True)
        assert len(plain[0]) == 3
        assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    assert seen[0][0][0] != seen[0][1][0]


def test_plugin_and_callback_reach_spawned_processes() -> None:
    plug = pickle.loads(pickle.dumps(FastPlug(checkpoint="adapter", undo_at_end=True, disable=("norm",))))
    assert (plug.checkpoint, plug.undo_at_end, plug.options.disable) == ("adapter", True, ("norm",))
    callback = next(c for c in trainer(Path("."), plug).callbacks if type(c).__name__ == "FastPlugCallback")
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved(folder: Path, module: Any, *plugins: Any, **changes: Any) -> str:
    """Train one epoch of three steps and save; the checkpoint's path."""
    keep = pl.callbacks.ModelCheckpoint(folder, "first")
    fit(module, folder, *plugins, count=3, callbacks=[keep], enable_checkpointing=True, **changes)
    return str(folder / "first.ckpt")


def resumed(folder: Path, path: str, module: Any, *plugins: Any, **changes: Any) -> list[float]:
    """The losses of a second epoch, from a checkpoint of the first."""
    fit(module, folder, *plugins, count=3, max_epochs=2, ckpt_path=path, **changes)
    return module.losses  # type: ignore[no-any-return]


def qlora() -> Any:
    pytest.importorskip("bitsandbytes")
    return models.qlora()


@pytest.mark.parametrize("base", [None, "async"])
@pytest.mark.parametrize("make", [None, qlora], ids=["lora", "qlora"])
def test_resume_from_an_adapter_checkpoint(make: Any, base: str | None, tmp_path: Path) -> None:
    def plug() -> FastPlug:
        return FastPlug(checkpoint="adapter", base=io.AsyncCheckpointIO() if base else None)

    whole = Module(make)
    fit(whole, tmp_path, count=3, max_epochs=2)
    path = saved(tmp_path, Module(make), plug())
    content = torch.load(path, weights_only=False)
    assert content["state_dict"]
    assert all("lora_" in name for name in content["state_dict"])
    assert content["optimizer_states"]
    assert content["lr_schedulers"]
    assert content["loops"]
    assert resumed(tmp_path, path, Module(make), plug()) == pytest.approx(whole.losses[3:], rel=1e-5)


def test_adapter_checkpoint_resumes_as_a_full_one_does(tmp_path: Path) -> None:
    for kind in ("full", "adapter"):
        (tmp_path / kind).mkdir()
    full = saved(tmp_path / "full", Module(), FastPlug())
    adapter = saved(tmp_path / "adapter", Module(), FastPlug(checkpoint="adapter"))
    assert 3 * Path(adapter).stat().st_size < Path(full).stat().st_size
    expected = resumed(tmp_path, full, Module())  # patched to plain
    assert len(expected) == 3
    assert resumed(tmp_path, adapter, Module(), FastPlug(checkpoint="adapter")) == pytest.approx(expected, rel=1e-5)
    assert resumed(tmp_path, adapter, Late(), FastPlug()) == pytest.approx(expected, rel=1e-5)  # restored all the same
    assert resumed(tmp_path, full, Module(), FastPlug(checkpoint="adapter")) == pytest.approx(expected, rel=1e-5)
    unaided = Module()  # the way to load one without fastplug
    unaided.strict_loading = False
    assert resumed(tmp_path, adapter, unaided) == pytest.approx(expected, rel=1e-5)


def test_best_checkpoint_is_found_and_an_evaluation_restores_it(tmp_path: Path) -> None:
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, mode="min")
    module = Module()
    changes = {"callbacks": [keep], "enable_checkpointing": True, "max_epochs": 2}
    host = fit(module, tmp_path, FastPlug(checkpoint="adapter"), validate=True, **changes)
    other = Module()
    result = host.validate(other, loader(2), ckpt_path="best", verbose=False)
    assert result[0]["val_loss"] == pytest.approx(keep.best_model_score.item(), rel=1e-5)


def test_what_else_is_trained_or_changes_stays_in_the_checkpoint(tmp_path: Path) -> None:
    class More(Module):
        def __init__(self) -> None:
            super().__init__(lambda: models.lora(models.plain(), modules_to_save=["lm_head"]))
            self.llm.add_adapter("idle", self.llm.peft_config["default"])
            self.norm = nn.BatchNorm1d(3).requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(()))
            self.thawed = nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.norm(torch.randn(4, 3))
            return super().training_step(batch, index) * self.scale * self.thawed

        def on_train_end(self) -> None:
            self.thawed.requires_grad_(False)

    path = saved(tmp_path, More(), FastPlug(checkpoint="adapter"))
    kept = torch.load(path, weights_only=False)["state_dict"]
    assert {"scale", "thawed", "norm.running_mean", "norm.num_batches_tracked"} <= set(kept)
    assert "norm.weight" not in kept
    assert not any("original_module" in name for name in kept)
    assert any("modules_to_save" in name for name in kept)
    assert any(".idle." in name for name in kept)
    assert not any("base_layer" in name or "embed_tokens" in name for name in kept)
    assert len(resumed(tmp_path, path, More(), FastPlug(checkpoint="adapter"))) == 3


def test_adapter_on_another_base_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Module(), FastPlug(checkpoint="adapter"))
    other = Module(lambda: models.lora(models.plain(seed=9)))
    with pytest.raises(FastPlugError, match="another base model"):
        resumed(tmp_path, path, other, FastPlug(checkpoint="adapter"))


def test_adapter_checkpoint_is_refused_where_it_could_not_be_resumed(tmp_path: Path) -> None:
    strategies = importlib.import_module(f"{NAMES[0]}.strategies")

    class Own(strategies.SingleDeviceStrategy):  # type: ignore[misc, name-defined]
        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    module = Module()
    with pytest.raises(FastPlugError, match=r"checkpoint='adapter' cannot work with Own"):
        fit(module, tmp_path, FastPlug(checkpoint="adapter"), strategy=Own("cpu"), accelerator="auto")
    assert not is_patched(module)
    for name in ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"):
        assert sharding(object.__new__(getattr(strategies, name)))
    for name in ("DDPStrategy", "SingleDeviceStrategy"):
        assert not sharding(object.__new__(getattr(strategies, name)))


def test_another_checkpoint_io_around_fastplug(tmp_path: Path) -> None:
    module = Module()
    path = saved(tmp_path, module, io.AsyncCheckpointIO(FastPlug(checkpoint="adapter")))
    assert is_patched(module)
    assert all("lora_" in name for name in torch.load(path, weights_only=False)["state_dict"])


# --- giving back, metrics, Fabric -------------------------------------------------------------------------------------


def test_undo(tmp_path: Path) -> None:
    plug, module = FastPlug(), Module()
    fit(module, tmp_path, plug)
    assert is_patched(module)
    plug.undo()
    assert not is_patched(module)
    fit(module, tmp_path, FastPlug(undo_at_end=True))
    assert not is_patched(module)


def test_what_waits_for_the_next_step_goes_at_the_end(tmp_path: Path) -> None:
    class Look(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            waiting.append(models.kept_weights(self.llm).handed)

    waiting: list[int] = []
    module = Look(qlora)
    data = DataLoader([models.batch(4, 64)] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer(tmp_path, FastPlug(base_weights="once", graphs="off")).fit(module, data)
    assert len(waiting) == 2
    assert all(waiting)
    assert is_patched(module)
    assert models.kept_weights(module).handed == 0


@pytest.mark.parametrize(("error", "undo_at_end"), [(KeyboardInterrupt, False), (RuntimeError, True)])
def test_interrupted(error: type[BaseException], undo_at_end: bool, tmp_path: Path) -> None:
    class Broken(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            assert is_patched(self)
            raise error

    module = Broken()
    with pytest.raises((error, SystemExit)):
        fit(module, tmp_path, FastPlug(undo_at_end=undo_at_end))
    assert not is_patched(module)


def test_metrics_go_to_the_logger_and_the_summary_is_printed_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastplug")
    loggers = importlib.import_module(f"{NAMES[0]}.loggers")
    log = loggers.CSVLogger(tmp_path)
    module = Module()
    host = fit(module, tmp_path, FastPlug(), logger=log, log_every_n_steps=2, max_epochs=2, validate=True)
    host.validate(module, loader(2), verbose=False)
    rows = [row.split(",") for row in (Path(log.log_dir) / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("fastplug/tokens_per_second")
    speeds = [float(row[column]) for row in rows[1:] if row[column]]
    assert len(speeds) == 6
    assert min(speeds) > 0
    column = rows[0].index("fastplug/peak_memory_gib")
    assert all(0.01 < float(row[column]) < 100 for row in rows[1:] if row[column])
    assert sum("decoder_layer (" in record.getMessage() for record in caplog.records) == 1


def test_nothing_is_added_where_no_fastplug_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "alive", weakref.WeakSet())  # other tests' fixtures may hold some
    plug = FastPlug()
    bystander = Module()
    fit(bystander, tmp_path)
    assert not is_patched(bystander)
    used = trainer(tmp_path, plug)
    del plug, used
    gc.collect()
    assert not any("FastPlug" in type(callback).__name__ for callback in trainer(tmp_path).callbacks)


def test_exports_when_fit_ends(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, FastPlug(export={"lora": {"overwrite": True}}), count=2)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    with pytest.raises(OptionError, match="did you mean 'lora'"):
        FastPlug(export="lorra")


@pytest.mark.parametrize("apart", [False, True])
def test_fabric(apart: bool) -> None:
    fabric_of = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
    Fabric = importlib.import_module(fabric_of[NAMES[0]]).Fabric
    losses: list[list[float]] = []
    for plugins in (None, [FastPlug()]):
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
        fabric.launch()
        model = models.lora(models.plain())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if apart:
            wrapped, optimizer = fabric.setup_module(model), fabric.setup_optimizers(optimizer)
        else:
            wrapped, optimizer = fabric.setup(model, optimizer)
        losses.append([])
        for batch in batches():
            loss = wrapped(**batch).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        assert is_patched(model) == (plugins is not None)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(FastPlugError, match=r"fabric\.save"):
        Fabric(accelerator="cpu", devices=1, plugins=[FastPlug(checkpoint="adapter")])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_options() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'kernel'; did you mean 'kernels'\?"):
        FastPlug(kernel="triton")
    with pytest.raises(OptionError, match=r"checkpoint cannot be 'lora'; one of 'full', 'adapter'"):
        FastPlug(checkpoint="lora")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="undo_at_end must be true or false"):
        FastPlug(undo_at_end="yes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"base must be a CheckpointIO such as AsyncCheckpointIO\(\)"):
        FastPlug(base=io.AsyncCheckpointIO)
    for inner in (FastPlug(), io.AsyncCheckpointIO(FastPlug())):
        with pytest.raises(OptionError, match="another FastPlug"):
            FastPlug(base=inner)


def test_two_in_one_trainer(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="multiple values for CheckpointIO"):
        trainer(tmp_path, FastPlug(), FastPlug())


def test_passed_as_a_callback(tmp_path: Path) -> None:
    module = Module()
    # Before 2.6 Lightning gets there first, and asks for a Callback in its own words.
    with pytest.raises(
        (AttributeError, ValueError), match=r"FastPlug belongs into Trainer\(plugins=|Expected a parent"
    ):
        fit(module, tmp_path, callbacks=[FastPlug()])
    assert not is_patched(module)


def test_module_without_a_transformer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Linear(Module):
        def __init__(self) -> None:
            super().__init__(lambda: nn.Linear(12, 1))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.llm(batch["input_ids"].float()).square().mean()  # type: ignore[no-any-return]

    fit(Linear(), tmp_path, FastPlug())
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("no family row matches" in text for text in warned)
    host = trainer(tmp_path, FastPlug(strict=True))
    with pytest.raises(StrictError, match="nothing was patched"):
        host.fit(Linear(), loader())
    assert "convert_module" not in vars(host.strategy.precision_plugin)


def test_module_without_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Nothing(pl.LightningModule):  # type: ignore[misc, name-defined]
        def validation_step(self, batch: Any, index: int) -> None: ...

    trainer(tmp_path, FastPlug()).validate(Nothing(), loader(1), verbose=False)
    assert "has no parameters, so there is nothing to patch; the run goes on without fastplug" in caplog.text
    with pytest.raises(FastPlugError, match="has no parameters"):
        trainer(tmp_path, FastPlug(strict=True)).validate(Nothing(), loader(1), verbose=False)


def test_entry_points_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **group: [])
    with pytest.raises(FastPlugError, match="entry points are not installed"):
        FastPlug()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_script_of_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "lightning.md").read_text()
    if "lightning.pytorch" not in NAMES:
        page = page.replace("import lightning as L", "import pytorch_lightning as L")
    script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "decoder_layer (" in done.stderr
    assert "tokens per second" in done.stdout
