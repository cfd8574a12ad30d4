"""FastPlug: a CheckpointIO, because that is the one kind of Lightning plugin that conflicts with nothing else.

A Precision plugin would forbid any ``precision=``. As a CheckpointIO, FastPlug stands in for the one that the strategy
would use, and hands everything on to it; what patches the model is the callback of :mod:`fastplug_lightning.callback`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

import fastplug
from fastplug import checkpoints
from fastplug.errors import FastPlugError, MissingExtra, OptionError
from fastplug.metrics import Meter
from fastplug.run_exports import Exports, describe, export_each, exportable, parse_exports

logger = logging.getLogger("fastplug")
alive: weakref.WeakSet[FastPlug] = weakref.WeakSet()
PACKAGES = {"lightning.fabric": "lightning.pytorch", "lightning_fabric": "pytorch_lightning"}


class FastPlug:
    """Apply fastplug to the models of a Trainer or a Fabric: ``Trainer(plugins=[FastPlug()])``.

    Args:
        checkpoint: ``"adapter"`` leaves the frozen base weights out of the checkpoints; the optimizer's and the loops'
            state, trained weights and buffers stay in. Such a checkpoint is restored into the same base model.
        base: The CheckpointIO that does the writing and reading, say ``AsyncCheckpointIO()``; the strategy's own by
            default.
        undo_at_end: Give the models back as they were when ``fit``, ``validate``, ``test`` or ``predict`` ends, in
            whatever way. By default they stay patched (and save, load and generate as before), except after a Ctrl-C.
        export: What to write into ``<default_root_dir>/<format>`` when ``fit`` ends well, on the first rank: a format
            of :func:`fastplug.export` (``"merged_16bit"``), several, or a mapping of formats to their options. A module
            that holds several models gets a folder for each, by its attribute's name.
        options: The keys of :class:`fastplug.Options`.

    Logs ``fastplug/tokens_per_second`` (unpadded tokens of all ranks over the time spent training) and
    ``fastplug/peak_memory_gib`` (the highest of all ranks) at each logged training step.

    Raises:
        OptionError: An option is unknown or impossible.
        FastPlugError: fastplug's entry points are not installed.
        MissingExtra: Neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """

    def __init__(
        self,
        *,
        checkpoint: Literal["full", "adapter"] = "full",
        base: Any = None,
        undo_at_end: bool = False,
        export: Exports | None = None,
        **options: Any,
    ) -> None:
        if checkpoint not in ("full", "adapter"):
            raise OptionError(f"fastplug: checkpoint cannot be {checkpoint!r}; one of 'full', 'adapter'")
        if not isinstance(undo_at_end, bool):
            raise OptionError(f"fastplug: undo_at_end must be true or false, not {undo_at_end!r}")
        self.options = fastplug.Options.of(options, also=("checkpoint", "base", "undo_at_end", "export"))
        self.exports = parse_exports(export)
        _require_checkpoint_io(base)
        self.checkpoint, self.undo_at_end, self._base = checkpoint, undo_at_end, base
        self.meter = Meter()
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._trainer: Callable[[], Any] = lambda: None
        self._said: set[str] = set()
        register()
        _require_entry_points()
        alive.add(self)

    def __reduce__(self) -> Any:  # to processes that the trainer spawns
        own = {"checkpoint": self.checkpoint, "base": self._base, "undo_at_end": self.undo_at_end}
        own["export"] = self.exports
        return _rebuild, ({**vars(self.options), **own},)

    def __getattr__(self, name: str) -> Any:
        if name == "setup" or name.startswith("on_"):
            raise AttributeError("fastplug: FastPlug belongs into Trainer(plugins=[FastPlug()]), not into callbacks")
        raise AttributeError(f"'FastPlug' object has no attribute {name!r}")

    def connect(self, trainer: Any) -> None:
        """Take the trainer's model as the one that the coming checkpoints belong to.

        Raises:
            FastPlugError: Adapter checkpoints are asked for and the strategy would not pass them through here.
        """
        self._trainer = weakref.ref(trainer)
        if self.checkpoint == "adapter" and sharding(trainer.strategy):
            raise FastPlugError(
                f"fastplug: checkpoint='adapter' cannot work with {type(trainer.strategy).__name__}, which reads (and "
                "where it shards also writes) its checkpoints itself and not through a CheckpointIO; use "
                "FastPlug() without checkpoint, or a strategy such as 'ddp'"
            )

    def apply(self, model: nn.Module, speak: bool = True) -> None:
        """Patch every transformers model inside ``model``, and say so once.

        Raises:
            ModelError: There are no weights (yet).
            StrictError: With ``strict=True``, where not all was patched; nothing is patched then.
        """
        report = fastplug.apply(model, self.options).report
        self._models.add(model)
        if speak:
            self.say(report.summary(), logging.INFO if report.patched else logging.WARNING)

    def export(self, module: nn.Module, folder: str) -> None:
        """Write what the option ``export`` asks for of every model inside ``module``."""
        for name, model in exportable(module).items() if self.exports else ():
            where = folder if len(exportable(module)) == 1 else os.path.join(folder, name)
            for result in export_each(model, where, self.exports, strict=self.options.strict):
                self.say(describe(result))

    def undo(self) -> None:
        """Give every model that this plugin patched back as it was. The next ``fit`` patches again."""
        self.meter.stop()
        for model in list(self._models):
            fastplug.undo(model)
        self._models.clear()

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Log each text once; as a warning where INFO would be lost, since a run must say that fastplug is at work."""
        if text not in self._said:
            self._said.add(text)
            shown = logger.isEnabledFor(level) and logger.hasHandlers()
            for line in text.splitlines():
                logger.log(level if shown else logging.WARNING, line)

    @property
    def checkpoint_io(self) -> Any:
        """The CheckpointIO behind this one. The strategy sets its own, which a given ``base`` precedes."""
        if self._base is None:  # Fabric's strategies do not set one
            fabric = next(name for name in PACKAGES if name in sys.modules)
            self._base = importlib.import_module(f"{fabric}.plugins").TorchCheckpointIO()
        return self._base

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        if self._base is None:
            self._base = io
        elif hasattr(type(self._base), "checkpoint_io"):  # AsyncCheckpointIO() asks for one in its turn
            self._base.checkpoint_io = io

    @property
    def _base_checkpoint_io_configured(self) -> bool:  # read where another wrapper is put around this one
        return False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.meter.pause()
        # The launcher of spawned processes sends a bare state dict through here: that one stays whole.
        if self.checkpoint == "adapter" and "pytorch-lightning_version" in checkpoint:
            trainer = self._trainer()
            if trainer is None:
                raise FastPlugError(
                    "fastplug: checkpoint='adapter' does not know the model before fit, validate, test or predict ran"
                )
            checkpoint = checkpoints.leave_base_out(checkpoint, trainer.lightning_module, trainer.optimizers)
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        trainer = self._trainer()
        return checkpoint if trainer is None else checkpoints.put_base_back(checkpoint, trainer.lightning_module)

    def remove_checkpoint(self, path: Any) -> None:
        self.checkpoint_io.remove_checkpoint(path)

    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def register() -> None:
    """Make FastPlug a CheckpointIO of every Lightning that is imported, or else of every one that is installed."""
    if not any(fabric in sys.modules for fabric in PACKAGES):
        installed = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)]
        if not installed:
            raise MissingExtra("lightning", "lightning", "fastplug_lightning.FastPlug")
        for name in installed:
            importlib.import_module(name)
    for fabric, pytorch in PACKAGES.items():
        if fabric in sys.modules:
            importlib.import_module(f"{fabric}.plugins").CheckpointIO.register(FastPlug)
        if pytorch in sys.modules:  # strategies give a wrapping one their own as its base
            importlib.import_module(f"{pytorch}.plugins.io.wrapper")._WrappingCheckpointIO.register(FastPlug)


