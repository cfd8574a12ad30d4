"""The plugin with the installed Axolotl's own base classes: names, options, roles, and runs without a patch."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

import fastplug
from fastplug.errors import FastPlugError, StrictError
from fastplug.options import ROLES
from fastplug_axolotl import FastPlugPlugin
from fastplug_axolotl.roles import LORA_KERNELS, OWNERS
from tests import models
from tests.hf import tiny

SHORT, LONG = "fastplug", "fastplug_axolotl.FastPlugPlugin"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers plugins as Axolotl does, in a manager of this test's own."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    manager = PluginManager.get_instance()
    manager.plugins.clear()

    def prepare(**values: Any) -> tuple[DictDefault, list[Any]]:
        cfg = DictDefault({"plugins": [SHORT], "adapter": "lora", **values})
        for name in cfg["plugins"]:
            manager.register(name)
        for plugin in manager.plugins.values():
            plugin.register(cfg)
        return cfg, list(manager.plugins.values())

    yield prepare
    manager.plugins.clear()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    caplog.set_level(logging.INFO, "axolotl.fastplug")
    return caplog


def test_short_name_in_a_new_process() -> None:
    code = "from axolotl.integrations.base import load_plugin; print(type(load_plugin('fastplug')).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "FastPlugPlugin"


@pytest.mark.parametrize("name", [SHORT, LONG])
def test_trains_to_the_same_losses(name: str, plugins: Any, tmp_path: Path) -> None:
    plain = tiny.trainer(models.lora(models.plain()), tmp_path)
    plain.train()
    cfg, (plugin,) = plugins(plugins=[name], fastplug={"strict": True})
    model = models.lora(models.plain())
    fused = tiny.trainer(model, tmp_path, *plugin.add_callbacks_pre_trainer(cfg, model))
    plugin.post_trainer_create(cfg, fused)
    fused.train()
    assert {decision.role for decision in fastplug.report(model).patched} >= {"decoder_layer", "lm_head_loss"}
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=1e-5)


def test_lora_kernels_that_are_not_set_stay_off(plugins: Any, said: pytest.LogCaptureFixture) -> None:
    cfg, _ = plugins()
    assert [cfg[name] for name in LORA_KERNELS] == [False] * 4
    assert f"{', '.join(LORA_KERNELS)} stay off, which the config does not set" in said.text
    assert all(plugins(adapter=None)[0][name] is None for name in LORA_KERNELS)


@pytest.mark.parametrize(
    ("values", "disabled", "line"),
    [
        ({}, [], None),
        ({"lora_mlp_kernel": True}, ["decoder_layer", "mlp"], "leaves mlp to lora_mlp_kernel: true"),
        (
            {"lora_qkv_kernel": True, "lora_o_kernel": True},
            ["attention", "decoder_layer"],
            "leaves attention to lora_qkv_kernel: true, lora_o_kernel: true",
        ),
        ({"liger_rms_norm": True}, ["decoder_layer", "norm"], "leaves norm to liger_rms_norm: true"),
        ({"cut_cross_entropy": True}, ["lm_head_loss"], "leaves lm_head_loss to cut_cross_entropy: true"),
        ({"cut_cross_entropy": False}, [], None),
        ({"liger_fused_linear_cross_entropy": True, "fastplug": {"disable": ["norm"]}}, ["lm_head_loss", "norm"], ""),
    ],
    ids=str,
)
def test_roles_that_the_user_gave_away(
    values: dict[str, Any], disabled: list[str], line: str | None, plugins: Any, said: pytest.LogCaptureFixture
) -> None:
    cfg, (plugin,) = plugins(**values)
    (callback,) = plugin.add_callbacks_pre_trainer(cfg, None)
    assert list(callback.options.disable) == disabled
    assert ("leaves" in said.text) is (line is not None)
    assert (line or "") in said.text
    assert all(cfg[name] is bool(values.get(name)) for name in LORA_KERNELS)


def test_a_role_given_away_is_not_patched(plugins: Any, tmp_path: Path) -> None:
    cfg, (plugin,) = plugins(lora_mlp_kernel=True)
    model = models.lora(models.plain())
    trainer = tiny.trainer(model, tmp_path, *plugin.add_callbacks_pre_trainer(cfg, model))
    plugin.post_trainer_create(cfg, trainer)
    assert {decision.role for decision in fastplug.report(model).patched} == {"attention", "lm_head_loss"}


def test_nothing_patched_warns_and_fails_if_strict(
    plugins: Any, said: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = models.lora(models.plain())
    cfg, (plugin,) = plugins(fastplug={"disable": ROLES})
    trainer = tiny.trainer(model, tmp_path, *plugin.add_callbacks_pre_trainer(cfg, model))
    plugin.post_trainer_create(cfg, trainer)
    (loud,) = (record for record in said.records if "NOTHING IS PATCHED" in record.getMessage())
    assert loud.levelno == logging.WARNING
    assert "mlp: disabled by the options" in loud.getMessage()
    cfg, (plugin,) = plugins(fastplug={"disable": ROLES, "strict": True})
    with pytest.raises(StrictError, match="nothing was patched"):
        tiny.trainer(model, tmp_path, *plugin.add_callbacks_pre_trainer(cfg, model))


def test_a_trainer_that_takes_no_callback(plugins: Any, said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = models.lora(models.plain())
    for strict in (False, True):
        cfg, (plugin,) = plugins(fastplug={"strict": strict})
        plugin.add_callbacks_pre_trainer(cfg, model)
        trainer = tiny.trainer(model, tmp_path)
        if strict:
            with pytest.raises(StrictError, match="took no callback"):
                plugin.post_trainer_create(cfg, trainer)
        else:
            plugin.post_trainer_create(cfg, trainer)
            assert "NOTHING IS PATCHED" in said.text


def test_weights_that_come_later_are_checked_later(
    plugins: Any, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With FSDP's cpu_ram_efficient_loading, only the first rank has weights when the trainer is made."""
    cfg, (plugin,) = plugins(fastplug={"strict": True})
    model = models.lora(models.plain())
    trainer = tiny.trainer(model, tmp_path, *plugin.add_callbacks_pre_trainer(cfg, model))
    monkeypatch.setattr("fastplug_axolotl.ranks.is_true_on_any", lambda flag: True)
    monkeypatch.setattr("fastplug_axolotl.ranks.require_same_decisions", lambda decisions: seen.append(decisions))
    seen: list[Any] = []
    plugin.post_trainer_create(cfg, trainer)
    assert not seen
    trainer.train()
    assert seen == [fastplug.report(model).decisions]
    assert "NOTHING IS PATCHED" not in said.text


