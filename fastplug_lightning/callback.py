"""The callback that Lightning's entry point adds to a Trainer: it patches the models and measures the training.

Order of a run: ``Callback.setup`` - ``LightningModule.setup`` - ``configure_model`` - ``convert_module`` of the
precision plugin - wrapping (DDP, FSDP) - ``configure_optimizers`` - ``on_fit_start``. No callback lies between
``configure_model`` and the wrapping, so ``setup`` puts the patching into the precision plugin's ``convert_module``, on
this one instance and for one call.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from typing import Any

from fastplug.errors import ModelError
from fastplug.memory import saved_plans
from fastplug.memory.runtime import planners
from fastplug.metrics import token_tensors
from fastplug.patching.engine import spare
from fastplug_lightning.plugin import FastPlug, find, sharding


class Hooks:
    """What :func:`make_callback` mixes into the ``Callback`` of either package."""

    package: str
    plug: FastPlug | None = None
    _restore: Any = None
    _postponed: str | None = None
    _module: Any = None  # a weak reference to the LightningModule
    _plans: Any = None  # memory plans of the checkpoint that the run goes on from
    _told = False

    def __reduce__(self) -> Any:
        return make_callback, (self.package,)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.plug = find(trainer.strategy.checkpoint_io)
        if self.plug is None:  # another Trainer's FastPlug made the entry point add this callback
            return
        self.plug.connect(trainer)
        self._module = weakref.ref(pl_module)
        self._intercept(trainer)
        if sharding(trainer.strategy):  # configure_model may shard what __init__ built
            self._apply(trainer, pl_module)

    def _intercept(self, trainer: Any) -> None:
        self._give_back()
        precision = trainer.strategy.precision_plugin
        own, original = vars(precision).get("convert_module"), precision.convert_module

        def restore() -> None:
            vars(precision).pop("convert_module", None)
            if own is not None:
                precision.convert_module = own

        def convert_module(module: Any) -> Any:
            self._give_back()
            converted = original(module)
            if not any(parameter.is_meta for parameter in module.parameters()):
                trainer.strategy.model_to_device()  # the strategy's own next step: what fits depends on the device
            self._apply(trainer, converted)
            return converted

        self._restore = restore
        precision.convert_module = convert_module

    def _give_back(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _apply(self, trainer: Any, module: Any) -> None:
        """Patch, or postpone to the start of the stage where there are no weights yet."""
        assert self.plug is not None
        self._postponed = None
        try:
            self.plug.apply(module, speak=trainer.is_global_zero)
        except ModelError as error:
            self._postponed = str(error)

    def _start(self, trainer: Any, pl_module: Any) -> None:
        if self.plug is None or (self._postponed is None and not sharding(trainer.strategy)):
            return
        self._apply(trainer, pl_module)  # by now FSDP has moved the model to the device that decides about kernels
        if self._postponed is not None:
            if self.plug.options.strict:
                raise ModelError(self._postponed)
            self.plug.say(f"{self._postponed}; the run goes on without fastplug", 30)

    on_fit_start = on_test_start = on_predict_start = _start

    def state_dict(self) -> dict[str, Any]:
        """The memory plans, for the checkpoint; nothing without the option ``memory``."""
        module = None if self._module is None else self._module()
        if self.plug is None or self.plug.options.memory is None or module is None:
            return {}
        plans = saved_plans.state(module)
        return {"memory_plans": plans} if plans else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plans = state.get("memory_plans")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.plug is not None:
            plans, self._plans = self._plans, None
            reason = saved_plans.restore(pl_module, plans) if self.plug.options.memory is not None else None
            if reason is not None:
                self.plug.say(f"fastplug: {reason}")
            self.plug.meter.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.plug is not None and trainer.loggers:
            self.plug.meter.step_begin()
            for tokens, mask in token_tensors(batch):
                self.plug.meter.count(tokens, mask)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.plug is not None and self.plug.options.memory is not None and not self._told:
            self._told = True
            for planner in planners(pl_module) if trainer.is_global_zero else ():
                self.plug.say(f"fastplug: memory={self.plug.options.memory!r}: {planner.plan or planner.off}")
        if self.plug is None or not trainer.loggers:
            return
        self.plug.meter.tick()
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
            replicas = trainer.world_size // sampler.get("num_replicas", trainer.world_size)
            metrics = self.plug.meter.read(trainer.strategy.root_device, replicas)
            pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module)
        if self.plug is not None:
            self.plug.meter.pause()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.plug is None:
            return
        spare(pl_module)
        if trainer.is_global_zero:
            self.plug.export(pl_module, trainer.default_root_dir)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(undo=isinstance(exception, KeyboardInterrupt))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()

    def _end(self, undo: bool = False) -> None:
        self._give_back()
        if self.plug is not None:
            self.plug.meter.stop()
            if undo or self.plug.undo_at_end:
                self.plug.undo()


@functools.cache
def _callback_class(package: str) -> type:
    base = importlib.import_module(f"{package}.callbacks").Callback
    return type("FastPlugCallback", (Hooks, base), {"package": package, "__doc__": Hooks.__doc__})


def make_callback(package: str) -> Any:
    """A new callback for ``lightning.pytorch`` or ``pytorch_lightning``."""
    return _callback_class(package)()
