"""A transformers model without its weights: parameters on the meta device, buffers computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastplug.errors import MissingExtra, ModelError


class _NoWeights(TorchFunctionMode):
    """Inside, ``torch.empty`` allocates nothing: modules make their parameters with it, and compute their buffers.

    ``torch.device("meta")`` would leave no values in buffers that no checkpoint has, such as RoPE's frequencies.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """The model that ``config`` describes, without weights, in evaluation mode.

    Args:
        config: A transformers config; one of its ``architectures`` is made, else the causal language model.
        dtype: Of its floating-point parameters.
        options: For ``_from_config`` (``attn_implementation``).

    Raises:
        ModelError: transformers has no such model, or a buffer has no values.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "loading a model") from error
    options["dtype" if hasattr(config, "dtype") else "torch_dtype"] = dtype  # its name up to transformers 4.55
    names = getattr(config, "architectures", None) or ()
    kind = next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)
    with _NoWeights():
        if kind is not None:
            model = kind._from_config(config, **options)
        else:
            try:
                model = transformers.AutoModelForCausalLM.from_config(config, **options)
            except ValueError as error:
                named = ", ".join(names) or getattr(config, "model_type", "its config")
                raise ModelError(
                    f"fastplug.layers: this transformers has no class for {named}; load the model with "
                    "from_pretrained(..., trust_remote_code=True) and call quantize_() on it"
                ) from error
    for parameter in list(model.parameters()):
        if parameter.device.type != "meta":  # made by another function than torch.empty: a norm's ones
            replace(model, parameter, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
    return model.eval()


def replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put ``new`` wherever ``old`` is: tied parameters stay one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new


def own_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every parameter and persistent buffer by its name in the state dict, as (module, attribute); tied ones each."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        place = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[place + name] = (module, name)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[place + name] = (module, name)
    return found


def renamed(model: Any, names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Which of the ``names`` in a checkpoint is which of the model's, by transformers' own rules where they differ.

    Names that the model does not have map to themselves.
    """
    known = set(known)
    renamings = _renamings(model)
    prefix = getattr(model, "base_model_prefix", "") or ""
    found = {}
    for name in names:
        candidates: list[str] = [name, renamings(name)]
        if prefix:
            shorter = [one.removeprefix(f"{prefix}.") for one in candidates]
            candidates += [f"{prefix}.{one}" for one in candidates] + shorter
        found[name] = next((one for one in candidates if one in known), name)
    return found


def _renamings(model: Any) -> Any:
    try:  # transformers 5
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        import re

        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}

        def rename(name: str) -> str:
            for pattern, target in patterns.items():
                name, count = re.subn(pattern, target, name)
                if count:
                    break
            return name

        return rename
    transforms = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]

    def apply(name: str) -> str:
        for transform in transforms:
            name = transform.rename_source_key(name)[0]
        return name

    return apply
