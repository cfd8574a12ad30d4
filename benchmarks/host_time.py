"""What Python takes of a training step: the host's work with launches that do nothing, on a CPU.

    python -m benchmarks.host_time --layers 32
    python -m benchmarks.host_time --checkpointed --options '{"memory": "keep"}'
    python -m benchmarks.host_time --options '{"compute": "fp8"}'
    python -m benchmarks.host_time --model granite

A tiny model under LoRA on NF4 weights runs through the launchers of a GPU, on tensors of a CPU that are hardly larger
than nothing. Triton's interpreter takes the launches and drops them, and products with base weights are left out. What
is left is what a GPU would wait for if it took no time: reading modules, autograd's nodes, allocating, launching. The
losses are garbage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

WARMUP = 6  # steps, of which the first read the layers


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", help="its model_type in transformers")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpointed", action="store_true", help="non-reentrant gradient checkpointing")
    parser.add_argument("--options", default="{}", help="of fastplug.apply, as JSON")
    return parser


@contextmanager
def launches_that_do_nothing() -> Iterator[Counter[str]]:
    """Count what would be launched."""
    import torch
    from triton.runtime import interpreter

    launched: Counter[str] = Counter()

    class Nothing:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **kwargs: launched.update([self.name])

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launched[self.fn.__name__] += 1

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        stack.enter_context(mock.patch.object(torch.Tensor, "addmm_", lambda self, *args, **kwargs: self))
        glu = importlib.import_module("fastplug.ops.adapted_glu.kernel")
        stack.enter_context(mock.patch.object(glu, "multiprocessors", return_value=132))
        for module in ("adapters", "group"):
            stack.enter_context(mock.patch(f"fastplug.ops.lora.{module}.joins", return_value=True))
        for direction in ("forward", "backward"):
            kernels = importlib.import_module(f"fastplug.ops.adapted_glu.hopper_{direction}")
            name = f"_{direction}_kernel"
            stack.enter_context(mock.patch.object(kernels, name, Nothing(f"adapted_glu{name}")))
        gradients = importlib.import_module("fastplug.ops.adapter_gradients.kernel")
        rope = importlib.import_module("fastplug.ops.adapted_rope.kernel")
        for module in (gradients, rope):
            stack.enter_context(mock.patch.multiple(module, _here=lambda device: True, FEWEST=1))
        share = importlib.import_module("fastplug.ops.fp8.share")
        stack.enter_context(mock.patch.multiple(share, multiprocessors=lambda device: 132, WAVES=0))
        hopper = importlib.import_module("fastplug.ops.fp8.hopper")
        stack.enter_context(mock.patch.object(hopper, "_product_kernel", Nothing("_product_kernel")))
        yield launched


def build(layers: int, checkpointed: bool, kind: str = "llama") -> Any:
    """A model of next to no size, its linears in NF4, with LoRA on all of them."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from benchmarks.shapes import LORA
    from benchmarks.weights import quantize

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    model = quantize(transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16))
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model.requires_grad_(False), LoraConfig(task_type="CAUSAL_LM", **LORA)).train()


def run(layers: int, steps: int, checkpointed: bool, options: dict[str, Any], kind: str = "llama") -> dict[str, Any]:
    """Milliseconds of forward, backward and the whole step (median, and the fastest), and launches of a step."""
    import torch

    import fastplug

    model = build(layers, checkpointed, kind)
    fastplug.apply(model, **{"kernels": "triton", "graphs": "off", **options})
    x = torch.randint(3, 500, (2, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    times: list[tuple[float, float, float]] = []
    with launches_that_do_nothing() as launched:
        for _ in range(WARMUP + steps):
            launched.clear()
            started = time.perf_counter()
            loss = model(input_ids=x, labels=x).loss
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            end = time.perf_counter()
            times.append((1e3 * (forward - started), 1e3 * (backward - forward), 1e3 * (end - started)))
    columns = list(zip(*times[WARMUP:]))
    names = ("forward", "backward", "step")
    found = {name: (round(statistics.median(each), 1), round(min(each), 1)) for name, each in zip(names, columns)}
    return {**found, "launches": dict(launched)}


def main() -> None:
    a = arguments().parse_args()
    os.environ["TRITON_INTERPRET"] = os.environ["OMP_NUM_THREADS"] = "1"  # before Triton and PyTorch are imported
    found = run(a.layers, a.steps, a.checkpointed, json.loads(a.options), a.model)
    for name in ("forward", "backward", "step"):
        median, least = found[name]
        print(f"{name:10s}{median:8.1f} ms, at least {least:.1f}")
    print(f"{sum(found['launches'].values())} launches: {found['launches']}")


if __name__ == "__main__":
    main()
