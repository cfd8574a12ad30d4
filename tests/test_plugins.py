"""A real plugin package, installed by pip as its users would: a family, an op, an exporter, a decision, notifications.

Two more of its entry points are broken, each in its own way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

PROBE = """
import copy, json, logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
import torch, transformers
import fastplug
from fastplug_tiny import plugin
from fastplug_tiny.modeling import TinyForCausalLM

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)
model = TinyForCausalLM(config).train()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
tokens = torch.randint(3, 96, (2, 9))

def step(part):
    part.zero_grad()
    output = part(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return float(output.loss), output.logits.detach().clone(), [p.grad.clone() for p in part.parameters()]

def distance(mine, other):
    pairs = [(mine[1], other[1]), *zip(mine[2], other[2])]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

twin = copy.deepcopy(model)
applied = fastplug.apply(twin)
report = applied.report
before = plugin.norms
ours, theirs = step(twin), step(model)
found = {
    "decisions": [[d.role, d.name, d.family, d.status, d.reason] for d in report.decisions],
    "ops": report.ops,
    "fallbacks": fastplug.report(twin).fallbacks,
    "losses": [ours[0], theirs[0]],
    "distance": distance(ours, theirs),
    "norms": plugin.norms - before,
}
applied.undo()
found["events"] = list(plugin.events)
result = fastplug.export(model, sys.argv[1] + "/names.txt", format="names", upper=True)
found["export"] = result.path.read_text().splitlines()
try:
    fastplug.export(model, sys.argv[1] + "/other", format="nams")
except fastplug.OptionError as error:
    found["hint"] = str(error)
llama = transformers.LlamaForCausalLM(config)
found["llama"] = len(fastplug.apply(llama).report.patched)
alone = fastplug.apply(copy.deepcopy(model), plugins=False).report
found["alone"] = [sorted({d.family for d in alone.decisions}), alone.notes, alone.ops["rms_norm"]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python in which the package is installed."""
    root = tmp_path_factory.mktemp("plugin")
    source, target = root / "source", root / "site"
    shutil.copytree(HERE / "plugin_package", source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
               "--disable-pip-version-check", "--target", target, source]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    paths = [str(target), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a process with the package found, and its standard error."""
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder)],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_family_of_a_plugin_is_patched(run: tuple[dict[str, Any], str]) -> None:
    found, _ = run
    fates = {(role, name): (family, status, reason) for role, name, family, status, reason in found["decisions"]}
    assert {family for family, _, _ in fates.values()} == {"tiny"}
    for site in (("decoder_layer", "model.layers.0"), ("mlp", "model.layers.1.mlp"), ("lm_head_loss", "")):
        assert fates[site] == ("tiny", "patched", None)
    assert found["distance"] < 1e-5
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-5)
    assert found["fallbacks"] == {}


def test_one_decision_is_overridden(run: tuple[dict[str, Any], str]) -> None:
    reasons = {(role, name): reason for role, name, _, status, reason in run[0]["decisions"] if status == "left alone"}
    assert reasons["decoder_layer", "model.layers.2"] == "its owner wants it as it is"


def test_an_op_is_overridden(run: tuple[dict[str, Any], str]) -> None:
    found, _ = run
    assert found["ops"]["rms_norm"] == "counting"
    assert found["ops"]["rope"] == "reference"
    assert found["norms"] >= 2 * 2  # two fused layers of two norms


def test_an_exporter_is_added(run: tuple[dict[str, Any], str]) -> None:
    found, _ = run
    assert "MODEL.LAYERS.0.MLP.UP_PROJ.WEIGHT" in found["export"]
    assert "did you mean 'names'?" in found["hint"]


def test_plugins_are_notified(run: tuple[dict[str, Any], str]) -> None:
    found, _ = run
    patched = sum(status == "patched" for *_, status, _ in found["decisions"])
    assert found["events"] == ["applied to TinyForCausalLM", f"undone, {patched} sites"]


def test_broken_plugins_are_named_and_the_rest_works(run: tuple[dict[str, Any], str]) -> None:
    found, errors = run
    assert found["llama"] > 0
    lines = [line for line in errors.splitlines() if "could not be loaded" in line]
    assert len(lines) == 2
    assert any(
        "'broken' of fastplug-tiny" in line and "RuntimeError: this plugin was built for another version" in line
        for line in lines
    )
    assert any("'misspelt' of fastplug-tiny" in line and "fastplug_familys" in line for line in lines)
    assert all("upgrade or uninstall fastplug-tiny" in line for line in lines)


def test_plugins_can_be_turned_off(run: tuple[dict[str, Any], str]) -> None:
    families, notes, norm = run[0]["alone"]
    assert families == ["by structure, checked"]  # without its row
    assert not notes
    assert norm == "reference"


def test_doctor_lists_them(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastplug", "doctor", "--json"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plugins = {plugin["name"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    assert plugins["tiny"]["error"] is None
    assert "another version" in plugins["broken"]["error"]
    assert {plugin["distribution"] for plugin in plugins.values()} == {"fastplug-tiny"}
