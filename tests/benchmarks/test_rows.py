"""Rows, systems and plans of ``benchmarks.step``, and what it makes of results."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks import report, step
from benchmarks.pool import key
from benchmarks.rows import TABLE, Row, lengths
from benchmarks.systems import System


@pytest.mark.parametrize(
    "text",
    [
        *TABLE,
        "qlora:2x1024:random",
        "qlora:4x2048:dora:checkpointed",
        "qlora:4x2048:prompts",
        "lora:1x8:checkpointed:prepared:autocast",
    ],
)
def test_a_row_is_what_it_prints(text: str) -> None:
    assert str(Row.parse(text)) == text


@pytest.mark.parametrize("text", ["", "qlora", "qlora:4", "qlora:4x", "int8:4x8", "lora:4x8:fast", "lora:ax8"])
def test_no_row(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no row"):
        Row.parse(text)


def test_lengths() -> None:
    drawn = lengths(Row.parse("qlora:2x1024:random"), 200)
    assert drawn == lengths(Row.parse("lora:2x1024:random"), 200)  # the same for all systems
    assert len(set(drawn)) > 150
    assert (min(drawn) >= 128, max(drawn) <= 1024, len(drawn)) == (True, True, 200)
    assert drawn[:50] == lengths(Row.parse("qlora:2x1024:random"), 50)
    assert lengths(Row.parse("qlora:2x512"), 3) == [512] * 3


def test_systems() -> None:
    assert System.parse("hf") == System("hf", "hf")
    assert System.parse("fastplug-graphs-off") == System("fastplug-graphs-off", "fastplug", {"graphs": "off"})
    parsed = System.parse("fastplug+graphs=on+plugins=false")
    assert parsed.options == {"graphs": "on", "plugins": False}
    for wrong in ("slow", "hf+graphs=off", "unsloth+x=1"):
        with pytest.raises(ValueError, match="is no system"):
            System.parse(wrong)


def test_what_a_system_cannot_run_is_said() -> None:
    prepared, plain = Row.parse("qlora:2x8:prepared"), Row.parse("qlora:2x8")
    assert "one dtype" in (System.parse("axolotl").refuses(prepared) or "")
    assert "one dtype" in (System.parse("liger").refuses(prepared) or "")
    assert System.parse("unsloth-offload").refuses(plain)
    assert not any(System.parse(name).refuses(plain) for name in ("hf", "axolotl", "liger", "unsloth", "fastplug"))


def test_a_row_with_dora_is_another_model() -> None:
    row = Row.parse("qlora:4x2048:dora:checkpointed")
    assert row.dora
    assert row.loading != row.without_dora.loading
    assert str(row.without_dora) == "qlora:4x2048:checkpointed"
    assert row.without_dora.without_dora == row.without_dora


def plan(*words: str) -> list[tuple[str, str]]:
    return [(system.name, str(row)) for system, row in step.planned(step.arguments().parse_args(words))]


def test_rows_that_share_a_loading_are_run_together_the_longer_first() -> None:
    rows = ["qlora:2x512", "lora:2x8", "qlora:4x2048"]
    assert plan("--systems", "hf,fastplug", *[word for row in rows for word in ("--row", row)]) == [
        ("hf", "qlora:4x2048"), ("hf", "qlora:2x512"), ("fastplug", "qlora:4x2048"), ("fastplug", "qlora:2x512"),
        ("hf", "lora:2x8"), ("fastplug", "lora:2x8"),
    ]  # fmt: skip


def test_the_default_is_the_table_for_all_systems() -> None:
    runs = plan()
    assert {row for _, row in runs} == set(TABLE)
    assert {system for system, _ in runs} == {"hf", "liger", "axolotl", "unsloth", "fastplug"}


def test_single_runs_and_random_lengths() -> None:
    assert plan("--run", "fastplug+graphs=off=qlora:2x8", "--run", "hf=lora:1x8") == [
        ("fastplug+graphs=off", "qlora:2x8"), ("hf", "lora:1x8"),
    ]  # fmt: skip
    assert plan("--systems", "hf", "--row", "lora:2x256", "--lengths", "random") == [("hf", "lora:2x256:random")]


def test_which_runs_share_a_process() -> None:
    hf, unsloth = System.parse("hf"), System.parse("unsloth")
    plain, checkpointed, cold = map(Row.parse, ("qlora:2x8", "qlora:2x8:checkpointed", "qlora:2x8:random"))
    assert key(hf, plain) == key(hf, checkpointed) != key(hf, cold)
    assert key(unsloth, plain) != key(unsloth, checkpointed)


def result(system: str, **changes: Any) -> dict[str, Any]:
    row = {"system": system, "row": "qlora:2x8", "ms": 10.0, "loss": 6.0, "grad_norm": 0.5, "dead": 0, "trained": 28,
           "weights": 1.0}  # fmt: skip
    return {**row, **changes}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dead": 3}, "3 LoRA tensors got no gradient"),
        ({"loss": 6.2}, "loss 6.2 against 6.0 of hf"),
        ({"loss": float("nan")}, "loss nan"),
        ({"grad_norm": 0.6}, "grad_norm 0.6 against 0.5 of hf"),
        ({"grad_norm": float("nan")}, "grad_norm nan"),
        ({"trained": 27}, "27 trained tensors against 28"),
        ({"error": "out of memory"}, "out of memory"),
        ({"loss": 6.001, "grad_norm": 0.501}, ""),
    ],
)
def test_a_step_that_computes_something_else_does_not_count(changes: dict[str, Any], why: str) -> None:
    results = [result("unsloth", ms=5.0), result("hf"), result("fastplug", **changes)]
    found = report.check(results[2], report.oracle(results, "qlora:2x8"))
    assert found.startswith(why) if why else found == ""
    _, head, _, unsloth, *_ = report.table(results)
    assert head == "qlora:2x8, checked against hf"
    assert unsloth.split()[5] == ("-" if why else "0.50")  # a ratio stands only beside a valid fastplug


def test_the_first_that_ran_is_the_oracle_where_the_unpatched_model_did_not() -> None:
    results = [result("hf", error="out of memory"), result("liger", loss=6.01), result("fastplug", weights=2.0)]
    reference = report.oracle(results, "qlora:2x8")
    assert reference is results[1]
    text = "\n".join(report.table(results))
    assert "checked against liger, the unpatched model did not run" in text
    assert "hf                         left out: out of memory" in text
    assert "embeddings differ from liger's" in text
    assert report.oracle([result("hf", error="x")], "qlora:2x8") is None


def test_the_unpatched_model_of_the_checkpointed_row_or_of_an_earlier_run_will_do() -> None:
    checkpointed = result("hf", row="qlora:2x8:checkpointed", loss=6.01)
    results = [result("unsloth", loss=6.2), checkpointed]
    assert report.oracle(results, "qlora:2x8") is checkpointed
    record = {"shape": "tiny", "layers": None, "date": "2026-01-01", "results": [result("hf"), result("liger")]}
    earlier = report.unpatched([record], "tiny", None)
    assert [r["system"] for r in earlier] == ["hf"]
    found = report.oracle(results[:1], "qlora:2x8:checkpointed", earlier)
    assert found is earlier[0]
    assert report.check(results[0], found) == "loss 6.2 against 6.0 of hf in a run of 2026-01-01"
    assert "qlora:2x8, checked against hf in a run of 2026-01-01" in report.table(results[:1], earlier)
    with pytest.raises(ValueError, match="that run was of tiny with layers=None, not of tiny, 2"):
        report.unpatched([record], "tiny", 2)


def test_fastplug_with_options_is_measured_against_fastplug_without() -> None:
    results = [result("hf", ms=30.0), result("fastplug-graphs-off", ms=20.0), result("fastplug", ms=10.0)]
    lines = report.table(results)
    assert [line.split()[5] for line in lines if line.startswith("  ") and "system" not in line] == [
        "3.00",
        "2.00",
        "1.00",
    ]


def test_dora_is_compared_with_the_same_systems_lora() -> None:
    results = [
        result("hf", ms=30.0), result("fastplug", ms=10.0), result("hf", ms=60.0, row="qlora:2x8:dora", trained=42),
        result("fastplug", ms=11.2, row="qlora:2x8:dora", trained=42),
        result("unsloth", ms=9.0, row="qlora:2x8:dora"),  # has dropped the flag
    ]  # fmt: skip
    text = report.table(results)
    hf, fast, unsloth = text[text.index("qlora:2x8:dora, checked against hf") + 2 :]
    assert hf.split()[5] == "5.36"
    assert hf.endswith("2.00 x its time without DoRA")
    assert fast.endswith("1.12 x its time without DoRA")
    assert "invalid" in unsloth
    assert unsloth.endswith("28 trained tensors against 42")
    assert not any("without DoRA" in line for line in text[: text.index("qlora:2x8:dora, checked against hf")])
    results[1]["dead"] = 3  # a ratio to a wrong step would say nothing
    assert not report.table(results)[-2].endswith("without DoRA")
