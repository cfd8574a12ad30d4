"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): a higher learning rate for B than for A.

PEFT's ``create_loraplus_optimizer`` makes the optimizer itself; these are the groups alone, for any optimizer and host:
a Trainer's ``create_optimizer``, Lightning's ``configure_optimizers``, fastplug's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastplug.errors import ModelError, OptionError

_B = ("lora_B", "lora_embedding_B")


def loraplus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    *,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` as parameter groups with the learning rates of LoRA+.

    Args:
        model: A model with LoRA adapters, PEFT's or ``LoRALinear``.
        lr: The learning rate of A and of everything else that trains.
        ratio: That of B is ``lr * ratio``; the paper proposes 16.
        weight_decay: For matrices; biases, norms and magnitudes get none.
        embedding_lr: For LoRA's matrices of embeddings.

    Returns:
        Groups of ``{"params", "lr", "weight_decay", "name"}``, none of them empty, every trained parameter in one.

    Raises:
        ModelError: No B of a LoRA adapter trains.
        OptionError: A learning rate or ratio that is not positive.
    """
    if lr <= 0 or ratio <= 0 or embedding_lr <= 0:
        raise OptionError(f"fastplug.layers: lr {lr}, ratio {ratio} and embedding_lr {embedding_lr} must be positive")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        is_b, embedding = any(part in _B for part in parts), any("lora_embedding" in part for part in parts)
        kind = "embedding" if embedding else "B" if is_b else "A and others"
        decays = parameter.dim() > 1
        rate = embedding_lr if embedding else lr * ratio if is_b else lr
        group = groups.setdefault(
            kind if decays else f"{kind}, no decay",
            {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    if not any(name.startswith("B") for name in groups):
        raise ModelError(f"fastplug.layers: {type(model).__name__} trains no B of a LoRA adapter; add one first")
    return [{**group, "name": name} for name, group in groups.items()]
