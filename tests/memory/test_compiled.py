"""torch.compile and ``memory=``: nothing is planned, which is said, and the host's checkpointing is an order again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastplug
from fastplug.memory.runtime import planners
from tests import models
from tests.memory.under import calls

pytest.importorskip("peft")

BATCH = models.batch(2, 40)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(**options: Any) -> Any:
    model = models.lora(models.plain(num_hidden_layers=1))
    fastplug.apply(model, **options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def test_nothing_is_planned_which_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    counts, attentions = [], []
    for memory in (None, "1GiB"):
        model = make(memory=memory)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend="eager")
        compiled(**BATCH).loss.backward()
        counts.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
        attentions.append(calls(lambda compiled=compiled: compiled(**BATCH).loss.backward()))
    assert attentions == [2, 2]  # the second in the backward
    assert counts[0] == counts[1], "saying so became part of what is compiled"
    (note,) = fastplug.report(model).notes
    assert note.startswith("memory='1GiB': under torch.compile nothing is planned")
    assert sum("under torch.compile" in record.getMessage() for record in caplog.records) == 1
    assert "no plan, under torch.compile" in str(fastplug.report(model))
    assert planners(model)[0].plan is None
    assert calls(lambda: model(**BATCH).loss.backward()) == 1  # a permission, without the compiler


def test_evaluation_alone_says_nothing() -> None:
    model = make(memory="1GiB").eval()
    with torch.no_grad():
        torch.compile(model, backend="eager")(**BATCH)
    assert not fastplug.report(model).notes
