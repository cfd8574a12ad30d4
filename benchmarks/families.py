"""What fastplug gains on every family: QLoRA training steps of one model of each, patched and unpatched in turns.

    python -m benchmarks.families --layers 4 --seconds 150 --out families.json
    python -m benchmarks.families --rows qwen3,gemma3 --layers 8
    python -m benchmarks.families --toy

Each model has the real widths of a popular size and few layers, is made on the device with random weights and quantized
there: NF4 with double quantization, LoRA r=16 on all linear layers of the decoder, a bf16 residual stream, gradient
checkpointing, AdamW. One model takes all the steps: unpatched, patched (`fastplug.apply`), unpatched again (`undo`),
patched again, so that clocks and caches treat both alike. The learning rate is zero, so both see the same weights, and
loss and gradients are compared before a ratio is printed. The four headline shapes come first, then the others with
fewer layers, as many as fit into the time.

Few layers under a whole vocabulary give the head and its loss a larger share of the step than they have in the whole
model: more `--layers` come closer to it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.family_shapes import HEADLINE, SHAPES, build, linears, quantize
from benchmarks.turns import Result, add_arguments, chosen, measure_all, parse, quiet


def prepare(name: str, layers: int, device: torch.device, toy: bool) -> Any:
    """A PEFT model ready to train, quantized where its shape says so."""
    from peft import LoraConfig, get_peft_model

    shape = SHAPES[name]
    dtype = torch.float32 if toy else torch.bfloat16
    model = build(shape, layers, device, dtype, toy)
    names = linears(model)
    if shape.quantized:
        quantize(model, names, dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    config = LoraConfig(r=16, lora_alpha=16, target_modules=names, fan_in_fan_out=not shape.quantized)
    peft = get_peft_model(model, config)
    generator = torch.Generator(device).manual_seed(2)
    with torch.no_grad():  # B starts at zero, which makes every gradient of A zero and proves nothing
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                random = torch.randn(parameter.shape, generator=generator, device=device)
                parameter.copy_(random * (0.01 if "lora_A" in key else 0.005))
    return peft.train()


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(SHAPES), help="families, the first first (default: all)")
    parser.add_argument("--layers", type=int, default=4, help="of the headline shapes (default: 4)")
    parser.add_argument("--other-layers", type=int, default=2, help="of the others (default: 2)")
    add_arguments(parser)
    arguments = parse(parser)
    lines = []
    for name in chosen(arguments.rows, tuple(SHAPES), "shape", parser):
        layers = arguments.layers if name in HEADLINE else arguments.other_layers
        make = partial(prepare, name, layers, torch.device(arguments.device), arguments.toy)
        lines.append((Result(name, SHAPES[name].size, layers), make))

    def record(results: list[Result]) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
        setting = {key: value for key, value in vars(arguments).items() if key not in ("out", "rows")}
        return {
            "device": device, "setting": setting, "versions": versions(), "results": [asdict(r) for r in results]
        }  # fmt: skip

    measure_all(lines, arguments, record, "family")


if __name__ == "__main__":
    quiet()
    main()