def find(io: Any) -> FastPlug | None:
    """The FastPlug in a chain of CheckpointIOs that wrap each other."""
    while io is not None and not isinstance(io, FastPlug):
        io = getattr(io, "checkpoint_io", None)
    return io


def sharding(strategy: Any) -> bool:
    """Whether a strategy reads its checkpoints without the CheckpointIO: DeepSpeed, FSDP, ModelParallel."""
    owner = next(cls for cls in type(strategy).__mro__ if "load_checkpoint" in vars(cls))
    return owner.__name__ != "Strategy"


def _rebuild(options: dict[str, Any]) -> FastPlug:
    return FastPlug(**options)


def _require_checkpoint_io(base: Any) -> None:
    if base is None:
        return
    if isinstance(base, type) or not all(hasattr(base, f"{verb}_checkpoint") for verb in ("save", "load", "remove")):
        given = base.__name__ if isinstance(base, type) else type(base).__name__
        raise OptionError(f"fastplug: base must be a CheckpointIO such as AsyncCheckpointIO(), not {given}")
    if find(base) is not None:
        raise OptionError("fastplug: base is or holds another FastPlug; one is enough")


def _require_entry_points() -> None:
    groups = [f"{pytorch}.callbacks_factory" for pytorch in PACKAGES.values()]
    found = [entry for group in groups for entry in importlib.metadata.entry_points(group=group)]
    if not any(entry.value.startswith("fastplug_lightning:") for entry in found):
        raise FastPlugError(
            "fastplug: Lightning would not call fastplug, whose entry points are not installed; run `pip install` for "
            "it (again): a source tree on the path is not enough"
        )


__all__ = ["FastPlug", "alive", "find", "register", "sharding"]
