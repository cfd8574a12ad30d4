"""``fastplug export`` on the command line: what it prints and proves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers
from click.testing import Result
from typer.testing import CliRunner

from fastplug.cli.app import app
from tests.exporters.models import DTYPE, adapted, llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    llama().save_pretrained(root / "base")
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(root / "base", **{DTYPE: torch.bfloat16})
    adapted(base).save_pretrained(root / "adapter")
    return root


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["export", *map(str, arguments)])


def test_the_proof_is_printed(folder: Path, tmp_path: Path) -> None:
    result = run(
        folder / "base", "--adapter", folder / "adapter", "--out", tmp_path / "out", "--format", "merged_32bit"
    )
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("proof: "))
    for measure in ("largest logit difference", "KL", "top-1 agreement", "perplexity"):
        assert measure in line


def test_no_verify_says_so(folder: Path, tmp_path: Path) -> None:
    result = run(folder / "adapter", "--out", tmp_path / "out", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "proof: " not in result.output
    assert "note: Not verified (verify=False)" in result.output


def test_both_ways_to_merge(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    common = (folder / "base", "--adapter", folder / "adapter", "--quant", "nf4")
    decoded = run(*common, "--out", tmp_path / "decoded")
    original = run(*common, "--base", folder / "base", "--out", tmp_path / "original")
    assert decoded.exit_code == 0, decoded.output
    assert original.exit_code == 0, original.output
    assert "proof: " in decoded.output
    assert "Merged onto the original base: 14 weights" in original.output


def test_one_sentence_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    result = run(folder / "base", "--out", folder / "adapter")
    assert result.exit_code == 2
    assert "choose another name, or pass overwrite=True" in result.stderr
    llama(hidden_size=32).save_pretrained(tmp_path / "other")
    result = run(tmp_path / "other", "--adapter", folder / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "does not fit the base" in result.stderr
    assert not (tmp_path / "out").exists()
