"""docs/families.md is generated, and the row of docs/adding-a-family.md works."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastplug
from fastplug.families import fastplug_families
from fastplug.families.table import markdown
from fastplug.manager import manager
from tests import models
from tests.engine.step import assert_parity
from tests.families import cases, sweep
from tests.families.test_structural import TYPES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_families_is_up_to_date() -> None:
    assert markdown(fastplug_families()) in (DOCS / "families.md").read_text(encoding="utf-8")


def test_the_page_lists_the_types_that_are_tested() -> None:
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    found = re.findall(r"(\d+) types without a row get norms, MLPs and the loss:\n\n(.*?)\.\n\n", page, re.DOTALL)
    ((count, names),) = found
    assert tuple(re.split(r",\s+", names)) == TYPES
    assert int(count) == len(TYPES)
    assert len(TYPES) >= 30


def test_every_row_differs_in_words_from_every_other() -> None:
    table = markdown(fastplug_families()).splitlines()
    assert len({line.split("|")[1] for line in table}) == len(table)


@pytest.fixture
def plugin() -> Iterator[Any]:
    """The page's example, registered as a plugin for the time of one test."""
    page = (DOCS / "adding-a-family.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
    module = types.ModuleType("example")
    exec(code, module.__dict__)
    plugins = manager()._manager
    plugins.register(module, "example of the page")
    yield module
    plugins.unregister(module)


@pytest.mark.skipif("hunyuan_v1_dense" not in sweep.model_types(), reason="needs transformers with Hunyuan")
def test_the_example_adds_a_family(plugin: Any) -> None:
    plain = sweep.tiny("hunyuan_v1_dense")
    for model in (plain, models.lora(plain, target_modules=list(cases.linears(plain)))):
        twin = assert_parity(model, models.padded("left"))
        found = {d.role for d in fastplug.report(twin).patched if d.family == "hunyuan"}
        assert found >= {"decoder_layer", "attention", "mlp", "lm_head_loss"}
