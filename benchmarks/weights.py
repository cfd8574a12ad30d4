"""Random weights, the same ones in every process: made on the device, or written where a system wants a folder.

    python -m benchmarks.weights llama-3.1-8b /dev/shm/llama

A tensor's values depend on its name and shape alone, so a model built here and one loaded from the folder are equal.
Building takes seconds where loading takes half a minute: nothing passes through the host.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES, config

STD = 0.02
SHARDS = 8


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def generator(name: str) -> torch.Generator:
    """A random number generator of the device, seeded by a tensor's name."""
    return torch.Generator(device()).manual_seed(zlib.crc32(name.encode()))


def build(shape: str, layers: int | None = None) -> Any:
    """A causal LM of a shape in bf16 on the device: matrices drawn by name, norms one."""
    import transformers

    made = config(shape, layers)
    with _default_dtype(torch.bfloat16), device():
        model = getattr(transformers, f"{SHAPES[shape][0]}ForCausalLM")(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, STD, generator=generator(name))
            else:
                parameter.fill_(1.0)
    return model.requires_grad_(True)


def quantize(model: Any) -> Any:
    """Put bitsandbytes' NF4 linears with double quantization in place of the layers', as ``from_pretrained`` does."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is model.get_output_embeddings():
            continue
        with torch.device("meta"):
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.bfloat16,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
        where = module.weight.device
        packed = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
        )
        linear.weight = packed.to(where)
        linear.source_cls = torch.nn.Linear  # type: ignore[assignment]
        if module.bias is not None:
            linear.bias = torch.nn.Parameter(module.bias.data, requires_grad=False)
        model.set_submodule(name, linear)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model.requires_grad_(False)


def fingerprint(model: Any) -> float:
    """A number that other embeddings would change: two systems with different weights are not compared."""
    embedding = model.get_input_embeddings().weight.detach()
    rows = torch.arange(0, embedding.shape[0], 97, device=embedding.device)
    signs = torch.where(rows % 2 == 0, 1.0, -1.0).to(torch.float64)
    return round(float((embedding[rows].double().sum(1) * signs).sum()), 4)


def room(shape: str, layers: int | None = None) -> str:
    """The folder to write a shape's weights under: memory where 16-bit weights fit into it, else the disk."""
    made = config(shape, layers)
    with torch.device("meta"):
        import transformers

        needed = 2 * sum(p.numel() for p in getattr(transformers, f"{SHAPES[shape][0]}ForCausalLM")(made).parameters())
    shared = "/dev/shm"
    if os.path.isdir(shared) and shutil.disk_usage(shared).free > 1.02 * needed:
        return shared
    return tempfile.gettempdir()


def write(shape: str, path: str, layers: int | None = None) -> None:
    """Save a model of a shape with a word-level tokenizer, for systems that load from a folder only."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model, folder = build(shape, layers), Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), model.config.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    tensors = {name: p.detach() for name, p in model.named_parameters()}  # tied ones once
    _write_shards(folder, tensors)
    model.generation_config.save_pretrained(path)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)  # last: its presence says that the folder is complete


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    sizes = [0] * SHARDS
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        shards[smallest][name] = tensor
        sizes[smallest] += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    with ThreadPoolExecutor(SHARDS) as pool:  # copies from the device release the interpreter
        list(pool.map(write_safetensors, [folder / name for name in names], shards))
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {name: file for file, shard in zip(names, shards) for name in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write bf16 tensors in the safetensors format, copied straight from the device into the mapped file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + offset)
    if offset:
        mapped = torch.UntypedStorage.from_file(str(path), True, start + offset)
        whole = torch.empty(0, dtype=torch.bfloat16).set_(mapped)  # type: ignore[call-overload]
        position = start // 2
        for tensor in tensors.values():
            whole[position : position + tensor.numel()].view(tensor.shape).copy_(tensor)
            position += tensor.numel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path")
    parser.add_argument("--layers", type=int)
    a = parser.parse_args()
    write(a.shape, a.path, a.layers)
