"""``python -m benchmarks.training_types`` measures every type of docs/training-types.md, and compares the results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training_types
from benchmarks.training_types import TYPES
from benchmarks.turns import Result, Side, compare_gradients

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

DOCS = Path(__file__).parents[2] / "docs" / "training-types.md"


def measured(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    command = ["training_types", "--toy", "--device", "cpu", "--steps", "2", "--option", "graphs=off"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out), *options])
    training_types.main()
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_every_type_of_the_page_is_measured() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(#[^)]*\) \| ([^|]+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    named = []
    for name, base in rows:
        bases = re.findall("NF4|HQQ", base)
        named += [f"{name}_{base.lower()}" for base in bases] if len(bases) > 1 else [name]
    assert sorted(named) == sorted(TYPES)


@pytest.mark.parametrize("options", [(), ("--checkpointed",)], ids=["plain", "checkpointed"])
def test_toy_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    record = measured(monkeypatch, tmp_path / "types.json", "--layers", "2", *options)
    assert record["command"].startswith("python -m benchmarks.training_types")
    assert record["versions"]["torch"] != "-"
    assert record["setting"]["checkpointed"] == bool(options)
    assert record["hardware"]["cores"] > 0
    assert [result["row"] for result in record["results"]] == list(TYPES)
    for saved in record["results"]:
        result = Result(**saved)
        assert not result.trouble(), result
        assert result.ratio is not None
        assert result.ratio > 0
        assert result.patched["decoder_layer"] == (3 if "llama_pro" in result.row else 2)
        assert result.loss == pytest.approx(result.unpatched_loss, rel=1e-5)
        assert result.gradient_norm > 0
        assert result.gradient_cosine == pytest.approx(1.0, abs=1e-6)
    assert "q_llama_pro_hqq" in capsys.readouterr().out


@pytest.mark.parametrize("name", TYPES)
def test_every_trained_tensor_has_a_gradient(name: str) -> None:
    """Else a patched step that computes none would pass for a fast one."""
    model = training_types.prepare(name, 2, torch.device("cpu"), toy=True, checkpointed=False)
    tokens = torch.arange(64).reshape(2, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    kind = TYPES[name]
    assert any("lora_magnitude_vector" in name for name in trained) == (kind.trains == "dora")
    assert all("lora_" in name for name in trained) == (kind.trains in ("lora", "dora"))
    assert (len(trained) == len(list(model.parameters()))) == (kind.trains == "all")


def test_an_error_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = measured(monkeypatch, tmp_path / "types.json", "--types", "llama_pro,lora", "--layers", "1")
    expanded, lora = record["results"]
    assert expanded["ratio"] is None
    assert "every=2 is impossible with 1 blocks" in expanded["error"]
    assert lora["ratio"] > 0
    assert "every=2 is impossible" in capsys.readouterr().out


def test_unknown_types_end_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["training_types", "--toy", "--types", "lora,nora"])
    with pytest.raises(SystemExit):
        training_types.main()
    assert "no type for nora" in capsys.readouterr().err


def test_gradients_are_compared() -> None:
    first, second = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([12.0])
    ours, plain = Side(gradients=[first, torch.zeros(1)]), Side(gradients=[first, second])
    result = Result("lora", "", 1, ratio=1.0)
    compare_gradients(ours, plain, torch.device("cpu"), result)
    assert result.gradient_norm == pytest.approx(5.0)
    assert result.unpatched_gradient_norm == pytest.approx(13.0)
    assert result.gradient_cosine == pytest.approx(5 / 13)
    assert result.without_gradient == 1
    assert "1 trained tensors got no gradient" in result.trouble()
