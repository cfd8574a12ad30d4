"""Axolotl's own command line on a CPU: the same losses with and without fastplug, and every command."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastplug_axolotl.roles import LORA_KERNELS
from tests.axolotl.tiny import axolotl, config, history, make

ROOT = Path(__file__).parents[2]
Train = Callable[..., tuple[Path, str]]
STOCK = dict.fromkeys(LORA_KERNELS, False)  # Axolotl's own kernels need a GPU
FUSED: dict[str, Any] = {"plugins": ["fastplug"], "fastplug": {"strict": True}}

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.cli") is None:
    pytest.skip("Axolotl is not installed", allow_module_level=True)
pytest.importorskip("click", reason="without the packages that Axolotl's command line needs")
pytest.importorskip("fire", reason="without the packages that Axolotl's command line needs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("axolotl")
    make(made)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> Callable[[str], Path]:
    """The output folder of a run without fastplug, by kind."""

    @functools.cache
    def run(kind: str) -> Path:
        axolotl("train", config(folder, f"plain-{kind}", kind, **STOCK), "--launcher", "python", folder=folder)
        return folder / f"plain-{kind}"

    return run


def decisions(output: Path) -> dict[str, set[str]]:
    """Status -> the roles that the report of a run has under it."""
    found: dict[str, set[str]] = {}
    report = json.loads((output / "fastplug_report.json").read_text())
    assert not report["fallbacks"]
    for decision in report["decisions"]:
        found.setdefault(decision["status"], set()).add(decision["role"])
    return found


def assert_same(output: Path, expected: Path) -> None:
    assert len(set(history(expected))) == 3, "the losses do not move"
    assert history(output) == pytest.approx(history(expected), rel=1e-5)
    assert history(output, "grad_norm") == pytest.approx(history(expected, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize("kind", ["sft", "qlora", "dpo", "kto"])
def test_losses(kind: str, folder: Path, plain: Callable[[str], Path]) -> None:
    log = axolotl("train", config(folder, kind, kind, **FUSED), "--launcher", "python", folder=folder)
    assert decisions(folder / kind)["patched"] >= {"decoder_layer", "attention", "mlp"}
    assert "refused" not in decisions(folder / kind)
    assert "stay off, which the config does not set" in log
    assert log.count("2 x decoder_layer (fused layer)") == 1
    assert min(history(folder / kind, "fastplug/tokens_per_second")) > 0
    assert_same(folder / kind, plain(kind))


def test_lora_plus(folder: Path, plain: Callable[[str], Path]) -> None:
    """By Axolotl's own key."""
    for name, changes in (("plus-plain", STOCK), ("plus-fused", FUSED)):
        written = config(folder, name, loraplus_lr_ratio=4, **changes)
        axolotl("train", written, "--launcher", "python", folder=folder)
    assert decisions(folder / "plus-fused")["patched"] >= {"decoder_layer", "attention", "mlp"}
    assert_same(folder / "plus-fused", folder / "plus-plain")
    ours, others = history(folder / "plus-fused"), history(plain("sft"))
    assert ours[0] == pytest.approx(others[0], rel=1e-5)
    assert ours[-1] != pytest.approx(others[-1], rel=1e-3)


def test_a_role_that_the_user_gave_away(folder: Path, plain: Callable[[str], Path]) -> None:
    written = config(folder, "chunked", chunked_cross_entropy=True, **FUSED)
    log = axolotl("train", written, "--launcher", "python", folder=folder)
    assert "leaves lm_head_loss to chunked_cross_entropy: true" in log
    assert decisions(folder / "chunked")["patched"] == {"decoder_layer", "attention", "mlp"}
    assert_same(folder / "chunked", plain("sft"))


def test_every_command_and_the_long_name(folder: Path, plain: Callable[[str], Path]) -> None:
    """As a stock Axolotl runs it: without the start-up file, through accelerate."""
    run = functools.partial(axolotl, folder=folder, FASTPLUG_AXOLOTL_PTH="0")
    written = config(folder, "stock", **{**FUSED, "plugins": ["fastplug_axolotl.FastPlugPlugin"]})
    run("preprocess", written)
    run("train", written, "--launcher", "accelerate")
    assert_same(folder / "stock", plain("sft"))

    seen = []
    for name, changes in (("eval-plain", STOCK), ("eval-fused", FUSED)):
        values = {"val_set_size": 0.2, "lora_model_dir": str(folder / "stock"), **changes}
        log = axolotl("evaluate", config(folder, name, **values), "--launcher", "python", folder=folder)
        assert ("2 x decoder_layer (fused layer)" in log) is (name == "eval-fused")
        with (folder / name / "eval_summary.csv").open() as file:
            (loss,) = (row for row in csv.DictReader(file) if row["metric"] == "loss")
        seen.append([float(loss["training"]), float(loss["validation"])])
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)

    run("merge-lora", written)
    assert_merged(folder / "stock", folder / "model")


def assert_merged(output: Path, base: Path) -> None:
    """The merged weights are W + alpha/r B A (LoRA, Hu et al. 2021, section 4.1)."""
    import safetensors.torch

    def load(path: Path) -> dict[str, torch.Tensor]:
        files = [safetensors.torch.load_file(file) for file in path.glob("*model*.safetensors")]
        return {name: tensor for file in files for name, tensor in file.items()}

    merged, weights, adapter = load(output / "merged"), load(base), load(output)
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    expected = weights[f"{name}.weight"] + 2 * b.float() @ a.float()
    assert set(merged) == set(weights)
    assert torch.allclose(merged[f"{name}.weight"].float(), expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(weights[f"{name}.weight"], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "variables", "message"),
    [
        ({"fastplug": {"stritc": True}}, {}, r"unknown option 'stritc'; did you mean 'strict'\?"),
        ({"plugins": ["fastplg"]}, {}, r"'fastplg' has no dot.*did you mean 'fastplug'\?"),
        ({}, {"FASTPLUG_AXOLOTL_PTH": "0"}, "not enough values to unpack"),
    ],
    ids=["option", "plugin", "turned off"],
)
def test_bad_input(changes: dict[str, Any], variables: dict[str, str], message: str, folder: Path) -> None:
    written = config(folder, "bad", **{**FUSED, **changes})
    log = axolotl("preprocess", written, folder=folder, fails=True, **variables)
    assert re.search(message, log)


def test_config_of_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "axolotl.md").read_text()
    blocks = dict(reversed(re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)))
    (tmp_path / "config.yaml").write_text(blocks["yaml"])
    subprocess.run([sys.executable, "-c", blocks["python"]], cwd=tmp_path, check=True)
    axolotl("train", "config.yaml", folder=tmp_path)
    assert decisions(tmp_path / "out")["patched"] >= {"decoder_layer", "lm_head_loss"}
