"""What ``fastplug plan`` foretells against what a GPU measures: peaks and times of short models under every policy.

    python -m benchmarks.planning --out benchmarks/results/planning.json
    python -m benchmarks.planning --only llama
    python -m benchmarks.planning --device cpu --toy
    python -m benchmarks.planning --recorded benchmarks/results/2026-11-21-h100-memory-budgets.json

Each setting is foretold from the model's config alone, as the command does it, then trained for a few steps whose
layers are told their policies. ``allocated`` is ``torch.cuda.max_memory_allocated``, ``reserved`` likewise, ``total``
reserved memory plus the CUDA context: what a budget is compared with. Nobody limits the allocator here. A plan of mixed
policies is one that the solver makes for a budget.

``--recorded`` trains nothing: it reads results of this benchmark, of ``benchmarks.memory`` (steps under budgets) or of
``benchmarks.step``, and prints what was measured then beside what is foretold by the present code.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.family_shapes import SHAPES, build, linears, quantize
from benchmarks.hardware import hardware, versions

RANK = 16


@dataclass(frozen=True)
class Setting:
    """One run. ``policy`` is one for all layers, or a budget in GiB to plan for; ``train`` is lora or full."""

    shape: str
    layers: int
    quant: str | None
    batch: int
    length: int
    policy: str
    tile_rows: int | None = None
    train: str = "lora"

    @property
    def model(self) -> tuple[Any, ...]:
        """What a model has to be built anew for."""
        return self.shape, self.layers, self.quant, self.train

    def __str__(self) -> str:
        tiles = f" in tiles of {self.tile_rows}" if self.tile_rows else ""
        what = f"{self.quant or 'bf16'} {self.train}"
        return f"{self.shape} {self.layers} layers, {what}, {self.batch}x{self.length}, {self.policy}{tiles}"


def _each(shape: str, layers: int, quant: str | None, batch: int, length: int, *policies: str) -> list[Setting]:
    return [Setting(shape, layers, quant, batch, length, policy) for policy in policies]


SETTINGS = [
    *_each("llama", 6, "nf4", 4, 2048, "keep", "drop_gate_up", "keep_attention", "residual", "offload_attention"),
    Setting("llama", 6, "nf4", 4, 2048, "offload"),
    Setting("llama", 6, "nf4", 4, 2048, "7.0"),
    Setting("llama", 6, "nf4", 4, 2048, "5.5"),
    Setting("llama", 6, "nf4", 1, 32768, "residual", 8192),
    *_each("llama", 6, "nf4", 2, 512, "keep", "residual"),
    *_each("llama", 4, None, 4, 2048, "keep", "drop_gate_up", "residual"),
    *_each("qwen3", 4, "nf4", 2, 4096, "keep", "residual"),
    *_each("gemma3", 4, "nf4", 2, 1024, "keep", "drop_gate_up"),
    Setting("gemma3", 4, "nf4", 1, 2048, "keep"),
    *_each("phi3", 3, "nf4", 2, 2048, "keep", "keep_attention"),
    Setting("smollm3", 4, None, 4, 2048, "keep", train="full"),
    Setting("smollm3", 4, None, 4, 2048, "residual", train="full"),
]
TOY = [
    *_each("llama", 2, None, 2, 64, "keep", "drop_gate_up", "keep_attention", "residual", "4.0"),
    Setting("qwen3", 2, "nf4", 2, 64, "keep"),
]


def load(setting: Setting, device: torch.device, toy: bool) -> Any:
    """A model with random weights, ready to train."""
    from peft import LoraConfig, get_peft_model

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = build(SHAPES[setting.shape], setting.layers, device, dtype, toy)
    if setting.train == "full":
        return model.requires_grad_(True)
    names = linears(model)
    if setting.quant is not None:
        quantize(model, names, dtype)
    targets = sorted({name.rpartition(".")[2] for name in names})
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=targets)).train()


def shape_from(config: Any, quant: str | None, dtype: str = "bfloat16", rank: int = RANK) -> Any:
    """The shapes of a model, from its config alone."""
    from fastplug.planning import shape_of

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return shape_of(folder, rank=rank, quant=quant, dtype=dtype, attention=config._attn_implementation)


def foretell(setting: Setting, config: Any, dtype: str) -> Any:
    """The plan, from the config alone."""
    from fastplug.memory.estimate import best_plan, uniform_plan
    from fastplug.memory.forecast import CONTEXT, RESERVED
    from fastplug.memory.gpus import GPUS, find
    from fastplug.memory.policy import Policy

    shape = shape_from(config, setting.quant, dtype, RANK if setting.train == "lora" else 0)
    gpu = GPUS[0]
    if torch.cuda.is_available():
        gpu = find(torch.cuda.get_device_name()) or gpu
    given: dict[str, Any] = {"gpu": gpu, "accumulating": False, "slack": RESERVED, "context": CONTEXT}
    try:
        budget = int(float(setting.policy) * 2**30)
    except ValueError:
        policy, tiles = Policy(setting.policy), setting.tile_rows
        return uniform_plan(shape, setting.batch, setting.length, 0, policy, tile_rows=tiles, **given)
    return best_plan(shape, setting.batch, setting.length, budget, **given)


def follow(model: Any, policies: Sequence[Any], tile_rows: int | None) -> None:
    """Make each decoder layer of a patched model keep what its policy says, without a planner."""
    from fastplug.memory.checkpoint import run
    from fastplug.patching.bind import patched_class
    from fastplug.patching.forwards import decoder_layer, layer_by_row
    from fastplug.patching.sites import KEY

    fast = {made.name: made.forward for made in (decoder_layer.IMPLEMENTATION, layer_by_row.IMPLEMENTATION)}
    bound = [module for module in model.modules() if KEY in module.__dict__]
    layers = [module for module in bound if module.__dict__[KEY].implementation in fast]
    for layer, policy in zip(layers, policies, strict=True):
        binding = layer.__dict__[KEY]

        def told(layer: Any, binding: Any, *args: Any, _policy: Any = policy, **kwargs: Any) -> Any:
            kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
            forward = fast[binding.implementation]
            return run(_policy, forward, layer, binding, tile_rows=tile_rows, **kwargs)

        layer.__class__ = patched_class(binding.base, told)


def measure(model: Any, setting: Setting, plan: Any, device: torch.device, warmup: int, steps: int) -> dict[str, Any]:
    """Peaks in bytes and the median milliseconds of steps under the plan."""
    import fastplug

    applied = fastplug.apply(model)
    follow(model, plan.policies, plan.tile_rows)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(8, vocabulary, (setting.batch, setting.length), device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        for _ in range(warmup):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - started) * 1e3)
        found: dict[str, Any] = {"ms": round(statistics.median(times), 2)}
        if cuda:
            free, everything = torch.cuda.mem_get_info()
            reserved, context = torch.cuda.max_memory_reserved(), everything - free - torch.cuda.memory_reserved()
            found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": reserved, "context": context}
            found["total"] = reserved + context
        fallbacks = applied.report.fallbacks
        if fallbacks:
            found["fallbacks"] = fallbacks
        return found
    finally:
        applied.undo()
        optimizer.state.clear()
        model.zero_grad(set_to_none=True)
        gc.collect()


def one(model: Any, setting: Setting, device: torch.device, a: argparse.Namespace) -> dict[str, Any]:
    """A setting's row of the result."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plan = foretell(setting, base.config, "float32" if device.type == "cpu" else "bfloat16")
    result: dict[str, Any] = {**asdict(setting), "plan": plan.as_dict(), "policies": _counts(plan)}
    result["predicted"] = {"allocated": plan.allocated, "total": plan.total, "ms": round(plan.ms, 2)}
    try:
        result["measured"] = measure(model, setting, plan, device, a.warmup, a.steps)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        result["error"] = str(error).splitlines()[0][:300]
        return result
    measured = result["measured"]
    for name in ("allocated", "total", "ms"):
        if measured.get(name):
            result[f"{name}_error"] = round(100 * (result["predicted"][name] / measured[name] - 1), 2)
    return result


