"""Axolotl's own sample packing, with and without fastplug: ``sample_packing: true`` over ``sdpa``, on a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fastplug_axolotl.roles import LORA_KERNELS
from tests.axolotl.tiny import axolotl, config, history, make

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.cli") is None:
    pytest.skip("Axolotl is not installed", allow_module_level=True)
pytest.importorskip("click", reason="without the packages that Axolotl's command line needs")
pytest.importorskip("fire", reason="without the packages that Axolotl's command line needs")

# Counts in the run's process: documents handed to a backbone, and masks with numbers that fastplug made.
WATCH = """
import atexit, json
from axolotl.integrations.base import BasePlugin

class Watch(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        from fastplug.ops.document_attention import Documents
        from fastplug.ops.document_attention import lazy_mask

        counted = {"documents": [], "masks": 0}
        new, mask = lazy_mask.DocumentMask.__new__, Documents.mask

        def watching(cls, documents, window=None):
            counted["documents"].append(len(documents.cu_seqlens) - 1)
            return new(cls, documents, window)

        def counting(self, window=None):
            counted["masks"] += 1
            return mask(self, window)

        lazy_mask.DocumentMask.__new__ = staticmethod(watching)
        Documents.mask = counting
        atexit.register(lambda: open(cfg.output_dir + "/watched.json", "w").write(json.dumps(counted)))
"""


def test_the_losses_are_the_same_and_no_mask_is_made(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "watch.py").write_text(WATCH)
    common: dict[str, Any] = {
        "sample_packing": True,
        "attn_implementation": "sdpa",
        "micro_batch_size": 1,
        "sequence_len": 256,
    }
    runs = {
        "plain": dict.fromkeys(LORA_KERNELS, False),
        "fused": {"plugins": ["watch.Watch", "fastplug"], "fastplug": {"strict": True}},
    }
    for name, changes in runs.items():
        axolotl("train", config(tmp_path, name, **common, **changes), "--launcher", "python", folder=tmp_path)
    expected = history(tmp_path / "plain")
    assert len(set(expected)) == 3
    assert history(tmp_path / "fused") == pytest.approx(expected, rel=1e-5)
    assert not json.loads((tmp_path / "fused" / "fastplug_report.json").read_text())["fallbacks"]
    watched = json.loads((tmp_path / "fused" / "watched.json").read_text())
    assert len(watched["documents"]) == 3 * 2  # steps of two micro-batches
    assert min(watched["documents"]) > 1
    assert watched["masks"] == 0
