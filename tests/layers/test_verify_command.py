"""``fastplug verify`` and ``doctor`` over FP8 products and HQQ."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import fastplug
from fastplug.cli import app
from fastplug.layers import load
from tests import models

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    models.plain(intermediate_size=128).save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def errors(output: str) -> dict[tuple[str, str], float]:
    """What was compared -> its error, of every row of the table."""
    rows = re.findall(r"│ +ok +│ (\w+) +│ (\S.*?) +│ +(\S+) │", output)
    return {(kind, name): float(error) for kind, name, error in rows}


@pytest.mark.parametrize("quant", [(), ("--quant", "hqq")], ids=["plain", "hqq"])
def test_verify_in_fp8(folder: Path, quant: tuple[str, ...]) -> None:
    """On a CPU, where FP8 products are computed in fp32 of the same rounded operands."""
    found = {}
    for compute in ("exact", "fp8_backward", "fp8"):
        torch.manual_seed(0)  # of the adapter
        result = run("verify", folder, "--device", "cpu", "--dtype", "bfloat16", "--batch", "2x32", "--all",
                     "--compute", compute, *quant)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "fastplug verify: ok" in result.output
        assert (f"compute='{compute}' passes with errors up to" in result.output) is (compute != "exact")
        found[compute] = errors(result.output)
    exact, backward, both = found.values()
    assert exact.keys() == backward.keys() == both.keys()
    inner = next(key for key in exact if key[0] == "gradient" and "layers.0" in key[1] and "(input)" in key[1])
    assert backward[inner] > 3 * exact[inner]
    outputs = [key for key in exact if key[0] == "output"]
    assert len(outputs) == 2
    for key in outputs:  # the forward of fp8_backward is the exact one
        assert backward[key] == exact[key]
        assert both[key] > 3 * exact[key]


def test_verify_over_hqq(folder: Path) -> None:
    result = run("verify", folder, "--device", "cpu", "--batch", "2x17", "--quant", "hqq")
    assert result.exit_code == 0, result.output
    assert "fastplug verify: ok" in result.output


def test_doctor_foretells_hqq(folder: Path) -> None:
    result = run("doctor", folder, "--device", "cpu", "--quant", "hqq", "--json")
    assert result.exit_code == 0, result.output
    foretold = json.loads(result.stdout)["report"]
    found = fastplug.apply(models.lora(load(folder, "hqq", device="cpu"))).report.as_dict()
    assert foretold["decisions"] == found["decisions"]


def test_rows_that_hqq_cannot_divide(tmp_path: Path) -> None:
    models.plain(intermediate_size=96).save_pretrained(tmp_path)
    for command in ("verify", "doctor"):
        result = run(command, tmp_path, "--device", "cpu", "--quant", "hqq")
        assert result.exit_code == 2, result.output
        assert "groups of 64 do not divide rows of 96" in result.stderr
