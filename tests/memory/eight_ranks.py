"""The first of eight ranks that shard a model with FSDP2, whose exchanges are made up: nothing is computed right.

    python -m tests.memory.eight_ranks OUT

It writes what the planner counts as a JSON file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastplug
from fastplug.memory.meter import local_bytes
from fastplug.memory.runtime import planners
from tests import models
from tests.memory.device import Device, MiB


def main(out: str) -> None:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    early = models.plain(num_hidden_layers=8)
    whole = sum(p.numel() * p.element_size() for p in early.parameters())
    fastplug.apply(early, memory=f"{whole // 2}B")  # whole as it is, and sharded before the first step
    fastplug.undo(early)
    model = models.plain(num_hidden_layers=8)
    gradients = sum(p.numel() * p.element_size() for p in model.model.layers[3].parameters())
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = sum(local_bytes(p) for p in model.parameters())
    try:
        fastplug.apply(model, memory=f"{local // 2}B")
        refused = ""
    except fastplug.OptionError as error:
        refused = str(error)
    fastplug.apply(model, memory=f"{whole // 2 + 3 * MiB}B")
    (planner,) = planners(model)
    planner.meter = Device(model, 64 * MiB, context=0)
    model(**models.batch(2, 60))
    assert planner.agreed is not None
    found = {
        "whole": whole,
        "local": local,
        "refused": refused,
        "assumed": planner.agreed.assumed,
        "gradients": [layer.gradients / gradients for layer in planner._costs[2, 64]],
    }
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
