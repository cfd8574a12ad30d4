"""A linear layer with a LoRA adapter, for models that do not use PEFT. It runs on the ops that PEFT's layers get."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.layers.linear import QuantLinear, product_dtype
from fastplug.layers.quantizing import plain
from fastplug.ops.lora.group import Group
from fastplug.ops.lora.linear import lora_linear
from fastplug.ops.lora.projection import Projection
from fastplug.ops.table import table_for
from fastplug.quant.plain import Plain


class LoRALinear(nn.Module):
    """y = x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ over a frozen layer (Hu et al. 2021, arXiv:2106.09685).

    Args:
        base: A ``QuantLinear`` or ``torch.nn.Linear``; it is frozen.
        rank: r. A is [r, in_features], B [out_features, r]; B begins as zero.
        alpha: s = alpha / r, by default 1; with ``rslora`` alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: The probability with which an element of the adapter's input is dropped in training.
        rslora: See ``alpha``.
        dtype: Of A and B.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if type(base) not in (nn.Linear, QuantLinear):
            raise ModelError(f"fastplug.layers: LoRALinear goes on a Linear or QuantLinear, not {type(base).__name__}")
        if rank < 1 or not 0 <= dropout < 1:
            raise OptionError(f"fastplug.layers: rank {rank} and dropout {dropout} must be at least 1, and in [0, 1)")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.dropout = rank, dropout
        self.scaling = (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def projection(self) -> Projection:
        """The layer as the fused ops see it."""
        if isinstance(self.base, QuantLinear):
            made = self.base.projection()
        else:
            read = functools.partial(Plain().read, self.base)
            shape = (self.out_features, self.in_features)
            made = Projection(read, shape, bias=self.base.bias, owner=self.base)  # type: ignore[arg-type]
        made.a, made.b, made.scaling = self.lora_A, self.lora_B, self.scaling
        made.dropout = self.dropout if self.training else 0.0
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out_features] for [..., in_features], in autocast's dtype where that is on, else in that of x."""
        return lora_linear(Group([self.projection()], product_dtype(x), table_for(x.device)), x)

    def merged(self) -> nn.Linear:
        """A plain layer of the weight W + s · B A, summed in fp32 and rounded once to the base's dtype."""
        base = self.base
        linear = plain(base, torch.float32) if isinstance(base, QuantLinear) else base
        dtype = base.dtype if isinstance(base, QuantLinear) else base.weight.dtype
        with torch.no_grad():
            update = (self.lora_B.float() @ self.lora_A.float()).mul_(self.scaling)
            weight = update.add_(linear.weight).to(dtype)
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight, made.bias = nn.Parameter(weight, requires_grad=False), base.bias
        return made

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
