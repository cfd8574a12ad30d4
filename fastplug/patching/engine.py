"""apply, undo and report: the engine behind the public names."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError, StrictError
from fastplug.manager import Manager, manager
from fastplug.ops.table import table_for
from fastplug.options import Options
from fastplug.patching import fp8, weights
from fastplug.patching.adapters import check_adapters
from fastplug.patching.bind import bind, parameter_names, unbind
from fastplug.patching.fitting import misfit
from fastplug.patching.inspection import replaced_forward
from fastplug.patching.report import LEFT, PATCHED, REFUSED, Decision, Report
from fastplug.patching.sites import KEY, Binding, Choice, Implementation, Runtime, Site
from fastplug.patching.structure import sites_by_structure
from fastplug.patching.walk import walk
from fastplug.quant.checking import check_weights
from fastplug.sharding import SHARDED

logger = logging.getLogger("fastplug")

# Reports of models in which nothing carries a binding; patched models carry theirs themselves.
_reports: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


@dataclass
class Applied:
    """The handle that :func:`apply` returns. ``undo`` gives the model back; ``report`` says what was done."""

    model: nn.Module
    options: Options

    @property
    def report(self) -> Report:
        return report(self.model)

    def undo(self) -> None:
        undo(self.model)


def apply(model: nn.Module, options: Options | Mapping[str, Any] | None = None, **overrides: Any) -> Applied:
    """Patch a model in place, per instance and reversibly.

    Args:
        model: Any ``torch.nn.Module`` that holds a transformers model: the model itself, a PEFT model, a wrapper.
        options: :class:`fastplug.Options` or a mapping with its keys.
        overrides: Options by keyword.

    Returns:
        A handle with ``report`` and ``undo()``. Applying to a patched model again changes nothing but modules that
        are new since, and those that somebody else (Liger) has taken over since: they are let go.

    Raises:
        ModelError: ``model`` is not a module, its weights are on the meta device, or a quantized one is damaged.
        OptionError: An option is unknown or impossible.
        StrictError: With ``strict=True``, when nothing was patched or a site was refused; the model is unchanged.
    """
    options = Options.of(options, **overrides)
    _require_module(model, "apply")
    before = _bindings(model)
    if before and before[0][1].runtime.options != options:
        logger.warning("fastplug: the model is patched with other options already; call fastplug.undo(model) first")
        return Applied(model, before[0][1].runtime.options)
    device = _device(model)
    check_adapters(model)
    plugins = manager(options.plugins)
    ops = table_for(device, options.kernels, options.plugins)
    runtime = Runtime(options, ops, plugins.collect("fastplug_codecs"))
    arithmetic = [fp8.prepare(model, device, runtime), weights.prepare(runtime)]
    for _, binding in before:  # FSDP moves a model to its device after it was patched
        if binding.runtime.ops is not ops:
            binding.runtime.ops, binding.runtime.graphs = ops, None
    notes = check_weights(model, runtime.codec)  # before anything of the model runs: a guess by structure is tried
    decided = decide(model, runtime, plugins)
    new = [(site, choice) for site, choice in decided if not _bound(site, choice)]
    result = before[0][1].report if before else _new_report(model, device, runtime)
    result.device, result.ops = str(device), dict(ops.names)
    result.decisions = [_decision(site, choice) for site, choice in decided]
    notes = notes if decided else [_no_site_note(model)]
    notes += [note for note in arithmetic if note is not None]
    result.notes = list(dict.fromkeys([*result.notes, *notes]))  # those of a plan, say, of an earlier apply stay
    if options.strict:
        _check_strict(result)
    for site, choice in decided:
        if choice.status == REFUSED:  # taken over by somebody else since an earlier apply
            unbind(site.module)
    bound: list[nn.Module] = []
    try:
        for site, choice in new:
            if choice.status == PATCHED:
                binding = Binding(
                    type(site.module),
                    site.name,
                    site.family,
                    runtime,
                    choice.implementation.name,
                    result,
                    parameter_names(type(site.module)),
                )
                unbind(site.module)  # of an implementation that did not have to stand in for anybody yet
                bind(site.module, binding, choice.implementation.forward, choice.implementation.takes_over(site.module))
                bound.append(site.module)
        if options.memory is not None:
            from fastplug.memory.runtime import attach

            attach(model, decided, result)
        _reports[model] = result
        applied = Applied(model, options)
        if bound:
            plugins.hook.fastplug_after_apply(applied=applied)
    except BaseException:  # never leave a half-patched model behind, nor a patched one without a handle
        for module in bound:
            unbind(module)
        if not before:
            _reports.pop(model, None)
        raise
    return applied


def undo(model: nn.Module) -> Report | None:
    """Give a patched model back bit for bit. Needs no handle, so it works on deep copies too.

    Returns the last report, or None if nothing was patched.
    """
    _require_module(model, "undo")
    bindings = _bindings(model)
    if not bindings:
        return None
    final = report(model)
    for planner in {b.memory.planner: 0 for _, b in bindings if b.memory is not None}:
        planner.close()
    for module, _ in bindings:
        unbind(module)
    for runtime in {id(binding.runtime): binding.runtime for _, binding in bindings}.values():
        for kept in (runtime.weights, None if runtime.fp8 is None else runtime.fp8.kept):
            if kept is not None:
                kept.forget(model.modules())  # a copy of the model may go on with its own
    for known in list(_reports):
        if _reports[known] is bindings[0][1].report:
            del _reports[known]
    manager(bindings[0][1].runtime.options.plugins).hook.fastplug_after_undo(model=model, report=final)
    return final


def spare(model: nn.Module) -> None:
    """Let go of what a patched model holds only for its next training step to be faster; that one makes it anew."""
    for runtime in {id(binding.runtime): binding.runtime for _, binding in _bindings(model)}.values():
        runtime.spare()


def report(model: nn.Module) -> Report:
    """The report of a patched model, with the calls so far that ran an original forward.

    Raises:
        ModelError: fastplug was never applied to the model, or was undone.
    """
    _require_module(model, "report")
    bindings = _bindings(model)
    found = bindings[0][1].report if bindings else _reports.get(model)
    if found is None:
        raise ModelError("fastplug.report: the model is not patched; call fastplug.apply(model) first")
    found = copy.deepcopy(found)
    found.fallbacks = {b.site_name: dict(b.fallbacks) for _, b in bindings if b.fallbacks}
    found.memory = [p.describe() for p in {b.memory.planner: 0 for _, b in bindings if b.memory is not None}]
    if bindings:
        found.ops = dict(bindings[0][1].runtime.ops.names)  # an op may have given way to its reference since
    return found


def decide(model: nn.Module, runtime: Runtime, plugins: Manager) -> list[tuple[Site, Choice]]:
    """What every site of the model gets, without changing anything."""
    implementations: Sequence[Implementation] = plugins.collect("fastplug_implementations")
    ranked = sorted(implementations, key=lambda implementation: -implementation.priority)
    known = list(walk(model, plugins.collect("fastplug_families")))
    answered = []
    for site in known:
        asked = [each for each in ranked if each.role == site.role and each.concerns(site.module)]
        candidates = [_answer(site, runtime, candidate) for candidate in asked]
        candidates.sort(key=lambda choice: (PATCHED, LEFT, REFUSED).index(choice.status))
        if candidates:
            answered.append((site, candidates))
    answered.extend(sites_by_structure(model, known, ranked, runtime))
    decided = []
    for site, candidates in answered:
        chosen = plugins.hook.fastplug_choose(site=site, candidates=candidates, options=runtime.options)
        if isinstance(chosen, str):
            chosen = Choice(candidates[0].implementation, LEFT, chosen)
        decided.append((site, chosen or candidates[0]))
    return decided


def _answer(site: Site, runtime: Runtime, candidate: Implementation) -> Choice:
    if site.role in runtime.options.disable:
        return Choice(candidate, LEFT, "disabled by the options")
    reason = replaced_forward(site.module, candidate.takes_over(site.module))
    bound: Binding | None = site.module.__dict__.get(KEY)
    if reason is None and bound is not None and bound.implementation == candidate.name:
        reason = _taken_part(site)
        if reason is None:  # its weights may be sharded by now, until they are gathered at the call
            return Choice(candidate, PATCHED)
    if reason is None:
        reason = misfit(site.module, site.family, site.role) or candidate.refuse(site, runtime)
        if reason is not None and reason.endswith(SHARDED) and getattr(site.module, "_is_fsdp_managed_module", False):
            reason = None  # FSDP gathers them before the forward, which looks again
    if reason is not None:
        return Choice(candidate, REFUSED, reason)
    reason = candidate.left_alone(site, runtime)
    return Choice(candidate, PATCHED) if reason is None else Choice(candidate, LEFT, reason)


def _bound(site: Site, choice: Choice) -> bool:
    """Whether the site is patched, and nobody has put a forward on it since that the choice stands in for."""
    taken_over = choice.status == PATCHED and choice.implementation.takes_over(site.module)
    return KEY in site.module.__dict__ and not taken_over


def _taken_part(site: Site) -> str | None:
    """Why a layer that is patched already cannot stay so: somebody replaced a part's forward, which it would skip."""
    if site.role == "decoder_layer":
        for name, part in site.module.named_children():
            reason = replaced_forward(part)
            if reason is not None:
                return f"{name}: {reason}"
    return None


