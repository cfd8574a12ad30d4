"""One of two gloo processes that train under every policy, with DDP and FSDP2.

    python -m tests.memory.two_ranks RANK PORT OUT

It writes ``RANK.json``: for each strategy and policy whether loss and gradients are those of KEEP bit for bit, and
which calls ran an original forward.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastplug
from fastplug.memory import offload
from fastplug.memory.policy import Policy
from tests import models
from tests.engine.step import fallbacks
from tests.memory.under import layers, under


def wrapped(model: Any, strategy: str) -> Any:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    for layer in layers(model):
        fully_shard(layer)
    return fully_shard(model)


def gradients(model: nn.Module, rank: int) -> list[torch.Tensor]:
    """Two micro-batches added up, the gradients of this rank."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        model(**models.batch(2, 24, seed=10 * seed + rank)).loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]


def main(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    offload.SMALLEST = 1
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    plain = models.lora(models.plain("llama"), lora_dropout=0.1)
    fastplug.apply(plain)
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        truth: list[torch.Tensor] = []
        for policy in Policy:
            inner = under(copy.deepcopy(plain), policy)
            mine = gradients(wrapped(inner, strategy), rank)
            truth = truth or mine
            same = len(mine) == len(truth) > 0 and all(torch.equal(a, b) for a, b in zip(mine, truth))
            found[f"{strategy} {policy.value}"] = [same, sorted(fallbacks(inner))]
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
