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
import gc
import importlib.metadata
import json
import logging
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastplug
from benchmarks.family_shapes import HEADLINE, SHAPES, build, linears, quantize

ROUNDS = 2  # unpatched, patched, unpatched, patched


@dataclass
class Side:
    """One way to run the model."""

    milliseconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    loss: float = 0.0
    gradients: torch.Tensor | None = None  # all of them in one vector, on the CPU

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


@dataclass
class Result:
    """One family's line. ``ratio`` is patched over unpatched tokens/s; ``error`` where there is none."""

    row: str
    size: str
    layers: int
    ratio: float | None = None
    tokens_per_s: float = 0.0
    unpatched_tokens_per_s: float = 0.0
    peak_gib: float = 0.0
    unpatched_peak_gib: float = 0.0
    loss: float = 0.0
    unpatched_loss: float = 0.0
    gradient_norm: float = 0.0
    unpatched_gradient_norm: float = 0.0
    gradient_cosine: float = 0.0
    without_gradient: int = 0
    patched: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    def trouble(self) -> str:
        """Why the ratio does not count, or an empty string."""
        if self.error:
            return self.error
        if self.without_gradient:
            return f"{self.without_gradient} LoRA tensors got no gradient that have one unpatched"
        if abs(self.loss - self.unpatched_loss) > 5e-3 * abs(self.unpatched_loss):
            return f"loss {self.loss:.5f} against {self.unpatched_loss:.5f}"
        if abs(self.gradient_norm - self.unpatched_gradient_norm) > 0.03 * self.unpatched_gradient_norm:
            return f"gradient norm {self.gradient_norm:.5g} against {self.unpatched_gradient_norm:.5g}"
        return ""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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


