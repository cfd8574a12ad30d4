"""The benchmark of Python's part of a step."""

from __future__ import annotations

import pytest

from benchmarks import host_time

pytestmark = pytest.mark.interpreter

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def launches(layers: int, checkpointed: bool = False) -> int:
    found = host_time.run(layers, steps=2, checkpointed=checkpointed, options={})
    assert 0 < found["forward"][1] < found["step"][1] <= found["step"][0]
    return sum(found["launches"].values())


def test_launches_of_a_layer(device: object) -> None:
    """Fourteen forward: two norms, RoPE, the gated unit and its sums, four groups of weights decoded and four of
    adapters stacked, and the share of the last one's adapter. Fifteen backward, of which six are for the adapters of
    q, k and v together, of the output projection and of down, and two for the unit. Checkpointed, all but the unit, its
    sums, the last group's weights and that share a second time, gate and up no third time, and once the gradient of the
    first layer's input."""
    if str(device) != "cpu":
        pytest.skip("counts what is not launched")
    one, two = launches(1), launches(2)
    assert two - one == 29
    assert launches(2, checkpointed=True) == two + 2 * (10 - 1) + 2
