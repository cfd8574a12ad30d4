"""Adapter-only checkpoints: leave a model's frozen base out of a checkpoint, and put it back when one is loaded.

A checkpoint is a mapping that has the model's state dict under ``state_dict``, as Lightning's have.

Left out are the parameters that are frozen, were never trained and belong to no PEFT adapter, and what goes with them
(bitsandbytes' quantization state). All else stays: adapters, active or not, ``modules_to_save``, a trained head, every
buffer, and the optimizer's, scheduler's and loops' state. Some values of each tensor left out stay too, so that an
adapter is not put on another base unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastplug.errors import FastPlugError

KEY = "fastplug_adapter_checkpoint"
SAMPLE = 8  # values kept of each tensor left out


def leave_base_out(checkpoint: dict[str, Any], module: nn.Module, optimizers: Sequence[Any] = ()) -> dict[str, Any]:
    """The checkpoint without the module's frozen base; the one given stays as it is.

    Args:
        checkpoint: Has the module's ``state_dict()`` under ``state_dict``, and whatever else.
        module: The module that the state dict is of.
        optimizers: A frozen parameter that has a state in one of them was trained before, and stays in.
    """
    frozen = _base_parameters(module, optimizers)
    extra = _extra_keys(module, checkpoint["state_dict"], frozen)
    state = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen and k not in extra}
    return {**checkpoint, "state_dict": state, KEY: _samples(frozen)}


def put_base_back(checkpoint: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """An adapter-only checkpoint completed by references to the module's own base; any other as it is.

    Raises:
        FastPlugError: The module has not the base that the checkpoint was saved with.
    """
    if KEY not in checkpoint:
        return checkpoint
    own = dict(module.named_parameters(remove_duplicate=False))
    found = _samples({name: own[name] for name in checkpoint[KEY] if name in own})
    for name, expected in checkpoint[KEY].items():
        # Weights may be loaded in one dtype and trained in another; those quantized only later are not compared.
        same = name in found and (
            found[name].shape != expected.shape or torch.allclose(found[name], expected, rtol=1e-2, atol=1e-5)
        )
        if not same:
            raise FastPlugError(
                f"fastplug: this adapter checkpoint was saved over another base model: {name} "
                f"{'has other values' if name in found else 'does not exist'} here; build the model as it was then"
            )
    state = {**checkpoint["state_dict"], **{name: own[name].detach() for name in checkpoint[KEY]}}
    return {**checkpoint, "state_dict": state}


def _base_parameters(module: nn.Module, optimizers: Sequence[Any]) -> dict[str, nn.Parameter]:
    adapters = tuple(
        f"{name}.{part}.".lstrip(".")
        for name, child in module.named_modules(remove_duplicate=False)
        for part in getattr(child, "adapter_layer_names", ())  # PEFT's name for what it adds to a layer
    )
    trained = [optimizer.state for optimizer in optimizers]
    return {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
        and not any(parameter in state for state in trained)
        and not name.startswith(adapters)
    }


def _extra_keys(module: nn.Module, keys: Any, frozen: dict[str, nn.Parameter]) -> set[str]:
    """Keys that are neither parameters nor buffers, of modules whose own parameters are all frozen."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = {*parameters, *(name for name, _ in module.named_buffers(remove_duplicate=False))}
    modules = {name for name, _ in module.named_modules(remove_duplicate=False)}
    idle = {_owner(name, modules) for name in frozen} - {_owner(name, modules) for name in {*parameters} - {*frozen}}
    return {k for k in keys if k not in known and not k.endswith("_extra_state") and _owner(k, modules) in idle}


def _owner(key: str, modules: set[str]) -> str:
    while key and key not in modules:
        key = key.rpartition(".")[0]
    return key


def _samples(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """A few values of each tensor in fp32 on the CPU; none of a quantized one."""
    made = {}
    for name, parameter in parameters.items():
        values = parameter.detach().reshape(-1)
        count = SAMPLE if values.is_floating_point() and not values.is_meta else 0
        some = values[:: max(1, values.numel() // SAMPLE)][:count]
        made[name] = some.float().cpu().clone()  # a view would be saved with all of its tensor
    return made
