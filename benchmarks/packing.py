"""Tokens per second with padding and without, over documents as long as the demo's dialogs are.

    python -m benchmarks.packing --shape llama-3.1-8b --layers 4 --output packing.json

The documents are random tokens; their lengths are those of 2,026 dialogs (``dialog_lengths.json``), in random order.
Every way takes the same documents in the same order, ``--documents`` a step, LoRA of rank 16 on all linears in bf16,
fused AdamW, whole steps with the optimizer. Only real tokens count. ``packed`` puts the documents of the whole run into
rows first, so its steps hold other documents, as many on the average.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastplug
from benchmarks.shapes import LORA, SHAPES
from benchmarks.weights import build, device
from fastplug.data import PaddingFreeCollator, pack

Batch = dict[str, Any]
Ways = dict[str, tuple[bool, Callable[[list[list[int]], argparse.Namespace], list[Batch]]]]
LENGTHS = Path(__file__).with_name("dialog_lengths.json")


def documents(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, with lengths drawn in turn from the dialogs."""
    chosen = random.Random(seed)
    histogram: dict[str, int] = json.loads(LENGTHS.read_text())["tokens"]
    lengths = [int(length) for length, times in histogram.items() for _ in range(times)]
    chosen.shuffle(lengths)
    return [[chosen.randrange(3, vocabulary) for _ in range(lengths[index % len(lengths)])] for index in range(count)]


def steps(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def padded(rows: list[list[int]], a: argparse.Namespace) -> list[Batch]:
    made = []
    for group in steps(rows, a.documents):
        longest = max(map(len, group))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in group])
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def padding_free(rows: list[list[int]], a: argparse.Namespace) -> list[Batch]:
    return [PaddingFreeCollator()(group) for group in steps(rows, a.documents)]


def packed(rows: list[list[int]], a: argparse.Namespace) -> list[Batch]:
    packs = pack(rows, a.max_length)
    random.Random(0).shuffle(packs)
    return [PaddingFreeCollator()(group) for group in steps(packs, max(1, round(len(packs) * a.documents / len(rows))))]


WAYS: Ways = {
    "transformers, padded": (False, padded),
    "transformers, padding-free": (False, padding_free),
    "fastplug, padded": (True, padded),
    "fastplug, padding-free": (True, padding_free),
    "fastplug, packed": (True, packed),
}


def put(batch: Batch) -> Batch:
    return {key: value.to(device()) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def tokens_of(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def measure(model: Any, batches: list[Batch], warm_up: int) -> dict[str, float]:
    """Tokens per second over all batches but the first ``warm_up``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if len(batches) <= warm_up:  # a trial run
        batches = batches * (warm_up + 1)
    start, tokens, losses = 0.0, 0, []
    for index, batch in enumerate(batches):
        if index == warm_up:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        loss = model(**put(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        tokens += tokens_of(batch) if index >= warm_up else 0
    last = float(losses[-1])  # waits for the device
    seconds = time.perf_counter() - start
    given = sum(batch["input_ids"].numel() for batch in batches[warm_up:])
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "ms_per_step": round(1e3 * seconds / (len(batches) - warm_up), 2),
        "real_tokens_percent": round(100 * tokens / given, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
        "last_loss": round(last, 5),
    }


@torch.no_grad()
def losses_per_document(model: Any, batch: Batch) -> torch.Tensor:
    """The mean loss of each document [N] of a padded or a padding-free batch."""
    batch = put(batch)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view(labels.shape)
    if "cu_seq_lens_q" not in batch:
        return each.sum(1) / (labels != -100).sum(1)
    each = torch.nn.functional.pad(each[0], (1, 0))
    bounds = batch["cu_seq_lens_q"].tolist()
    return torch.stack([each[a:b].sum() / max(b - a - 1, 1) for a, b in itertools.pairwise(bounds)])


def run(a: argparse.Namespace) -> dict[str, Any]:
    import peft

    torch.manual_seed(0)
    model = build(a.shape, a.layers)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    model.config.use_cache = False  # as the Trainer has it; with a cache transformers lets documents see each other
    rows = documents(a.documents * (a.steps + a.warm_up), model.config.vocab_size)
    start = copy.deepcopy([p.detach() for p in model.parameters() if p.requires_grad])
    results: dict[str, Any] = {}
    for name, (patched, batches_of) in WAYS.items():
        if a.only and a.only not in name:
            continue
        with torch.no_grad():
            for parameter, value in zip((p for p in model.parameters() if p.requires_grad), start):
                parameter.copy_(value)
        if patched:
            fastplug.apply(model)
        else:
            fastplug.undo(model)
        results[name] = measure(model, batches_of(rows, a), a.warm_up)
        if patched:
            results[name]["fallbacks"] = fastplug.report(model).fallbacks
        gc.collect()
        if device().type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name:28} {json.dumps(results[name])}", flush=True)
    fastplug.apply(model)
    some = rows[: min(a.documents, 32)]
    fewer = argparse.Namespace(**{**vars(a), "documents": len(some)})
    apart, together = (losses_per_document(model, way(some, fewer)[0]) for way in (padded, padding_free))
    difference = float(((together - apart).abs() / apart.clamp_min(1e-6)).max())
    print(f"largest relative difference of a document's loss, padded against padding-free: {difference:.2e}")
    return {"shape": a.shape, "layers": a.layers, "results": results, "loss_difference": difference}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="so many layers instead of all")
    parser.add_argument("--documents", type=int, default=64, help="documents a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--only", help="only the ways whose name contains this")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    a = parse(arguments)
    found = run(a)
    if a.output:
        from benchmarks.hardware import hardware, versions

        a.output.write_text(json.dumps({"versions": versions(), "hardware": hardware(), **found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
