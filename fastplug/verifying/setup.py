"""What a verification decides before it runs: the batch, the layers, the dtypes, the dropout."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.patching.sites import Runtime
from fastplug.verifying import restore
from fastplug.verifying.stages import autocast_state


def check(model: object, tolerance: float) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"fastplug.verify needs a torch.nn.Module, not {type(model).__name__}")
    if not tolerance >= 1.0:
        raise OptionError(f"fastplug.verify: tolerance must be at least 1, not {tolerance!r}")
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
            raise ModelError(
                f"fastplug.verify: parameter {name} is sharded over processes; verify before the trainer shards the "
                "model, or on a copy loaded in one process"
            )


def random_batch(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ModelError(
            f"fastplug.verify: {type(model).__name__} has no config.vocab_size to make a batch from; pass batch="
        )
    length = min(64, getattr(config, "max_position_embeddings", 64))
    generator = torch.Generator().manual_seed(restore.SEED)
    tokens = torch.randint(0, vocabulary, (2, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def choose_layers(names: list[str], layers: int | Sequence[int] | None) -> list[str]:
    if layers is None or not names:
        return names
    if isinstance(layers, int):
        if layers < 1:
            raise OptionError(f"fastplug.verify: layers must be at least 1, not {layers}")
        count = min(layers, len(names))
        step = (len(names) - 1) / max(count - 1, 1)
        layers = [round(i * step) for i in range(count)]
    for index in layers:
        if not -len(names) <= index < len(names):
            raise OptionError(f"fastplug.verify: there is no layer {index}; the model has {len(names)}")
    return [names[index] for index in sorted({index % len(names) for index in layers})]


def dtypes_of(model: nn.Module, runtime: Runtime) -> set[torch.dtype]:
    """The dtypes that take part in the model's computation."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device = next(model.parameters()).device
    for module in model.modules():
        codec = runtime.codec(module)
        if codec is not None:
            dtype = codec.compute_dtype(module, torch.float32)
            found.add(torch.float16 if isinstance(dtype, str) else dtype)
        elif not _floating(module):
            found.add(torch.float16)  # a quantization without a codec multiplies in 16 bit
    _, dtype, enabled = autocast_state(device)
    if enabled or "_original_forward" in model.__dict__:  # accelerate has wrapped the forward in autocast
        found.add(dtype)
    if runtime.options.residual_dtype is not None:
        found.add(getattr(torch, runtime.options.residual_dtype))
    return {dtype for dtype in found if torch.finfo(dtype).bits >= 16} or {torch.float32}


def _floating(module: nn.Module) -> bool:
    return all(p.is_floating_point() for p in module.parameters(recurse=False))


@contextlib.contextmanager
def comparable_dropout(model: nn.Module, device: torch.device, exact: bool, notes: list[str]) -> Iterator[bool]:
    """Turn off the dropout whose masks would differ between the runs; yields whether any is still on."""
    kinds = (nn.Dropout,)
    adapters = any(isinstance(module, kinds) and module.p for module in model.modules())
    attention = any(module.__dict__.get("attention_dropout") for module in model.modules())
    with contextlib.ExitStack() as stack:
        if attention and not (exact and device.type == "cpu"):
            stack.enter_context(restore.attributes(model, "attention_dropout", 0.0))
            notes.append("attention dropout was off: the attention backends draw different masks")
            attention = False
        if adapters and not _same_masks(device):
            stack.enter_context(restore.attributes(model, "p", 0.0, kinds))
            notes.append("dropout was off: its masks depend on the dtype on this device")
            adapters = False
        yield adapters or attention


def _same_masks(device: torch.device) -> bool:
    """Whether dropout draws one mask for one seed, whatever the dtype and shape of its input."""
    masks = []
    for dtype, shape in ((torch.float32, (2, 32, 96)), (torch.bfloat16, (64, 96)), (torch.float16, (64, 96))):
        torch.manual_seed(restore.SEED)
        masks.append(nn.functional.dropout(torch.ones(shape, dtype=dtype, device=device), 0.5).flatten() != 0)
    return all(bool((mask == masks[0]).all()) for mask in masks)


def filled_batch(
    model: nn.Module, causal: nn.Module | None, batch: Mapping[str, Any] | None, notes: list[str]
) -> dict[str, Any]:
    """The batch on the model's device, with labels and without a cache; a random one where none is given."""
    device = next(model.parameters()).device
    given = random_batch(model) if batch is None else batch
    filled = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    if filled.get("labels") is None and filled.get("shift_labels") is None:
        if filled.get("input_ids") is None:
            raise ModelError("fastplug.verify: the batch has neither labels nor input_ids, so there is no loss")
        filled["labels"] = filled["input_ids"]
        notes.append("the batch has no labels; its input_ids were taken")
    if causal is not None and "use_cache" in inspect.signature(causal.forward).parameters:
        filled.setdefault("use_cache", False)
    return filled
