"""The command line: what it prints, with which status it ends, and that errors are one sentence."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fastplug.cli import app
from fastplug.cli.flags import descriptions
from fastplug.options import Options
from tests import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model, a folder with its config alone, an adapter, and a model that no row describes."""
    import transformers

    root = tmp_path_factory.mktemp("models")
    model = models.plain(intermediate_size=128)
    model.save_pretrained(root / "model")
    model.config.save_pretrained(root / "config")
    models.lora(model).save_pretrained(root / "adapter")
    small = transformers.OPTConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, vocab_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.OPTForCausalLM(small).save_pretrained(root / "opt")
    return {name: root / name for name in ("model", "config", "adapter", "opt")}


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result, status: int = 2) -> str:
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("fastplug")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_help_lists_the_commands_and_loads_nothing() -> None:
    code = (
        "import sys; from fastplug.cli import main\ntry: main()\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    for name in ("doctor", "verify", "export", "demo"):
        assert name in done.stdout


def test_help_is_fast() -> None:
    """In processor time, which does not count the waiting for other programs."""
    used = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "fastplug", "--help"], check=True, capture_output=True)
        after = os.times()
        used.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert statistics.median(used) < 1.0


@pytest.mark.parametrize("command", ["doctor", "verify"])
def test_every_option_is_a_flag(command: str) -> None:
    text = run(command, "--help").output
    for name, description in descriptions().items():
        assert "--" + name.replace("_", "-") in text
        assert description.split()[0] in text
    assert set(descriptions()) == set(Options().as_dict())
    assert all(descriptions().values())


def test_doctor_without_a_model() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("device", version("torch"), "transformers", "rms_norm", "plugin"):
        assert word in result.output


