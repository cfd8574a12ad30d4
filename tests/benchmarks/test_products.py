"""The variants of a step's large products are the same product."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.products import PRODUCTS, Meter, sustained, variants


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_variants_agree(product):
    calls = variants(product, 16, torch.device("cpu"), 256)
    expected = calls["new"]().clone()
    for name, call in calls.items():
        if name.startswith("new"):
            torch.testing.assert_close(call(), expected)
        else:  # what is there already, scaled down, stays
            torch.testing.assert_close(call(), expected, rtol=0.02, atol=0.02)


def test_a_call_is_timed():
    found = sustained(lambda: torch.ones(8).sum(), 0.001, Meter())
    assert found["ms"] > 0


def test_the_command(tmp_path):
    out = tmp_path / "products.json"
    command = [sys.executable, "-m", "benchmarks.products", "--only", "o", "--seconds", "0.001", "--rounds", "1"]
    subprocess.run([*command, "--out", str(out)], check=True)
    assert '"variant": "new, weight turned"' in out.read_text(encoding="utf-8")
