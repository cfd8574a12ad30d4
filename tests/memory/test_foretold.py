"""What is foretold against what was recorded under budgets, and the host's memory against the pool that takes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
import fastplug
from benchmarks import planning
from fastplug.memory.bytes import Step, peaks
from fastplug.memory.estimate import uniform_plan
from fastplug.memory.forecast import CONTEXT, RESERVED
from fastplug.memory.host_memory import PIECE
from fastplug.memory.model_reading import decoder_layers
from fastplug.memory.moments import HEAD
from fastplug.memory.policy import Policy
from fastplug.memory.shapes import ModelShape
from fastplug.memory.showing import columns_of
from tests import models
from tests.memory.under import layers, under

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BUDGETS = ("2026-11-21-h100-memory-budgets", "2026-11-21-h100-memory-budgets-2", "2026-11-22-h100-65536-tokens")
GiB = 2**30


def results(*names: str) -> list[planning.Recorded]:
    return [run for name in names for run in planning.recorded(RESULTS / f"{name}.json")]


def test_totals_are_those_measured_under_budgets() -> None:
    """Reserved memory and the CUDA context, which a budget means, of runs whose layers had these policies. One of them
    ran out of memory first and was planned anew three times: what it reached is not its last plan's."""
    runs = [run for run in results(*BUDGETS) if "9GiB" not in run.what or not run.tile_rows]
    assert len(runs) == 10
    for run in runs:
        plan = planning.today(run)
        assert run.total is not None
        assert plan.total == pytest.approx(run.total, rel=0.05), run.what
        assert plan.allocated == pytest.approx(run.allocated, rel=0.05), run.what


def test_what_the_docs_call_measured_was_recorded() -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    section = page.partition("<!-- measured -->")[2].partition("<!-- /measured -->")[0]
    names = re.findall(r"`(2026-[\w.-]+)\.json`", section)
    runs = results(*names)
    recorded = {
        "allocated": {f"{run.allocated / GiB:.2f}" for run in runs},
        "reserved + context": {f"{run.total / GiB:.2f}" for run in runs if run.total is not None},
    }
    seen = 0
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines())
        for row in rows:
            for name, known in recorded.items():
                if name in head:
                    assert row[head.index(name)] in known, row
                    seen += 1
    assert seen > 60


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy.offloads])
@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("llama", 8), ("qwen3", 2)])
def test_host_memory_is_counted_in_the_pieces_of_the_pool(family: str, heads: int, policy: Policy) -> None:
    config: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    config |= {"num_key_value_heads": heads, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    model = models.lora(models.plain(family, **config), r=64)
    shape = ModelShape.of_model(model, decoder_layers(model))
    foretold = sum(peaks(layer, Step.of(shape, 1, 2048), policy).host for layer in shape.layers)
    fastplug.apply(model, graphs="off")
    under(model, policy)
    tokens = torch.randint(3, 200, (1, 2048))
    loss = model(input_ids=tokens, labels=tokens).loss
    taken = layers(model)[0].__dict__["_fastplug"].runtime.offload.host_bytes
    assert loss.requires_grad
    assert taken > 0
    # k may be copied once more than needed, by itself, before the whole of q, k and v is
    assert taken <= foretold <= taken + (PIECE * len(shape.layers) if policy.keeps_attention else 0)


def test_columns_add_up_and_show_the_logits_where_they_are_highest() -> None:
    model = models.lora(models.plain("llama", vocab_size=32000))
    shape = ModelShape.of_model(model, decoder_layers(model))
    plan = uniform_plan(shape, 2, 512, GiB, Policy.RESIDUAL, context=CONTEXT, slack=RESERVED)
    assert plan.moment == HEAD
    assert columns_of(plan)["logits"] == plan.logits > 0
    other = uniform_plan(shape, 1, 64, GiB, Policy.KEEP, accumulating=False)
    for one in (plan, other):
        columns = columns_of(one)
        assert sum(columns.values()) == one.total
        assert sum(columns.values()) - columns["reserve"] == one.allocated
    assert (columns_of(other)["logits"] > 0) == (other.moment == HEAD)


def test_recorded_results_of_all_kinds_are_read() -> None:
    (first, *_) = results("2026-11-21-h100-planning")
    assert (first.batch, first.length, first.quant, first.policies) == (4, 2048, "nf4", ["keep"] * 6)
    assert first.then is not None
    steps = results("2026-11-22-h100-qwen3-8b")
    assert [set(run.policies) for run in steps] == [{"keep"}, {"keep"}, {"residual"}, {"residual"}]
    record = json.loads((RESULTS / f"{BUDGETS[0]}.json").read_text(encoding="utf-8"))
    assert len(results(BUDGETS[0])) == len(record["results"])
