"""One of two gloo processes that train an adapter for a step under FSDP2 and write sharded checkpoints of it.

    python -m tests.layers.two_ranks RANK PORT OUT

Writes ``OUT/wrapped``: the model's own state, under the names that wrappers gave it; ``OUT/apart/model_0`` and
``OUT/apart/optimizer_0``: model and optimizer by PyTorch's functions for checkpoints; and ``OUT/whole.safetensors``:
the adapter's tensors, gathered, under the names of parameters.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from tests import models


def adapted() -> Any:
    """Biases, a replaced head, and ranks that two processes cannot halve."""
    options = {"r": 3, "lora_bias": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}
    return models.lora(models.plain("qwen2"), **options)


def train(model: nn.Module) -> torch.optim.Optimizer:
    """One step; every process sees the same rows, so that two of them do what one does."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model(**models.batch()).loss.backward()
    optimizer.step()
    return optimizer


def main(rank: int, port: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = adapted()
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = fully_shard(checkpoint_wrapper(layer))
    optimizer = train(fully_shard(model))
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=out / "wrapped")
    states = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    for name, state in states.items():
        checkpoint.save({name: state}, checkpoint_id=out / "apart" / f"{name}_0")
    trained = {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in trained.items()}, out / "whole.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
