"""One of two gloo processes that train a planned model together, with less memory on one of them.

    python -m tests.memory.two_planners RANK PORT OUT

It writes ``RANK.json``: the plans at each forward, and a digest of the weights at the end.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastplug
from fastplug.memory import saved_plans
from fastplug.memory.runtime import planners
from fastplug.ops.glu import reference
from tests import models
from tests.memory.device import Device, MiB
from tests.memory.test_oom import Failing
from tests.memory.under import layers

FORWARDS = 9


class DeepSpeedEngine(nn.Module):
    """What is known of DeepSpeed's: its name, that it is the one to call, and that it sums the gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(2)))

    def forward(self, **kwargs: Any) -> Any:
        sys.modules["deepspeed"] = module_from_spec(ModuleSpec("deepspeed", None))
        try:
            return self.module(**kwargs)
        finally:
            del sys.modules["deepspeed"]


def main(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    saved: Any = None
    original = reference.forward
    for strategy in ("ddp", "fsdp2", "deepspeed"):
        model = models.lora(models.plain(num_hidden_layers=3))
        fastplug.apply(model, memory="auto")
        (planner,) = planners(model)
        planner.meter = device = Device(model, (5 - rank) * MiB)  # the second rank has less
        if strategy == "ddp":
            outer: Any = DistributedDataParallel(model)
        elif strategy == "deepspeed":
            outer = DeepSpeedEngine(model)
        else:
            for layer in layers(model):
                fully_shard(layer)
            outer = fully_shard(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        plans = []
        for i in range(FORWARDS):
            # At the fourth forward one rank runs out of memory, at the fifth and sixth the batches differ in length and
            # one rank plans for a new shape while the other does not, from the seventh on one has less free.
            length = 100 + 60 * (rank ^ (i == 5)) if i in (4, 5) else 100
            Failing.now = i
            reference.forward = Failing(2, micro=3).before(original) if rank == 1 else original
            device.others = MiB // 2 if rank == 0 and i >= 6 else 0
            outer(**models.batch(2, length, seed=2 * i + rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert planner.plan is not None
            plan = planner.plan
            plans.append([plan.sequence, [policy.value for policy in plan.policies], plan.budget])
        reference.forward = original
        weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters() if p.requires_grad]
        found[strategy] = {
            "plans": plans,
            "dropped": planner.room.dropped,
            "weights": float(sum(w.detach().double().abs().sum() for w in weights)),
            "fallbacks": fastplug.report(model).fallbacks,
        }
        if strategy == "ddp":
            saved = saved_plans.state(model)
    shared = [saved if rank == 0 else None]  # as from a file that both ranks see
    dist.broadcast_object_list(shared)
    for name, pinned in (("pinned by both", True), ("pinned by one", rank == 0)):
        model = models.lora(models.plain(num_hidden_layers=3))
        fastplug.apply(model, memory="auto")
        (planner,) = planners(model)
        planner.meter = Device(model, 5 * MiB)
        if pinned:
            assert saved_plans.restore(model, shared[0]) is None
        outer = DistributedDataParallel(model)
        for i in range(2):
            outer(**models.batch(2, 100, seed=i)).loss.backward()
        assert planner.plan is not None
        found[name] = [planner.pinned, [policy.value for policy in planner.plan.policies], planner.plan.budget]
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
