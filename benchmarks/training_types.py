"""What fastplug gains on every type of docs/training-types.md: training steps of one model, patched and unpatched.

    python -m benchmarks.training_types --layers 4 --seconds 300 --out types.json
    python -m benchmarks.training_types --types lora,dora --checkpointed
    python -m benchmarks.training_types --toy

Each model has the widths of Llama-3.1-8B and few layers, and is made on the device with random bf16 weights. NF4 of
adapters is bitsandbytes' with double quantization; under inserted blocks, which bitsandbytes' models do not train, and
for HQQ the layers are fastplug's, unpatched ones too. Adapters have r=16 on all linear layers of the decoder. Every
second block of LLaMA-Pro's models is copied: 4 layers become 6. AdamW at a learning rate of zero; unpatched steps keep
no cache of keys, as with the Trainer. See benchmarks/turns.py for what is compared.

Few layers under a whole vocabulary give the head and its loss a larger share of the step than they have in the whole
model: more `--layers` come closer to it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.family_shapes import SHAPES, build, linears, quantize
from benchmarks.hardware import called, hardware, versions
from benchmarks.measure import reset_adapters
from benchmarks.turns import Result, add_arguments, chosen, measure_all, parse, quiet
from benchmarks.weights import STD
from fastplug.layers import expand_blocks, quantize_

SHAPE = SHAPES["llama"]


@dataclass(frozen=True)
class Type:
    """A base, "" for one of 16 bits, and what trains: "all" weights, "lora", "dora" or inserted "blocks"."""

    base: str
    trains: str


TYPES = {
    "full": Type("", "all"),
    "lora": Type("", "lora"),
    "qlora": Type("nf4", "lora"),
    "dora": Type("", "dora"),
    "qdora_nf4": Type("nf4", "dora"),
    "qdora_hqq": Type("hqq", "dora"),
    "hqq_lora": Type("hqq", "lora"),
    "llama_pro": Type("", "blocks"),
    "q_llama_pro_nf4": Type("nf4", "blocks"),
    "q_llama_pro_hqq": Type("hqq", "blocks"),
}


def prepare(name: str, layers: int, device: torch.device, toy: bool, checkpointed: bool) -> Any:
    """A model ready to train in the way of a type."""
    kind, dtype = TYPES[name], torch.float32 if toy else torch.bfloat16
    model = build(SHAPE, layers, device, dtype, toy)
    model.config.use_cache = False
    targets = linears(model)
    if kind.base == "nf4" and kind.trains != "blocks":
        quantize(model, targets, dtype)
    elif kind.base:
        quantize_(model, kind.base, skip=["lm_head"])
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kind.trains == "all":
        model.requires_grad_(True)
    elif kind.trains == "blocks":
        expand_blocks(model, every=2)
        fill_zeros(model)
    else:
        model = adapted(model, targets, kind.trains == "dora", checkpointed)
    return model.train()


def adapted(model: Any, targets: list[str], dora: bool, checkpointed: bool) -> Any:
    """``model`` with adapters of rank 16 whose values are random, B's too."""
    from peft import LoraConfig, get_peft_model

    if checkpointed:
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, use_dora=dora))
    reset_adapters(model)
    return model


def fill_zeros(model: Any) -> None:
    """Give the inserted blocks' output projections, which start at zero, small random values.

    At zero all other weights of those blocks have no gradient, patched or not, and the comparison proves nothing.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                generator = torch.Generator(parameter.device).manual_seed(2)
                parameter.normal_(0.0, STD / 2, generator=generator)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(TYPES), help=f"of {', '.join(TYPES)} (default: all)")
    parser.add_argument("--layers", type=int, default=4, help="before blocks are inserted (default: 4)")
    parser.add_argument("--checkpointed", action="store_true", help="with gradient checkpointing")
    add_arguments(parser)
    return parser


def main() -> None:
    parser = arguments()
    a = parse(parser)
    lines = []
    for name in chosen(a.types, tuple(TYPES), "type", parser):
        device = torch.device(a.device)
        make = partial(prepare, name, a.layers, device, a.toy, a.checkpointed)
        lines.append((Result(name, SHAPE.size, a.layers), make))

    def record(results: list[Result]) -> dict[str, Any]:
        return {
            "command": called("training_types"),
            "setting": {key: value for key, value in vars(a).items() if key not in ("out", "types")},
            "hardware": hardware(),
            "versions": versions(),
            "results": [asdict(result) for result in results],
        }

    measure_all(lines, a, record, "type", width=16)


if __name__ == "__main__":
    quiet()
    main()
