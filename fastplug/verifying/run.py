"""The procedure of a verification."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.manager import manager
from fastplug.patching.engine import apply, undo
from fastplug.patching.sites import KEY, Binding, Runtime
from fastplug.patching.walk import walk
from fastplug.verifying import restore
from fastplug.verifying.compare import FP8, WIDE, Measure
from fastplug.verifying.judge import CannotJudgeError
from fastplug.verifying.result import Kind, Row, VerifyResult
from fastplug.verifying.setup import check, choose_layers, comparable_dropout, dtypes_of, filled_batch
from fastplug.verifying.stages import Call, Outcome, Stage, captured, head_stage, layer_stage

FP16_LOSS_SCALE = 1024.0  # what a gradient scaler does: fp16 gradients of a mean loss would vanish
END_TO_END = {True: 1e-4, False: 0.15}  # relative, times the tolerance: fp32, and 16 bit with its noise over all layers


def verify(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    tolerance: float = 2.0,
) -> VerifyResult:
    """Run a batch both ways, patched and original, and compare the loss, every layer's output and every gradient.

    Args:
        model: A causal language model, patched or not. An unpatched one is patched with the default options meanwhile.
        batch: What the model's forward takes, with ``labels``. None: random tokens [2, 64].
        layers: How many decoder layers to compare one by one, spread evenly, or which. None: all.
        tolerance: How many times the original's own error to fp32 fastplug's may be.

    Returns:
        The comparisons. The model, its gradients, its mode and the random number generators are as they were.

    Raises:
        ModelError: Not a causal language model, without weights, or sharded.
        OptionError: An impossible ``layers`` or ``tolerance``.
    """
    check(model, tolerance)
    if any(KEY in module.__dict__ for module in model.modules()):
        return _verify(model, batch, layers, tolerance)
    apply(model)
    try:
        return _verify(model, batch, layers, tolerance)
    finally:
        undo(model)


def _verify(
    model: nn.Module, batch: Mapping[str, Any] | None, layers: int | Sequence[int] | None, tolerance: float
) -> VerifyResult:
    bound = [module for module in model.modules() if KEY in module.__dict__]
    if not bound:
        return VerifyResult((), (), ("fastplug patched nothing in this model, so there is nothing to compare",))
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for context in (
            restore.random_state(device),
            restore.training_mode(model),
            restore.gradients(model),
            restore.fallback_counts(model),
            restore.exact_fp32(),
        ):
            stack.enter_context(context)
        randomised = stack.enter_context(restore.randomised_lora(model))
        return _Verification(model, bound, tolerance, batch).result(layers, len(randomised))


class _Verification:
    """One verification: what its steps share."""

    def __init__(
        self, model: nn.Module, bound: list[nn.Module], tolerance: float, batch: Mapping[str, Any] | None
    ) -> None:
        self.model, self.bound = model, bound
        self.bindings: list[Binding] = [module.__dict__[KEY] for module in bound]
        self.runtime: Runtime = self.bindings[0].runtime
        self.device = next(model.parameters()).device
        plugins = manager(self.runtime.options.plugins)
        sites = list(walk(model, plugins.collect("fastplug_families")))
        self.layers = {site.name: site.module for site in sites if site.role == "decoder_layer"}
        self.causal = next((site for site in sites if site.role == "lm_head_loss"), None)
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.batch = filled_batch(model, self.causal.module if self.causal else None, batch, self.notes)
        dtypes = dtypes_of(model, self.runtime)
        self.exact = all(dtype in WIDE for dtype in dtypes)
        self.measure = Measure(tolerance, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps), self._fp8(tolerance))
        self.loss_scale = FP16_LOSS_SCALE if torch.float16 in dtypes else 1.0

    def _fp8(self, tolerance: float) -> dict[Kind, float]:
        """The errors expected of what goes through FP8 products."""
        if self.runtime.fp8 is None:
            return {}
        compute = self.runtime.options.compute
        limits = ", ".join(f"{tolerance * error:.0%} ({kind})" for kind, error in FP8[compute].items())
        self.notes.append(f"compute={compute!r} passes with errors up to {limits}; the table has each layer's")
        return FP8[compute]

    def result(self, layers: int | Sequence[int] | None, randomised: int) -> VerifyResult:
        if randomised:
            self.notes.append(f"{randomised} LoRA tensors that are zero had random values meanwhile")
        before = sum((binding.fallbacks for binding in self.bindings), Counter())
        with comparable_dropout(self.model, self.device, self.exact, self.notes) as dropout:
            with restore.originals(self.bound), captured(self.layers) as calls:
                original_loss, original = self._whole()
            loss, ours = self._whole()
            dead = self._end_to_end_gradients(ours, original)
            del ours, original
            with restore.attributes(self.model, "gradient_checkpointing", False):
                truth = self._stages(calls, choose_layers(list(self.layers), layers), dropout)
        self.rows.insert(0, self._loss_row(loss, original_loss, truth))
        after = sum((binding.fallbacks for binding in self.bindings), Counter())
        self.notes += [f"original forward in {count} calls: {reason}" for reason, count in (after - before).items()]
        return VerifyResult(tuple(self.rows), dead, tuple(self.notes))

    # --- the whole model ------------------------------------------------------------------------------------------

    def _whole(self) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """The loss and every trainable parameter's gradient, as a trainer's step computes them."""
        torch.manual_seed(restore.SEED)
        with torch.enable_grad():
            loss = getattr(self.model(**self.batch), "loss", None)
            if not isinstance(loss, torch.Tensor):
                raise ModelError(
                    f"fastplug.verify: {type(self.model).__name__} returned no loss for a batch with labels"
                )
            if loss.requires_grad:
                (loss * self.loss_scale).backward()
        grads = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                grads[name], parameter.grad = parameter.grad, None
        return loss.detach(), grads

    def _end_to_end_gradients(
        self, ours: dict[str, torch.Tensor | None], original: dict[str, torch.Tensor | None]
    ) -> tuple[str, ...]:
        """One row for all gradients of the whole run: finds what no layer alone shows. Returns the dead tensors."""
        dead, difference, square = [], 0.0, 0.0
        for name, theirs in original.items():
            mine = ours[name]
            if not _alive(mine) or not _alive(theirs):
                dead.append(name)
            if _alive(mine) != _alive(theirs):
                side = "fastplug" if _alive(theirs) else "the original"
                self.rows.append(Row(name, "gradient", math.inf, None, 0.0, False, f"{side} gives it no gradient"))
            if mine is not None and theirs is not None:
                wide = torch.promote_types(theirs.dtype, torch.float32)
                difference += float((mine.to(wide) - theirs.to(wide)).norm()) ** 2
                square += float(theirs.to(wide).norm()) ** 2
        if square or difference:
            error = math.sqrt(difference / square) if square else math.inf
            limit = self.measure.tolerance * END_TO_END[self.exact]
            ok, reason = error <= limit, "" if math.isfinite(error) else "it is not finite"
            self.rows.append(Row("all parameters", "gradient", error, None, limit, ok, reason))
        return tuple(dead)

    def _loss_row(self, ours: torch.Tensor, original: torch.Tensor, truth: torch.Tensor | None) -> Row:
        if truth is not None:
            row = self.measure.judged("the whole model", "loss", ours, original, truth)
        else:
            row = self.measure.direct("the whole model", "loss", ours, original, limit=self._loose)
        assert row is not None
        return row

    @property
    def _loose(self) -> float | None:
        """The relative difference that passes where a 16-bit part has no judge."""
        return None if self.exact else 4 * self.measure.unit

    # --- layer by layer -------------------------------------------------------------------------------------------

    def _stages(self, calls: dict[str, Call], chosen: list[str], dropout: bool) -> torch.Tensor | None:
        """Compare the chosen layers and the head; returns the whole model's loss in fp32 if it could be had."""
        reached = [name for name in self.layers if name in calls]
        stream: torch.Tensor | None = None  # the residual stream in fp32, if everything so far had a judge
        if not self.exact and not dropout and reached and chosen == reached:
            stream = calls[reached[0]].x.float()
        for name in chosen:
            if name not in calls:
                self.notes.append(f"{name} was not called in this batch")
                continue
            call = calls[name]
            stage = layer_stage(name, self.layers[name], call)
            stream = self._compare(stage, call.x, _upstream(call, name, self.notes), stream)
        if not reached:
            return None
        stage_or_reason = self._head(reached[-1], calls[reached[-1]])
        if isinstance(stage_or_reason, str):
            self.notes.append(f"the head was compared in the whole run only: {stage_or_reason}")
            return None
        scale = torch.tensor(self.loss_scale, device=self.device)
        return self._compare(stage_or_reason, calls[reached[-1]].output, scale, stream)

    def _head(self, last: str, call: Call) -> Stage | str:
        if self.causal is None:
            return "no family row describes it"
        causal, name = self.causal.module, self.causal.name
        base_name = getattr(causal, "base_model_prefix", "")
        layers_name = last.removeprefix(f"{name}.{base_name}.".lstrip(".")).rpartition(".")[0]
        container = getattr(getattr(causal, base_name, None), layers_name, None) if layers_name else None
        if not isinstance(container, nn.ModuleList):
            return f"its decoder layers are not a list under {base_name!r}"
        batch = {key: value for key, value in self.batch.items() if key not in ("input_ids", "inputs_embeds")}
        return head_stage(name, causal, base_name, layers_name, batch, call.autocast)

    def _compare(
        self, stage: Stage, x: torch.Tensor, upstream: torch.Tensor, stream: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Add the rows of one stage. Returns what its judge makes of the fp32 ``stream``, if both exist."""
        ours = stage.run(x, upstream)
        with restore.originals(self.bound):
            original = stage.run(x, upstream)
            if self.exact:
                rows = self._rows(stage, ours, original, None, x, upstream)
                if all(row.ok for row in rows) or stage.autocast[0] == "mps":
                    self.rows += rows
                    return None
            try:  # also in an exact model, where cancellation can make two right results differ
                parts = stage.wide_parts(torch.float64 if self.exact else torch.float32, self.runtime)
                truth = stage.run_wide(x, upstream, parts)
                stream = None if stream is None else stage.forward_wide(stream, parts)
            except (CannotJudgeError, NotImplementedError, RuntimeError) as error:
                truth, stream = None, None
                self.notes.append(f"{stage.name} was compared without a judge: {str(error).splitlines()[0]}")
        self.rows += self._rows(stage, ours, original, truth, x, upstream)
        return stream

    def _rows(
        self,
        stage: Stage,
        ours: Outcome,
        original: Outcome,
        truth: Outcome | None,
        x: torch.Tensor,
        upstream: torch.Tensor,
    ) -> list[Row]:
        def row(name: str, kind: Any, mine: Any, theirs: Any, true: Any, base: Any = None) -> Row | None:
            if truth is None:
                return self.measure.direct(name, kind, mine, theirs, base, self._loose)
            return self.measure.judged(name, kind, mine, theirs, true, base)

        is_loss = ours.output.dim() == 0
        found = [
            row(
                stage.name,
                "loss" if is_loss else "output",
                ours.output,
                original.output,
                truth and truth.output,
                None if is_loss else x,
            ),
            row(
                f"{stage.name} (input)",
                "gradient",
                ours.input_gradient,
                original.input_gradient,
                truth and truth.input_gradient,
                None if is_loss else upstream,
            ),
        ]
        for name, mine in ours.gradients.items():
            true = None if truth is None else truth.gradients.get(name)
            found.append(row(name, "gradient", mine, original.gradients[name], true))
        return [item for item in found if item is not None]


def _upstream(call: Call, name: str, notes: list[str]) -> torch.Tensor:
    """The gradient that arrived at a layer's output, scaled by a power of two to the size of 1."""
    if call.upstream is None:
        notes.append(f"no gradient arrives at the output of {name} in this model; a random one was used")
        return torch.randn(call.output.shape, dtype=call.output.dtype, device=call.output.device)
    largest = float(call.upstream.abs().max())
    if not 0.0 < largest < math.inf:
        return call.upstream
    return call.upstream * 2.0 ** -math.floor(math.log2(largest))


def _alive(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
