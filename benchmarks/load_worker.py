"""One load of a checkpoint into NF4, in a process of its own: what ``benchmarks.loading`` measures.

    python -m benchmarks.load_worker LOADER FOLDER DEVICE FAMILY

Says READY when everything is imported, waits for a line on its standard input, loads, says LOADED with what it measured
and then DIGESTS with those of some tensors.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import sys
import time
from typing import Any


def load(loader: str, folder: str, device: str) -> Any:
    import torch

    if loader == "fastplug":
        import fastplug

        return fastplug.layers.load(folder, quant="nf4", device=device, dtype=torch.bfloat16)
    import transformers

    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0 if device == "cuda" else device},
        quantization_config=quantization, local_files_only=True,
    )  # fmt: skip


def parts_of(module: Any) -> dict[str, Any]:
    """The tensors of a linear layer, embedding or norm, under the names that fastplug's layers give them."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return {name: getattr(module, name) for name in getattr(module, "parts", ("weight",))}
    return {
        "weight": weight.data, "absmax": state.absmax, "code": state.code, "nested_code": state.state2.code,
        "nested_absmax": state.state2.absmax, "nested_offset": state.offset,
    }  # fmt: skip


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of what three layers, the embeddings and the norms hold, by names and parts."""
    import torch

    last = model.config.num_hidden_layers - 1
    layers = tuple(f"layers.{i}." for i in {0, last // 2, last})
    found = {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), torch.Tensor):
            continue
        if ".layers." in name and not any(layer in name for layer in layers):
            continue
        for part, tensor in parts_of(module).items():
            held = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
            found[f"{name}.{part}"] = hashlib.sha256(held).hexdigest()
    return found


def size(model: Any) -> int:
    """Bytes of all that the model holds."""
    found = {}
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            tensors += parts_of(module).values()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def work(loader: str, folder: str, device: str, family: str) -> None:
    """Load once. ``family`` is that of the model in transformers, whose module is imported before the clock starts."""
    import torch

    needed = ["transformers", f"transformers.models.{family}.modeling_{family}"]
    needed += ["fastplug.layers.loading"] if loader == "fastplug" else [
        "accelerate", "bitsandbytes", "transformers.integrations.bitsandbytes"
    ]  # fmt: skip
    for name in needed:
        importlib.import_module(name)
    cuda = device == "cuda"
    if cuda:
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    print("READY {}", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    model = load(loader, folder, device)
    if cuda:
        torch.cuda.synchronize()
    result: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3), "size": size(model)}
    if cuda:
        result |= {"device": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        pinned = getattr(torch.cuda, "host_memory_stats", dict)()
        result["pinned"] = pinned.get("allocated_bytes.peak", 0)
    print("LOADED", json.dumps(result), flush=True)
    print("DIGESTS", json.dumps(digests(model)), flush=True)


if __name__ == "__main__":
    work(*sys.argv[1:])