def _counts(plan: Any) -> str:
    return ", ".join(f"{count} {policy.value}" for policy, count in plan.counts().items())


def show(result: dict[str, Any], setting: Setting) -> None:
    """One line."""
    if "error" in result:
        print(f"{setting!s:66} {result['error']}", flush=True)
        return
    line = f"{setting!s:66}"
    for name, unit in (("allocated", 2**30), ("total", 2**30), ("ms", 1)):
        measured, predicted = result["measured"].get(name), result["predicted"][name]
        if measured is not None:
            error = result.get(f"{name}_error", 0.0)
            line += f" {name} {predicted / unit:8.2f} {measured / unit:8.2f} {error:+6.1f}%"
    fallbacks = result["measured"].get("fallbacks")
    print(line + (f" fallbacks: {fallbacks}" if fallbacks else ""), flush=True)


@dataclass(frozen=True)
class Recorded:
    """A run of a result file: its step, the policies that its layers had, and its peaks in bytes.

    ``then`` is the allocated peak that was foretold when it was measured, where that was recorded.
    """

    what: str
    config: Any
    quant: str | None
    batch: int
    length: int
    policies: Sequence[str]
    tile_rows: int | None
    allocated: int
    total: int | None
    then: int | None = None


def recorded(path: Path) -> Iterator[Recorded]:
    """The runs of a result file of this benchmark, of ``benchmarks.memory`` or of ``benchmarks.step``; of the latter
    fastplug's own with LoRA, whose layers all keep all or, checkpointed, their input."""
    from benchmarks.rows import Row
    from benchmarks.shapes import config

    found = json.loads(path.read_text(encoding="utf-8"))
    for run in found["results"]:
        if "plan" in run and "measured" in run:
            shape = build(SHAPES[run["shape"]], run["layers"], torch.device("meta"), torch.bfloat16).config
            got = run["measured"]
            what = f"{run['shape']}, {run['layers']} layers, {run['quant'] or 'bf16'}, {run['batch']} x {run['length']}"
            plan, total = run["plan"], got["reserved"] + got["context"]
            step = run["quant"], run["batch"], run["length"], plan["policies"], plan["tile_rows"]
            yield Recorded(what, shape, *step, got["allocated"], total, run["predicted"]["allocated"])
            continue
        if run.get("system", "fastplug") != "fastplug" or "error" in run or "row" not in run:
            continue
        row = Row.parse(run["row"])
        if row.dora or row.prepared or row.autocast or row.random:
            continue
        model = config(found["shape"], found["layers"])
        policies = run.get("order") or ["residual" if row.checkpointed else "keep"] * model.num_hidden_layers
        peaks = run.get("whole_run", run)
        allocated = peaks["allocated_gib"] if "allocated_gib" in peaks else peaks["peak_gib"]
        total = peaks["reserved_gib"] + peaks["context_gib"] if "context_gib" in peaks else None
        what = f"{found['shape']}, {model.num_hidden_layers} layers, {row} {run.get('budget', '')}".strip()
        yield Recorded(
            what,
            model,
            "nf4" if row.quantization == "qlora" else None,
            row.batch,
            row.sequence,
            policies,
            run.get("tile_rows"),
            int(allocated * 2**30),
            None if total is None else int(total * 2**30),
        )


