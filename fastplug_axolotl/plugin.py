"""FastPlugPlugin: Axolotl's hooks translated into the callback of ``fastplug_hf``, which does the work.

Axolotl trains with the HF Trainer and hands the plugin's callback to the Trainer's constructor: the callback patches
once the adapters are on, for SFT as for DPO and KTO (which wrap their model inside the constructor), and logs.

Axolotl only logs an ImportError of a plugin and trains without it. So this module imports nothing but Axolotl's base
class, and whatever else is missing is raised by ``register``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import MutableMapping
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager

HOOKS = ("register", "get_input_args", "add_callbacks_pre_trainer", "post_trainer_create")
NEEDED = ("fastplug.patching.engine", "fastplug_axolotl.args", "fastplug_axolotl.ranks", "fastplug_hf.callback")

# Axolotl shows INFO of its own loggers only.
logger = logging.getLogger("axolotl.fastplug")


class FastPlugPlugin(BasePlugin):
    """The plugin behind ``plugins: [fastplug]``; its options stand under the key ``fastplug:``."""

    def __init__(self) -> None:
        super().__init__()
        self._active = True
        self._callback: Any = None

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """Check that fastplug can work here, and turn off the LoRA kernels that Axolotl would choose by itself.

        Raises:
            FastPlugError: This Axolotl, or a package that fastplug needs, does not fit; with the reason.
        """
        from fastplug.errors import FastPlugError

        self._active = self._is_first(cfg)
        if not self._active:
            return
        missing = [hook for hook in HOOKS if not hasattr(BasePlugin, hook)]
        if missing:
            raise FastPlugError(
                f"fastplug: Axolotl {_version()} has no plugin hook {missing[0]}, so fastplug cannot take part; "
                "use a release from 0.13 to 0.19, or remove fastplug from `plugins:`"
            )
        try:
            for module in NEEDED:
                importlib.import_module(module)
        except Exception as error:
            raise FastPlugError(f"fastplug: `plugins:` asks for fastplug, which cannot be loaded: {error}") from error
        from fastplug_axolotl.roles import turn_off_unset_kernels

        unset = turn_off_unset_kernels(cfg)
        if unset:
            _say(f"fastplug: {', '.join(unset)} stay off, which the config does not set: fastplug does their work")

    def get_input_args(self) -> str | None:
        return "fastplug_axolotl.args.FastPlugArgs" if self._active else None

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        if not self._active:
            return []
        from fastplug.options import Options
        from fastplug_axolotl.args import split
        from fastplug_axolotl.roles import left_alone, taken
        from fastplug_hf import FastPlugCallback

        options, export = split(cfg.get("fastplug"))
        roles = taken(cfg)
        for role, keys in roles.items():
            _say(f"fastplug: leaves {role} to {', '.join(f'{key}: {cfg[key]}'.lower() for key in keys)}")
        given = Options.of(options, disable=sorted({*options.disable, *left_alone(roles)}))
        self._callback = FastPlugCallback(export=export, **given.as_dict())
        return [self._callback]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Say so, loudly, if this run goes on without fastplug.

        Raises:
            StrictError: With ``strict: true``, nothing is patched.
            FastPlugError: The ranks did not decide the same.
            OptionError: The optimizer cannot step within the backward, as the options ask for.
        """
        if not self._active:
            return
        from fastplug_axolotl.args import steps_in_backward

        if steps_in_backward(cfg.get("fastplug")):
            from fastplug_axolotl.in_backward import StepInBackward

            trainer.add_callback(StepInBackward(trainer))
        from fastplug_axolotl.ranks import is_true_on_any

        if is_true_on_any(any(parameter.is_meta for parameter in trainer.model.parameters())):
            from fastplug_axolotl.late import LateCheck  # FSDP loads the weights on the first rank and spreads them

            trainer.add_callback(LateCheck(lambda model: self._check(cfg, trainer, model)))
        else:
            self._check(cfg, trainer, trainer.model)

    def _check(self, cfg: Any, trainer: Any, model: Any) -> None:
        import fastplug
        from fastplug.errors import ModelError, StrictError
        from fastplug_axolotl.ranks import require_same_decisions

        reasons, decisions = ["Axolotl's trainer took no callback of a plugin"], []
        try:
            report = fastplug.report(model)
            decisions = report.decisions
            reasons = report.notes + sorted({f"{d.role}: {d.reason}" for d in decisions if d.reason})
        except ModelError as error:
            if self._callback in trainer.callback_handler.callbacks:
                reasons = [str(error)]
        require_same_decisions(decisions)
        if not any(decision.status == "patched" for decision in decisions):
            text = f"fastplug: NOTHING IS PATCHED, this run is as slow as without fastplug: {'; '.join(reasons)}"
            if (cfg.get("fastplug") or {}).get("strict"):
                raise StrictError(text)
            _say(text, logging.WARNING)

    def _is_first(self, cfg: MutableMapping[str, Any]) -> bool:
        """Whether ``cfg`` lists this plugin and none before it under another name.

        Axolotl keeps the plugins of earlier configs of the same process and calls them all.
        """
        known = PluginManager.get_instance().plugins
        if self not in known.values():
            return True
        mine = [name for name in cfg.get("plugins") or () if isinstance(known.get(name), FastPlugPlugin)]
        if len(mine) > 1 and known[mine[0]] is self:
            _say(f"fastplug: `plugins:` lists it twice, as {' and '.join(mine)}; remove one", logging.WARNING)
        return bool(mine) and known[mine[0]] is self


def _say(text: str, level: int = logging.INFO) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.log(level, text)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("axolotl")
    except PackageNotFoundError:
        return "(of unknown version)"
