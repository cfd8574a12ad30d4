"""Sizes as they stand in messages: never 0.00 of a unit, never a pair of brackets around nothing."""

from __future__ import annotations

import pytest

from fastplug.memory.budget import gib
from fastplug.memory.costs import LayerCosts, PolicyCost
from fastplug.memory.policy import Policy
from fastplug.memory.solve import DoesNotFit, solve


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (24 * 2**30, "24.00 GiB"),
        (2**28, "0.25 GiB"),
        (2**26, "64.00 MiB"),
        (12345, "12.06 KiB"),
        (200, "0.20 KiB"),
        (7, "7 bytes"),
        (0, "0 bytes"),
        (-(2**20), "-1.00 MiB"),
    ],
)
def test_sizes_are_in_a_unit_that_shows_them(size: int, wanted: str) -> None:
    assert gib(size) == wanted


def test_small_budgets_are_refused_with_numbers() -> None:
    layer = LayerCosts({Policy.KEEP: PolicyCost(2**20, 2**20, 2**20, 1.0)})
    with pytest.raises(DoesNotFit) as caught:
        solve([layer], {"weights": 2**20, "adapters": 2000}, 2**20, context=2**19)
    said = str(caught.value)
    assert "a budget of 1.00 MiB is too small: what is there before the first step is 1.50 MiB alone" in said
    assert "(weights 1.00 MiB, CUDA context 0.50 MiB)" in said  # what hardly counts is left out
    with pytest.raises(DoesNotFit) as caught:
        solve([layer], 0, 2**19)
    assert "()" not in str(caught.value)