def today(run: Recorded) -> Any:
    """The plan of a recorded run, as it is foretold now."""
    from fastplug.memory.estimate import estimate
    from fastplug.memory.forecast import CONTEXT, RESERVED
    from fastplug.memory.moments import assemble
    from fastplug.memory.policy import Policy
    from fastplug.memory.reserve import Reserve

    shape = shape_from(run.config, run.quant)
    found = estimate(shape, run.batch, run.length, tile_rows=run.tile_rows)
    reserve = Reserve.of(RESERVED, shape.weight_bytes)
    more: dict[str, Any] = {"accumulating": False, "context": CONTEXT, "reserve": reserve}
    policies = [Policy(policy) for policy in run.policies]
    return assemble(found.layers, policies, found.fixed, 0, head_peak=found.head_peak, **more)


def compare(paths: Sequence[Path]) -> None:
    """A Markdown table of recorded runs: GiB measured then and foretold now."""
    print("| run | layers | allocated | foretold | error | then | reserved + context | foretold | error |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for run in (run for path in paths for run in recorded(path)):
        plan = today(run)
        cells = [run.what, _counts(plan) + (f", tiles of {run.tile_rows:,}" if run.tile_rows else "")]
        for measured, foretold in ((run.allocated, plan.allocated), (run.total, plan.total)):
            error = "" if measured is None else f"{100 * (foretold / measured - 1):+.1f}%"
            cells += ["" if measured is None else f"{measured / 2**30:.2f}", f"{foretold / 2**30:.2f}", error]
        cells.insert(5, "" if run.then is None else f"{run.then / 2**30:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the measured ones; the third is recorded")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--toy", action="store_true", help="tiny widths, to try the benchmark itself")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--recorded", type=Path, nargs="+", metavar="FILE", help="results to compare, see above")
    return parser


def main() -> None:
    a = arguments().parse_args()
    if a.recorded:
        compare(a.recorded)
        return
    cuda = a.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    settings = [setting for setting in (TOY if a.toy else SETTINGS) if a.only in str(setting)]
    results: list[dict[str, Any]] = []
    print("setting, then predicted, measured, error of allocated GiB, total GiB, ms of a step")
    for _, group in itertools.groupby(settings, key=lambda setting: setting.model):
        wanted = list(group)
        torch.manual_seed(0)
        model = load(wanted[0], device, a.toy)
        for setting in wanted:
            results.append(one(model, setting, device, a))
            show(results[-1], setting)
        del model
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        if a.out:
            a.out.write_text(json.dumps({"hardware": hardware(), "versions": versions(), "results": results}, indent=1))
    for name in ("allocated", "total"):
        errors = [abs(result[f"{name}_error"]) for result in results if f"{name}_error" in result]
        if errors:
            within = sum(error <= 5 for error in errors)
            print(f"{name}: {within} of {len(errors)} within 5% of what was measured, the worst {max(errors):.1f}%")


if __name__ == "__main__":
    main()
