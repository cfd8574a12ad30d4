"""One weight becomes several stored tensors: they are computed together and handed out one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastplug.exporters.tensors import LazyTensor

Spec = tuple[tuple[int, ...], torch.dtype]


def split(
    weight: LazyTensor, specs: Mapping[str, Spec], encode: Callable[[Tensor], dict[str, Tensor]]
) -> list[LazyTensor]:
    """The stored tensors of ``weight``.

    Args:
        weight: A merged weight.
        specs: Name, shape and dtype of what ``encode`` returns.
        encode: Computes them from the weight's values.
    """
    ready: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if name not in ready:
                with torch.no_grad():
                    ready.update(encode(weight.read()))
            return ready.pop(name)

        return read

    return [
        LazyTensor(name, shape, dtype, reader(name), (id(ready), name), weight.adapters, weight.parameter)
        for name, (shape, dtype) in specs.items()
    ]


def linear_layers(tensors: Sequence[LazyTensor]) -> list[LazyTensor]:
    """The two-dimensional weights of linear layers, without the head over the vocabulary."""
    return [tensor for tensor in tensors if tensor.linear and not tensor.head and len(tensor.shape) == 2]


def left_plain(tensors: Sequence[LazyTensor], quantized: set[str], heads: Sequence[str]) -> list[str]:
    """Names (or, for experts, a pattern) of the modules with matrices that stay plain, for a config's list of them."""
    names = dict.fromkeys(heads)
    for tensor in tensors:
        matrix = tensor.name.endswith(".weight") and len(tensor.shape) == 2 and tensor.name not in quantized
        if matrix and ".experts." in tensor.name:
            names["re:.*\\.experts\\..*"] = None
        elif matrix and "embed" not in tensor.name:
            names[tensor.name.removesuffix(".weight")] = None
    return list(names)


def plain(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """A linear layer's weight that stays plain: the merge gives those in fp32."""
    if not tensor.linear or tensor.head:
        return tensor
    return LazyTensor(
        tensor.name, tensor.shape, dtype, lambda: tensor.read().to(dtype), tensor.identity, tensor.adapters,
        tensor.parameter, tensor.linear,
    )  # fmt: skip