def test_doctor_reads_a_config_without_weights(folders: dict[str, Path]) -> None:
    result = run("doctor", folders["config"], "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "fused layer" in result.output
    assert "left alone" in result.output


def report(*arguments: object) -> dict[str, Any]:
    result = run("doctor", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["report"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("extra", [(), ("--rank", "8"), ("--quant", "nf4"), ("--quant", "fp4", "--rank", "0")])
def test_doctor_foretells_what_apply_does(folders: dict[str, Path], extra: tuple[str, ...]) -> None:
    import fastplug

    foretold = report(folders["config"], "--device", "cpu", *extra)
    model = models.plain(intermediate_size=128)
    if "--quant" in extra:
        model = models.quantized(model, extra[1])
    if "--rank" in extra[:1] or extra[1:] == ("nf4",):
        model = models.lora(model)
    found = fastplug.apply(model).report.as_dict()
    assert foretold["decisions"] == found["decisions"]
    assert foretold["ops"] == found["ops"]


def test_doctor_with_an_adapter_and_options(folders: dict[str, Path]) -> None:
    found = report(folders["model"], "--adapter", folders["adapter"], "--disable", "mlp", "--disable", "norm")
    assert found["options"]["disable"] == ["mlp", "norm"]
    reasons = {d["reason"] for d in found["decisions"] if d["role"] == "mlp"}
    assert reasons == {"disabled by the options"}


def test_doctor_on_a_model_of_an_unknown_family(folders: dict[str, Path]) -> None:
    result = run("doctor", folders["opt"])
    assert result.exit_code == 0
    found = report(folders["opt"])
    assert {(d["role"], d["family"], d["status"]) for d in found["decisions"]} == {
        ("lm_head_loss", "by structure, checked", "patched")
    }


def test_doctor_names_a_broken_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from fastplug import manager

    broken = importlib.metadata.EntryPoint("broken", "no_such_package_at_all", manager.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [broken])
    manager._manager.cache_clear()
    try:
        result = run("doctor")
    finally:
        manager._manager.cache_clear()
    assert result.exit_code == 0
    assert "not loaded: ModuleNotFoundError" in result.output


@pytest.mark.parametrize("extra", [(), ("--rank", "0"), ("--quant", "nf4"), ("--dtype", "bfloat16", "--layers", "1")])
def test_verify(folders: dict[str, Path], extra: tuple[str, ...]) -> None:
    result = run("verify", folders["model"], "--batch", "2x17", *extra)
    assert result.exit_code == 0, result.output
    assert "fastplug verify: ok" in result.output
    assert "worst ones" in result.output


def test_verify_with_an_adapter_prints_every_row(folders: dict[str, Path]) -> None:
    result = run("verify", folders["model"], "--adapter", folders["adapter"], "--all")
    assert result.exit_code == 0, result.output
    assert "worst ones" not in result.output
    assert "LoRA tensors that are zero" not in result.output  # the adapter of the folder is a trained one


def test_verify_exits_1_on_a_mismatch(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_verify import wrong_lora_b

    wrong_lora_b(monkeypatch, 1.01)
    result = run("verify", folders["model"])
    assert result.exit_code == 1
    assert "MISMATCH" in result.output
    assert "NO" in result.output


def test_export(folders: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    result = run("export", folders["model"], "--adapter", folders["adapter"], "--out", tmp_path / "merged",
                 "--option", "dtype=float16")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "merged") in result.output
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", torch_dtype="auto")
    assert loaded.dtype == torch.float16
    result = run("export", folders["adapter"].parent / "model", "--adapter", folders["adapter"], "--format", "lora",
                 "--out", tmp_path / "lora")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("doctor", "/no/such/folder"), "the config of /no/such/folder cannot be read"),
        (("doctor", "{config}", "--dtype", "int3"), "dtype cannot be 'int3'; one of auto, bfloat16"),
        (("doctor", "{config}", "--quant", "int3"), "quant cannot be 'int3'; one of nf4, fp4"),
        (("doctor", "{config}", "--device", "abacus"), "there is no device 'abacus'"),
        (("doctor", "{config}", "--adapter", "{model}"), "has no adapter_config.json"),
        (("verify", "{config}"), "cannot be loaded"),
        (("verify", "{model}", "--batch", "2x1"), "no token to predict"),
        (("verify", "{model}", "--batch", "/no/file"), "there is no file '/no/file'"),
        (("export", "{model}", "--out", "{out}", "--format", "merged16"), "did you mean 'merged_16bit'?"),
        (("export", "{model}", "--out", "{out}", "--option", "dtyp=1"), "no option 'dtyp'; did you mean 'dtype'?"),
        (("export", "{model}", "--out", "{out}", "--option", "dtype"), "--option needs NAME=VALUE"),
        (("export", "{model}", "--out", "{model}"), "exists"),
        (("export", "{model}", "--out", "{out}", "--format", "lora"), "no adapter to write"),
    ],
)
def test_errors_are_one_sentence(
    arguments: tuple[str, ...], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    filled = [argument.format(**folders, out=tmp_path / "out") for argument in arguments]
    assert message in error_of(run(*filled))
    assert not (tmp_path / "out").exists()


def test_wrong_usage_exits_2() -> None:
    for arguments in (("verify",), ("doctor", "--kernels", "cobol"), ("bake",), ("verify", "x", "--layers", "0")):
        assert run(*arguments).exit_code == 2


def test_as_a_real_process(folders: dict[str, Path]) -> None:
    """Standard output holds the answer alone, standard error the one sentence."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastplug"]
    done = subprocess.run(
        [*command, "doctor", str(folders["config"]), "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["decisions"]
    done = subprocess.run([*command, "verify", "nobody/no-such-model"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fastplug: nobody/no-such-model cannot be loaded")
    assert "Traceback" not in done.stderr


def test_demo_is_loaded_lazily_and_gets_its_flags() -> None:
    pytest.importorskip("fastplug.demo.command")
    result = run("demo", "--help")
    assert result.exit_code == 0, result.output
    assert "--steps" in result.output
    assert run("demo", "--no-such-flag").exit_code == 2