def test_both_names(plugins: Any, said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    cfg, both = plugins(plugins=[SHORT, LONG])
    assert "`plugins:` lists it twice, as fastplug and fastplug_axolotl.FastPlugPlugin; remove one" in said.text
    model = models.lora(models.plain())
    callbacks = [callback for plugin in both for callback in plugin.add_callbacks_pre_trainer(cfg, model)]
    assert len(callbacks) == 1
    assert [plugin.get_input_args() for plugin in both].count(None) == 1
    trainer = tiny.trainer(model, tmp_path, *callbacks)
    for plugin in both:
        plugin.post_trainer_create(cfg, trainer)
    assert "NOTHING IS PATCHED" not in said.text


def test_a_later_config_without_it_in_the_same_process(plugins: Any) -> None:
    plugins()
    cfg, (plugin,) = plugins(plugins=[])
    assert plugin.add_callbacks_pre_trainer(cfg, None) == []
    assert plugin.get_input_args() is None
    assert cfg.lora_mlp_kernel is None


def test_options(plugins: Any) -> None:
    from pydantic import ValidationError

    from fastplug_axolotl.args import FastPlugArgs, split

    _, (plugin,) = plugins()
    assert plugin.get_input_args() == f"{FastPlugArgs.__module__}.FastPlugArgs"
    assert FastPlugArgs(fastplug=None).fastplug is None
    given = FastPlugArgs.model_validate({"fastplug": {"disable": "norm", "export": "lora"}}).model_dump()["fastplug"]
    assert split(given) == (fastplug.Options(disable=("norm",)), "lora")
    for value, message in [
        ({"stritc": True}, r"unknown option 'stritc'; did you mean 'strict'\?"),
        ({"kernels": "cuda"}, "kernels cannot be 'cuda'; one of 'auto', 'triton', 'reference'"),
        ({"strict": "yes"}, "strict must be true or false, not 'yes'"),
        ({"export": "lorra"}, "did you mean 'lora'"),
        (True, "options must be fastplug.Options or a mapping, not bool"),
    ]:
        with pytest.raises(ValidationError, match=message):
            FastPlugArgs.model_validate({"fastplug": value})


def test_what_cannot_be_loaded_is_raised(plugins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastplug_axolotl.plugin.NEEDED", ("no_such_module",))
    with pytest.raises(FastPlugError, match="cannot be loaded: No module named 'no_such_module'"):
        plugins()


def test_hooks_that_this_axolotl_calls() -> None:
    """A hook that is renamed leaves a method here that nobody calls."""
    from fastplug_axolotl.plugin import HOOKS

    assert all(hook in vars(FastPlugPlugin) for hook in HOOKS)


def test_every_switch_of_this_axolotl_has_a_role() -> None:
    """A new kernel of Axolotl's that fastplug does not know would find its sites taken, without a line in the log."""
    schema = pytest.importorskip("axolotl.utils.schemas.config")
    from axolotl.integrations.cut_cross_entropy.args import CutCrossEntropyArgs
    from axolotl.integrations.liger.args import LigerArgs

    pattern = re.compile("_kernel$|cross_entropy|^liger_|^fused|fuse_|rms_norm|^tiled_mlp$")
    kinds = (schema.AxolotlInputConfig, CutCrossEntropyArgs, LigerArgs)
    switches = {name for kind in kinds for name in kind.model_fields if pattern.search(name)}
    elsewhere = {  # settings of another switch, and kernels in places that fastplug does not touch
        "chunked_cross_entropy_num_chunks", "liger_use_token_scaling", "liger_kernel_impl", "liger_layer_norm",
        "liger_rms_norm_gated", "dpo_use_liger_kernel", "lora_embedding_kernel",
    }  # fmt: skip
    assert len(switches) > 10
    assert switches - elsewhere <= set(OWNERS)
