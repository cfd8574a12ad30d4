"""What ``apply`` would do, decided without changing anything; the weights need not be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.manager import manager
from fastplug.ops.table import OpTable, table_for
from fastplug.options import Options
from fastplug.patching.engine import decide
from fastplug.patching.report import PATCHED, Decision, Report
from fastplug.patching.sites import Runtime
from fastplug.quant import Codec, EncodedWeight


class UnloadedWeights:
    """A codec that also answers for weights on the meta device: they will have the shape their module says."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.name = codec.name

    def matches(self, linear: nn.Module) -> bool:
        return self.codec.matches(linear)

    def read(self, linear: nn.Module) -> EncodedWeight | str:
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_meta:
            return self.codec.read(linear)
        shape: Any = (linear.out_features, linear.in_features)
        return EncodedWeight(self, (weight,), shape)

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
        return self.codec.compute_dtype(linear, dtype)

    def dense(self, weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor | None:
        return None if weight.codec is self else self.codec.dense(weight, dtype)

    def decode(self, weight: EncodedWeight, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        raise RuntimeError("weights on the meta device have no values to decode")


def inspect(
    model: nn.Module,
    options: Options | Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> Report:
    """The report that ``apply`` would give on ``device``.

    Args:
        model: As for ``apply``; its parameters may be on the meta device.
        options: As for ``apply``. ``strict`` has no effect.
        device: Where the model would run. Default: where it is, or for a model without weights the first GPU, else
            the CPU.

    Raises:
        ModelError: ``model`` is not a module.
        OptionError: An option is unknown or impossible.
    """
    options = Options.of(options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"fastplug.inspect needs a torch.nn.Module, not {type(model).__name__}")
    where = torch.device(device) if device is not None else _where(model)
    plugins = manager(options.plugins)
    codecs: list[Codec] = [UnloadedWeights(codec) for codec in plugins.collect("fastplug_codecs")]
    runtime = Runtime(options, table_for(where, options.kernels, options.plugins), codecs)
    report = Report(type(model).__name__, str(where), options.as_dict(), dict(runtime.ops.names))
    for site, choice in decide(model, runtime, plugins):
        implementation = choice.implementation.name if choice.status == PATCHED else None
        report.decisions.append(
            Decision(
                site.role,
                site.name,
                type(site.module).__name__,
                site.family.name,
                choice.status,
                implementation,
                choice.reason,
            )
        )
    if not report.decisions:
        kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
        report.notes.append(f"no family row matches {kind.__module__}.{kind.__name__}: nothing would be patched")
    return report


def _where(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
