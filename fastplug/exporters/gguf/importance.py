"""The importance matrix: how much each column of a weight matters on the user's own text.

For a linear layer ``y = W x``, an error ``e`` in column ``j`` of ``W`` changes the output by ``e * x_j``, so its
expected squared cost is ``e**2 * mean(x_j**2)``. llama.cpp's quantizers weigh the error of each column by that mean.
It is measured on the live model, with its adapters, by hooks on its linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastplug.exporters.models import base_of
from fastplug.exporters.proof import LiveRuntime

_WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "original_module", "modules_to_save", "module")


def importance(
    model: Any, sequences: Iterable[Tensor], made: Mapping[str, list[str]], adapters: Any = None
) -> dict[str, Tensor]:
    """The mean square of what each column of a weight is multiplied with.

    Args:
        model: The live model.
        sequences: Token ids, int64 ``[length]`` each.
        made: The names in the GGUF file of each tensor of the model, as the converter wrote them.
        adapters: Names of the adapters to run with; None: whichever are active.

    Returns:
        fp32 ``[columns]`` by the tensor's name in the GGUF file. Expert stacks are left out: their inputs differ.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs = arguments[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + inputs.square().sum(0, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + len(inputs)

        return hook

    for path, module in base_of(model).named_modules():
        name = ".".join(part for part in path.split(".") if part not in _WRAPPERS) + ".weight"
        weight = module._parameters.get("weight")
        if name in made and weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            handles.append(module.register_forward_pre_hook(watch(name)))
    try:
        live = LiveRuntime(model, adapters)
        for ids in sequences:
            live.logits(ids)
    finally:
        for handle in handles:
            handle.remove()
    return {
        new: (total / counts[name]).float().cpu() for name, total in sums.items() for new in made[name]
        if new.endswith(".weight")
    }  # fmt: skip


__all__ = ["importance"]
