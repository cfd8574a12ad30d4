"""The benchmarks themselves, on a tiny model and on a CPU: weights, the loop, the workers, the ops, the chart."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, ops, ops_cases, timing, weights
from benchmarks.ops_cases import Sizes
from benchmarks.rows import Row
from benchmarks.systems import System, load

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).parents[2]
EFFORT = measure.Effort(warmup=2, steps=3, profile=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "tiny")
    weights.write("tiny", path)
    return path


def test_what_is_built_is_what_is_written(folder: str) -> None:
    import transformers

    built = weights.build("tiny").state_dict()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert built.keys() == loaded.keys()
    assert all(torch.equal(built[name], loaded[name].to(built[name].device)) for name in built)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 512


def test_what_is_quantized_here_is_what_transformers_quantizes(folder: str, device: torch.device) -> None:
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, quantization_config=config
    )
    mine = weights.quantize(weights.build("tiny"))
    assert mine.is_loaded_in_4bit
    pairs = list(zip(mine.named_parameters(), theirs.named_parameters()))
    for (name, ours), (same, other) in pairs:
        assert name == same
        assert type(ours) is type(other)
        assert torch.equal(ours, other), name
        if hasattr(ours, "quant_state"):
            state, expected = (p.quant_state.as_dict(packed=True) for p in (ours, other))
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[part], expected[part]) for part in state), name
    for ours, other in zip(mine.modules(), theirs.modules()):
        assert type(ours) is type(other)
        assert getattr(ours, "compute_dtype", None) == getattr(other, "compute_dtype", None)
    assert weights.fingerprint(mine) == weights.fingerprint(theirs)


def test_other_embeddings_have_another_fingerprint() -> None:
    model = weights.build("tiny")
    before = weights.fingerprint(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[97, 3] += 0.5
    assert weights.fingerprint(model) != before


@pytest.mark.parametrize("text", ["qlora:2x16", "lora:2x16:checkpointed", "qlora:2x160:random", "qlora:2x16:dora"])
def test_systems_agree(text: str) -> None:
    row, found = Row.parse(text), []
    for name in ("hf", "fastplug-graphs-off"):
        model = load(System.parse(name), "tiny", None, row, "").train()
        result = measure.measure(model, row, EFFORT)
        assert result["ms"] > 0
        assert result["dead"] == 0
        assert result["trained"] == (42 if row.dora else 28)
        assert result["steps"] == 3
        assert ("wall_s" in result) == row.random
        found.append(result)
    hf, fast = found
    assert fast["loss"] == pytest.approx(hf["loss"], rel=1e-3)
    assert fast["grad_norm"] == pytest.approx(hf["grad_norm"], rel=1e-2)


def test_doras_magnitudes_are_the_same_in_every_row_and_near_the_norms_of_the_matrices() -> None:
    model = load(System.parse("hf"), "tiny", None, Row.parse("lora:2x16:dora"), "")
    magnitudes = [p for name, p in model.named_parameters() if "magnitude" in name]
    norms = [p.detach().clone() for p in magnitudes]  # as PEFT initialises them
    measure.reset_adapters(model)
    drawn = [p.detach().clone() for p in magnitudes]
    assert len(drawn) == 14
    assert all(((p / norm - 1).abs() < 0.7).all() for p, norm in zip(drawn, norms))
    assert all(p.std() > 0.02 * p.mean() for p in drawn)
    for p in magnitudes:
        p.data.mul_(2)  # what training did to them
    measure.reset_adapters(model)
    assert all(torch.equal(p, was) for p, was in zip(magnitudes, drawn))


def test_a_lost_gradient_is_seen() -> None:
    model = load(System.parse("hf"), "tiny", None, Row.parse("lora:2x16"), "").train()
    hooked = next(p for name, p in model.named_parameters() if "lora_B" in name)
    hooked.register_hook(torch.zeros_like)
    assert measure.measure(model, Row.parse("lora:2x16"), EFFORT)["dead"] == 1


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    out, chart = tmp_path / "out" / "step.json", tmp_path / "step.png"
    pytest.importorskip("matplotlib")
    words = "--shape tiny --row lora:2x16 --row lora:1x16:checkpointed --systems hf,axolotl,fastplug --steps 3".split()
    command = [sys.executable, "-m", "benchmarks.step", *words, "--out", str(out), "--chart", str(chart)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["versions"]["torch"] == version("torch")
    assert record["hardware"]["cores"] > 0
    by_system: dict[str, list[dict[str, Any]]] = {}
    for result in record["results"]:
        by_system.setdefault(result["system"], []).append(result)
    assert [r["trouble"] for r in by_system["fastplug"] + by_system["hf"]] == [""] * 4
    assert all(r["checked_against"] == "hf" for r in record["results"])
    assert all("axolotl" in r["error"] or "liger" in r["error"] for r in by_system["axolotl"])  # not installed here
    assert "lora:1x16:checkpointed, checked against hf" in done.stdout
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_every_op_is_checked_and_timed() -> None:
    lines: list[str] = []
    record = ops.run(Sizes(torch.device("cpu"), **ops.TRIAL), list(ops.GROUPS), lines.append)
    assert not [r for r in record["ops"] if "error" in r]
    mine = [r for r in record["ops"] if r["library"] == "fastplug"]
    assert {r["op"].split()[0] for r in mine} >= {"rms_norm", "rope", "swiglu", "cross", "nf4", "int8", "fp8", "mxfp4"}
    assert all(r["ms"] > 0 and r["of_copy"] > 0 for r in mine)
    assert all(r["relative_error"] <= r["bound"] for r in mine if "bound" in r)
    assert len(lines) == len(record["ops"]) + 2


def test_a_wrong_op_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastplug.ops.glu import reference

    right = reference.forward

    def half(gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor) -> None:
        right(gate[: len(gate) // 2], up[: len(gate) // 2], activation, out[: len(gate) // 2])

    monkeypatch.setattr(reference, "forward", half)
    record = ops.run(Sizes(torch.device("cpu"), **ops.TRIAL), ["glu"], lambda text: None)
    assert "wrong" in record["ops"][0]["error"]
    assert "ms" not in record["ops"][0]


def test_an_op_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sizes: Sizes) -> Any:
        raise RuntimeError("no such kernel")
        yield

    monkeypatch.setitem(ops.GROUPS, "rope", fail)
    record = ops.run(Sizes(torch.device("cpu"), **ops.TRIAL), ["rope", "fp8"], lambda text: None)
    assert record["ops"][0]["error"] == "RuntimeError: no such kernel"
    assert record["ops"][-1]["ms"] > 0


def test_errors_are_relative_and_see_what_was_not_written() -> None:
    truth = torch.randn(64, 64, dtype=torch.float64)
    assert ops_cases.error(truth * 1.01, truth) == pytest.approx(0.01)
    unwritten = truth.clone()
    unwritten[3, 4] = float("nan")
    assert ops_cases.error(unwritten, truth) == float("inf")
    assert ops_cases.judged((truth.bfloat16(), truth))[0] <= ops_cases.judged((truth.bfloat16(), truth))[1]


def test_the_clock_counts_one_call() -> None:
    import time

    assert timing.milliseconds([lambda: time.sleep(0.01)] * 2) == pytest.approx(10, abs=8)