def _decision(site: Site, choice: Choice) -> Decision:
    return Decision(
        site.role,
        site.name,
        type(site.module).__name__,
        site.family.name,
        choice.status,
        choice.implementation.name if choice.status == PATCHED else None,
        choice.reason,
    )


def _new_report(model: nn.Module, device: torch.device, runtime: Runtime) -> Report:
    return Report(type(model).__name__, str(device), runtime.options.as_dict(), dict(runtime.ops.names))


def _no_site_note(model: nn.Module) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return (
        f"no family row matches {type(inner).__module__}.{type(inner).__name__}: nothing to patch "
        "(a plugin can add a row: see docs/extending.md)"
    )


def _check_strict(result: Report) -> None:
    if not result.patched:
        why = result.notes or sorted({f"{d.role}: {d.reason}" for d in result.decisions})
        raise StrictError(f"fastplug (strict): nothing was patched; {'; '.join(why)}")
    if result.refused:
        first = result.refused[0]
        raise StrictError(
            f"fastplug (strict): {len(result.refused)} of {len(result.decisions)} sites were refused, the first is "
            f"{first.name} ({first.module}): {first.reason}; disable={first.role!r} leaves that role alone"
        )


def _bindings(model: nn.Module) -> list[tuple[nn.Module, Binding]]:
    return [(module, module.__dict__[KEY]) for module in model.modules() if KEY in module.__dict__]


def _require_module(model: object, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"fastplug.{what} needs a torch.nn.Module, not {type(model).__name__}")


def _device(model: nn.Module) -> torch.device:
    """Where the model lives: the first parameter's device.

    Raises:
        ModelError: There is no parameter, or one is on the meta device.
    """
    first: torch.device | None = None
    for name, parameter in model.named_parameters():
        device = parameter.device
        if device.type == "meta":
            raise ModelError(
                f"fastplug.apply: parameter {name} is on the meta device, so the model has no weights yet; load them "
                "first (`fastplug doctor MODEL` shows what an unloaded model would get)"
            )
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.device_type != device.type:  # offloaded by FSDP, which computes elsewhere
            device = torch.device(mesh.device_type, getattr(torch, mesh.device_type).current_device())
        first = first or device
    if first is None:
        raise ModelError(f"fastplug.apply: {type(model).__name__} has no parameters, so there is nothing to patch")
    return first


__all__ = ["Applied", "apply", "decide", "report", "spare", "undo"]
