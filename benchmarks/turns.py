"""Training steps of one model, unpatched and patched by fastplug in turns, and what they are compared by.

The same model takes all the steps: unpatched, patched (`fastplug.apply`), unpatched again (`undo`), patched again, so
that clocks and caches treat both alike. The learning rate is zero, so both see the same weights, and loss and gradients
of the first batch are compared before a ratio counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastplug
from benchmarks.measure import synchronize

ROUNDS = 2  # unpatched, patched, unpatched, patched


@dataclass
class Side:
    """One way to run the model."""

    milliseconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    loss: float = 0.0
    gradients: list[torch.Tensor] = field(default_factory=list)  # of the first batch, on the CPU

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


@dataclass
class Result:
    """One line. ``ratio`` is patched over unpatched tokens/s; ``error`` where there is none."""

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
            return f"{self.without_gradient} trained tensors got no gradient that have one unpatched"
        if abs(self.loss - self.unpatched_loss) > 5e-3 * abs(self.unpatched_loss):
            return f"loss {self.loss:.5f} against {self.unpatched_loss:.5f}"
        if abs(self.gradient_norm - self.unpatched_gradient_norm) > 0.03 * self.unpatched_gradient_norm:
            return f"gradient norm {self.gradient_norm:.5g} against {self.unpatched_gradient_norm:.5g}"
        return ""


def run(model: Any, batches: list[torch.Tensor], side: Side, warmup: int, steps: int) -> None:
    """Compare-able loss and gradients at first, then timed steps."""
    device = batches[0].device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=device.type == "cuda")

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    if not side.gradients:
        torch.manual_seed(0)  # some routers draw random numbers
        side.loss = float(step(batches[0]).detach())
        side.gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).cpu() for p in parameters]
        optimizer.zero_grad(set_to_none=True)
    for i in range(warmup + steps):
        if i == warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        step(batches[i % len(batches)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        if i >= warmup:
            side.milliseconds.append(1e3 * (time.perf_counter() - start))
    if device.type == "cuda":
        side.peak_gib = max(side.peak_gib, torch.cuda.max_memory_allocated() / 2**30)


def take_turns(model: Any, result: Result, arguments: argparse.Namespace) -> None:
    """Fill in ``result`` from steps of ``model``, which is ready to train: unpatched and patched in turns.

    Args:
        model: A causal language model of transformers or PEFT in training mode; what requires gradients is trained.
        result: The line that takes the figures.
        arguments: Those of :func:`add_arguments`.
    """
    device = torch.device(arguments.device)
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
    result.peak_gib, result.unpatched_peak_gib = ours.peak_gib, plain.peak_gib
    result.loss, result.unpatched_loss = ours.loss, plain.loss
    compare_gradients(ours, plain, device, result)
    result.ratio = result.tokens_per_s / result.unpatched_tokens_per_s  # last: a line with an error has none


def compare_gradients(ours: Side, plain: Side, device: torch.device, result: Result) -> None:
    """Norms and cosine over all gradients, and how many tensors have one on the unpatched side alone.

    A tensor at a time, on the device: all weights of a model in double precision would not fit into memory.
    """
    square = unpatched_square = product = 0.0
    for mine, other in zip(ours.gradients, plain.gradients, strict=True):
        a, b = (gradient.to(device).flatten().double() for gradient in (mine, other))
        square += float(a.dot(a))
        unpatched_square += float(b.dot(b))
        product += float(a.dot(b))
        result.without_gradient += bool(b.any()) and not a.any()
    result.gradient_norm, result.unpatched_gradient_norm = square**0.5, unpatched_square**0.5
    result.gradient_cosine = product / max(result.gradient_norm * result.unpatched_gradient_norm, 1e-30)


def attempt(prepare: Callable[[], Any], result: Result, arguments: argparse.Namespace) -> None:
    """Fill in ``result``, or why there is none: a missing library, or too little memory, stops no other line."""
    started = time.perf_counter()
    try:
        take_turns(prepare(), result, arguments)
    except Exception as error:
        result.error = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
    finally:
        result.seconds = time.perf_counter() - started
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_all(
    lines: Sequence[tuple[Result, Callable[[], Any]]],
    arguments: argparse.Namespace,
    record: Callable[[list[Result]], dict[str, Any]],
    title: str,
    width: int = 12,
) -> None:
    """Fill in the lines while there is time, keep the file up to date, and print the table.

    Args:
        lines: Each a result that has its name, and what makes its model.
        arguments: Those of :func:`add_arguments`.
        record: What the file holds of the results so far.
        title: Of the column of names.
        width: Of that column.
    """
    started = time.perf_counter()
    results: list[Result] = []
    left: list[str] = []
    try:
        for result, prepare in lines:
            expected = max((r.seconds for r in results[-3:]), default=0.0)
            if time.perf_counter() - started + expected > arguments.seconds:
                left.append(result.row)
                continue
            attempt(prepare, result, arguments)
            results.append(result)
            print(table([result], title, width).splitlines()[-1], f"[{result.seconds:.0f} s]", flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(record(results), indent=1))
    finally:
        print("\n" + table(results, title, width))
        if left:
            print(f"no time left for: {', '.join(left)}")


def table(results: list[Result], title: str, width: int = 12) -> str:
    """One line a result; ``title`` stands above the names, which have ``width`` columns."""
    head = f"{title:{width}s}{'size':>14s}{'layers':>7s}{'tokens/s':>10s}{'unpatched':>10s}{'ratio':>7s}{'GiB':>7s}"
    lines = [head + f"{'unp.':>7s}{'loss off':>10s}{'norm off':>10s}{'cosine':>9s}  patched; trouble"]
    for r in results:
        start = f"{r.row:{width}s}{r.size:>14s}{r.layers:7d}"
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


def option(text: str) -> tuple[str, Any]:
    """``graphs=off`` or ``disable=["mlp"]``: a key of :class:`fastplug.Options` and its value, JSON where it is."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that every program of this kind takes."""
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150.0, help="start no further line after this long")
    parser.add_argument("--option", type=option, action="append", default=[], metavar="KEY=VALUE", help="of fastplug")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="small widths in fp32, to try the program without a GPU")
    parser.add_argument("--out", type=Path)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with a batch of 4 x 2048 tokens (of 2 x 32 for a toy) where none is given."""
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (2 if arguments.toy else 4)
    arguments.sequence = arguments.sequence or (32 if arguments.toy else 2048)
    return arguments


def chosen(text: str, known: Sequence[str], what: str, parser: argparse.ArgumentParser) -> list[str]:
    """The names in ``a,b``; the program ends with an error where one is not known."""
    asked = text.split(",")
    unknown = [name for name in asked if name not in known]
    if unknown:
        parser.error(f"no {what} for {', '.join(unknown)}; known: {', '.join(known)}")
    return asked


def quiet() -> None:
    """Keep the warnings of libraries out of the table."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
