"""onnxruntime as a runtime of the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class OnnxRuntime:
    """A decoder graph in onnxruntime on the CPU.

    With a cache a sequence is run in two steps, the second on the cache of the first, so that the cache is proven too.

    Args:
        file: The ``.onnx`` file.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._past = [node for node in self._session.get_inputs() if node.name.startswith("past_key_values.")]
        self._names = {node.name for node in self._session.get_inputs()}
        self.name = f"onnxruntime {onnxruntime.__version__}"

    def logits(self, token_ids: Tensor) -> Tensor:
        cut = len(token_ids) // 2 if self._past else 0
        past = {node.name: torch.zeros(1, node.shape[1], 0, node.shape[3]).numpy() for node in self._past}
        parts = []
        for begin, end in ((0, cut), (cut, len(token_ids))):
            if begin == end:
                continue
            feed = {
                "input_ids": token_ids[None, begin:end].numpy(),
                "attention_mask": torch.ones(1, end, dtype=torch.int64).numpy(),
                "position_ids": torch.arange(begin, end)[None].numpy(),
            }
            feed = {name: value for name, value in feed.items() if name in self._names}
            found, *present = self._session.run(None, {**feed, **past})
            past = {node.name: value for node, value in zip(self._past, present)}
            parts.append(torch.from_numpy(found)[0].float())
        return torch.cat(parts)