def run(model: Any, batches: list[torch.Tensor], side: Side, warmup: int, steps: int) -> None:
    """Compare-able loss and gradients at first, then timed steps."""
    device = batches[0].device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=device.type == "cuda")

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    if side.gradients is None:
        torch.manual_seed(0)  # some routers draw random numbers
        side.loss = float(step(batches[0]).detach())
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten().cpu() for p in parameters]
        side.gradients = torch.cat(flat)
        optimizer.zero_grad(set_to_none=True)
    for i in range(warmup + steps):
        if i == warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        start = time.perf_counter()
        step(batches[i % len(batches)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        if i >= warmup:
            side.milliseconds.append(1e3 * (time.perf_counter() - start))
    if device.type == "cuda":
        side.peak_gib = max(side.peak_gib, torch.cuda.max_memory_allocated() / 2**30)


def measure(name: str, layers: int, arguments: argparse.Namespace) -> Result:
    """One family, patched and unpatched in turns."""
    device = torch.device(arguments.device)
    result = Result(name, SHAPES[name].size, layers)
    started = time.perf_counter()
    model = prepare(name, layers, device, arguments.toy)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator(device).manual_seed(1)
    shape = (arguments.batch, arguments.sequence)
    batches = [torch.randint(16, vocabulary, shape, device=device, generator=generator) for _ in range(2)]
    plain, ours = Side(), Side()
    for i in range(ROUNDS):
        # The first round compiles kernels and warms the allocator; the second needs less.
        warmup, steps = (arguments.warmup, (arguments.steps + 1) // 2) if i == 0 else (1, arguments.steps // 2)
        run(model, batches, plain, warmup, steps)
        applied = fastplug.apply(model, dict(arguments.option))
        run(model, batches, ours, warmup, steps)
        report = applied.report
        applied.undo()
    for decision in report.patched:
        result.patched[decision.role] = result.patched.get(decision.role, 0) + 1
    result.refused = sorted({f"{d.role}: {d.reason}" for d in report.refused})
    for reasons in report.fallbacks.values():
        for reason, count in reasons.items():
            result.fallbacks[reason] = result.fallbacks.get(reason, 0) + count
    tokens = arguments.batch * arguments.sequence
    result.tokens_per_s, result.unpatched_tokens_per_s = (tokens / s.median * 1e3 for s in (ours, plain))
    result.ratio = result.tokens_per_s / result.unpatched_tokens_per_s
    result.peak_gib, result.unpatched_peak_gib = ours.peak_gib, plain.peak_gib
    result.loss, result.unpatched_loss = ours.loss, plain.loss
    assert ours.gradients is not None
    assert plain.gradients is not None
    result.gradient_norm, result.unpatched_gradient_norm = (float(s.norm()) for s in (ours.gradients, plain.gradients))
    result.gradient_cosine = float(torch.cosine_similarity(ours.gradients.double(), plain.gradients.double(), dim=0))
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    pairs = zip(ours.gradients.split(sizes), plain.gradients.split(sizes), strict=True)
    result.without_gradient = sum(bool(other.any()) and not mine.any() for mine, other in pairs)
    result.seconds = time.perf_counter() - started
    return result


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def option(text: str) -> tuple[str, Any]:
    """``graphs=off`` or ``disable=["mlp"]``: a key of :class:`fastplug.Options` and its value, JSON where it is."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def table(results: list[Result]) -> str:
    """One line a family."""
    head = f"{'family':12s}{'size':>14s}{'layers':>7s}{'tokens/s':>10s}{'unpatched':>10s}{'ratio':>7s}{'GiB':>7s}"
    lines = [head + f"{'unp.':>7s}{'loss off':>10s}{'norm off':>10s}{'cosine':>9s}  patched; trouble"]
    for r in results:
        start = f"{r.row:12s}{r.size:>14s}{r.layers:7d}"
        if r.ratio is None:
            lines.append(f"{start}  {r.error}")
            continue
        loss = abs(r.loss - r.unpatched_loss) / abs(r.unpatched_loss)
        norm = abs(r.gradient_norm - r.unpatched_gradient_norm) / max(r.unpatched_gradient_norm, 1e-30)
        done = " ".join(f"{count} {role}" for role, count in sorted(r.patched.items()))
        notes = "; ".join(filter(None, (done, r.trouble(), *r.refused, *r.fallbacks)))
        lines.append(
            f"{start}{r.tokens_per_s:10.0f}{r.unpatched_tokens_per_s:10.0f}{r.ratio:7.2f}{r.peak_gib:7.1f}"
            f"{r.unpatched_peak_gib:7.1f}{loss:10.1e}{norm:10.1e}{r.gradient_cosine:9.5f}  {notes}"
        )
    return "\n".join(lines)


def attempt(name: str, layers: int, arguments: argparse.Namespace) -> Result:
    """A result, or why there is none: a family that this transformers lacks, or too little memory, stops no other."""
    started = time.perf_counter()
    try:
        return measure(name, layers, arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        return Result(name, SHAPES[name].size, layers, seconds=time.perf_counter() - started, error=reason)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(SHAPES), help="families, the first first (default: all)")
    parser.add_argument("--layers", type=int, default=4, help="of the headline shapes (default: 4)")
    parser.add_argument("--other-layers", type=int, default=2, help="of the others (default: 2)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150.0, help="start no further family after this long")
    parser.add_argument("--option", type=option, action="append", default=[], metavar="KEY=VALUE", help="of fastplug")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="small widths in fp32, to try the program without a GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (2 if arguments.toy else 4)
    arguments.sequence = arguments.sequence or (32 if arguments.toy else 2048)
    names = arguments.rows.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        parser.error(f"no shape for {', '.join(unknown)}; known: {', '.join(SHAPES)}")
    results: list[Result] = []
    left: list[str] = []
    try:
        measure_all(names, arguments, results, left)
    finally:
        print("\n" + table(results))
        if left:
            print(f"no time left for: {', '.join(left)}")


def measure_all(names: list[str], arguments: argparse.Namespace, results: list[Result], left: list[str]) -> None:
    """Add a result for each family while there is time, the others to ``left``; keep the file up to date."""
    started = time.perf_counter()
    for name in names:
        expected = max((r.seconds for r in results[-3:]), default=0.0)
        if time.perf_counter() - started + expected > arguments.seconds:
            left.append(name)
            continue
        layers = arguments.layers if name in HEADLINE else arguments.other_layers
        results.append(attempt(name, layers, arguments))
        print(table(results[-1:]).splitlines()[-1], f"[{results[-1].seconds:.0f} s]", flush=True)
        if arguments.out is not None:
            device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
            setting = {key: value for key, value in vars(arguments).items() if key not in ("out", "rows")}
            record = {"device": device, "setting": setting, "versions": versions()}
            arguments.out.write_text(json.dumps({**record, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main()
