"""A merged export against PEFT's ``merge_and_unload`` and ``save_pretrained``, on the same model in one run.

    python -m benchmarks.exporting                      a Llama of 0.5 billion random bf16 weights
    python -m benchmarks.exporting --model FOLDER

Prints seconds and CPU seconds of both, best of three, without the proof, which PEFT has no counterpart for. fastplug's
include the checksums and the flush to the disk.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def build(folder: str | None) -> Any:
    import peft
    import transformers

    if folder is None:
        shape = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 12, "vocab_size": 32000}
        config = transformers.LlamaConfig(**shape, num_attention_heads=24, num_key_value_heads=8)
        model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def measure(write: Callable[[Path], object]) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        write(Path(folder, "out"))
        return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    import fastplug

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the folder of another base")
    model = build(parser.parse_args().model)
    times: dict[str, list[tuple[float, float]]] = {"fastplug": [], "PEFT": []}
    for _ in range(3):
        times["fastplug"].append(measure(lambda out: fastplug.export(model, out, "merged_16bit", verify=False)))
        merged = copy.deepcopy(model)
        times["PEFT"].append(measure(lambda out, live=merged: live.merge_and_unload().save_pretrained(out)))
        del merged
    for name, found in times.items():
        wall, cpu = (min(values) for values in zip(*found))
        print(f"{name}: {wall:.2f} s, {cpu:.2f} CPU s")


if __name__ == "__main__":
    main()
