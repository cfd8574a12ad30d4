"""The arithmetic of a merge: ``base + scale * B @ A`` in fp32, rounded once.

LoRA (arXiv:2106.09685) adds ``scale * B @ A`` to a weight of shape ``[out, in]``, with ``A: [r, in]`` and
``B: [out, r]``; a layer that stores its weight as ``[in, out]`` (GPT-2's Conv1D, an embedding) gets the transpose.
DoRA (arXiv:2402.09353) then rescales every output row to a trained magnitude: ``m * W' / ||W'||``. PEFT merges in the
dtype of the base and once per adapter, so it rounds several times; a merge for export need not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastplug.exporters.api import ExportError
from fastplug.exporters.weights import codec_of, refuse_unreadable


class Update(Protocol):
    """What an adapter does to one stored tensor."""

    @property
    def identity(self) -> Hashable:
        """Equal for two updates that give the same result on the same base: tied weights stay tied."""

    def apply(self, base: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged tensor in ``dtype``. ``base`` is not written to."""

    def changes(self) -> bool:
        """Whether the merged tensor can differ from the base at all (an untrained B is zero)."""


@dataclass(frozen=True)
class Term:
    """One adapter's part in a weight: ``A: [r, in]``, ``B: [out, r]``, DoRA's magnitude ``[out]`` or None."""

    adapter: str
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    def delta(self, device: torch.device, transposed: bool) -> Tensor:
        """``scale * B @ A`` as a new fp32 tensor in the orientation of the stored weight."""
        delta = (self.B.detach().to(device).float() @ self.A.detach().to(device).float()).mul_(self.scale)
        return delta.T if transposed else delta

    @property
    def identity(self) -> Hashable:
        factors = frozenset((self.A.data_ptr(), self.B.data_ptr()))  # a tied head holds its embedding's, swapped
        return factors, self.scale, None if self.magnitude is None else self.magnitude.data_ptr()


@dataclass(frozen=True)
class LowRank:
    """LoRA and DoRA on a matrix. Adapters are added in the order in which they are active."""

    terms: tuple[Term, ...]
    transposed: bool = False

    @property
    def identity(self) -> Hashable:
        return tuple(term.identity for term in self.terms)

    def changes(self) -> bool:
        return any(term.magnitude is not None or bool(term.B.count_nonzero()) for term in self.terms)

    def apply(self, base: Tensor, dtype: torch.dtype) -> Tensor:
        first, *others = self.terms
        merged = self._one(first, base)
        for term in others:
            if term.magnitude is None:
                merged.add_(term.delta(base.device, self.transposed))
            else:  # every DoRA adapter is defined on the base alone
                merged.add_(self._one(term, base).sub_(base))
        return merged.to(dtype)

    def _one(self, term: Term, base: Tensor) -> Tensor:
        merged = term.delta(base.device, self.transposed).add_(base)
        if term.magnitude is not None:
            rows = 0 if self.transposed else 1
            norm = torch.linalg.vector_norm(merged, dim=rows, keepdim=True)
            merged.mul_(term.magnitude.detach().to(base.device).float().unsqueeze(rows) / norm)
        return merged


@dataclass(frozen=True)
class BiasSum:
    """``lora_bias=True``: ``bias + scale * B.bias`` for every adapter."""

    parts: tuple[tuple[Tensor, float], ...]

    @property
    def identity(self) -> Hashable:
        return tuple((bias.data_ptr(), scale) for bias, scale in self.parts)

    def changes(self) -> bool:
        return any(bool(bias.count_nonzero()) for bias, _ in self.parts)

    def apply(self, base: Tensor, dtype: torch.dtype) -> Tensor:
        merged = base.float().clone()
        for bias, scale in self.parts:
            merged.add_(bias.detach().to(base.device).float() * scale)
        return merged.to(dtype)


@dataclass(frozen=True)
class Experts:
    """LoRA on a stack of expert matrices (PEFT's ``target_parameters``), expert by expert.

    PEFT keeps the experts inside of A ``[experts * r, in]`` (expert slowest) and B ``[out, r * experts]`` (expert
    fastest). ``out_first`` says whether the stack is ``[experts, out, in]`` or ``[experts, in, out]``.
    """

    terms: tuple[Term, ...]
    out_first: bool

    @property
    def identity(self) -> Hashable:
        return tuple(term.identity for term in self.terms)

    def changes(self) -> bool:
        return any(bool(term.B.count_nonzero()) for term in self.terms)

    def apply(self, base: Tensor, dtype: torch.dtype) -> Tensor:
        experts = base.shape[0]
        merged = torch.empty(base.shape, dtype=dtype, device=base.device)
        for expert in range(experts):
            total = base[expert].float().clone()
            for term in self.terms:
                down = term.A.unflatten(0, (experts, -1))[expert]
                up = term.B.unflatten(1, (-1, experts))[:, :, expert]
                total.add_(Term(term.adapter, down, up, term.scale).delta(base.device, not self.out_first))
            merged[expert] = total.to(dtype)
        return merged


@dataclass(frozen=True)
class TokenRows:
    """``trainable_token_indices``: some rows of an embedding are replaced by trained ones."""

    rows: tuple[tuple[tuple[int, ...], Tensor], ...]

    @property
    def identity(self) -> Hashable:
        return tuple((index, values.data_ptr()) for index, values in self.rows)

    def changes(self) -> bool:
        return True

    def apply(self, base: Tensor, dtype: torch.dtype) -> Tensor:
        merged = base.to(dtype, copy=True)
        for index, values in self.rows:
            # PEFT's forward casts the rows to the dtype of the base.
            rows = values.detach().to(base.device, base.dtype).to(dtype)
            merged[torch.tensor(index, device=base.device)] = rows
        return merged


def lora_terms(layer: Any, adapters: Sequence[str], name: str) -> tuple[Term, ...]:
    """The parts of ``adapters`` in PEFT's LoRA layer ``layer``; adapters that it does not hold are skipped.

    Raises:
        ExportError: A LoRA variant without a formula here, or a sharded A or B.
    """
    terms = []
    for adapter in adapters:
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in layer.lora_embedding_A:
            down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        refuse_unreadable(down, f"{name}.lora_A.{adapter}")
        refuse_unreadable(up, f"{name}.lora_B.{adapter}")
        magnitude = layer.lora_magnitude_vector[adapter].weight if _is_dora(layer, adapter, name) else None
        terms.append(Term(adapter, down, up, float(layer.scaling[adapter]), magnitude))
    return tuple(terms)


def _is_dora(layer: Any, adapter: str, name: str) -> bool:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is None:
        return bool(getattr(layer, "use_dora", {}).get(adapter, False))
    kind = variant.__name__ if isinstance(variant, type) else type(variant).__name__
    if kind in ("DoraLinearVariant", "DoraEmbeddingVariant"):
        return True
    raise ExportError(
        f"fastplug: {name} uses PEFT's {kind} for adapter {adapter!r}, which cannot be merged here; "
        "if PEFT can (model.merge_and_unload()), export the model that it returns"
    )


def lora_updates(layer: Any, adapters: Sequence[str], name: str) -> dict[str, Update]:
    """What ``adapters`` do to the ``weight`` and ``bias`` of the base of a LoRA layer, by parameter name."""
    terms = lora_terms(layer, adapters, name)
    if not terms:
        return {}
    base = layer.get_base_layer()
    embedding = isinstance(base, nn.Embedding)
    held = base._parameters.get("weight") is not None or codec_of(base) is not None
    if not held or type(layer).__name__ == "MultiheadAttention" or terms[0].A.dim() != 2:
        raise ExportError(
            f"fastplug: LoRA on {name} ({type(base).__name__}) cannot be merged here: only on linear layers, "
            "embeddings and expert stacks. If PEFT can (model.merge_and_unload()), export the model that it returns"
        )
    updates: dict[str, Update] = {"weight": LowRank(terms, embedding or bool(getattr(layer, "fan_in_fan_out", False)))}
    biases = tuple(
        (layer.lora_B[term.adapter].bias, term.scale)
        for term in terms
        if not embedding and getattr(layer.lora_B[term.adapter], "bias", None) is not None
    )
    if biases:
        if getattr(base, "bias", None) is None:
            raise ExportError(f"fastplug: {name} has lora_bias=True but its base has no bias to merge it into")
        updates["bias"] = BiasSum(biases)
    return updates


def expert_updates(layer: Any, adapters: Sequence[str], name: str) -> dict[str, Update]:
    """What ``adapters`` do to the parameter that a PEFT ``ParamWrapper`` adapts, by parameter name."""
    terms = lora_terms(layer, adapters, name)
    if not terms:
        return {}
    if layer.num_experts == 1:
        return {layer.parameter_name: LowRank(terms)}
    return {layer.parameter_name: Experts(terms, bool(getattr(layer, "_did_swap_in_out_features", False)))}


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Plain fp32 matrix products, without gradients: no TF32, no bf16 shortcut on CPUs, no autocast."""
    present = [kind for kind in ("cuda", "xpu") if hasattr(torch, kind) and getattr(torch, kind).is_available()]
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    settings: list[Any] = [getattr(backend, "matmul", None) for backend in backends]
    settings = [setting for setting in settings if hasattr(setting, "fp32_precision")]  # torch >= 2.9
    before = [setting.fp32_precision for setting in settings]
    legacy = None if settings else torch.get_float32_matmul_precision()
    autocast = [torch.autocast(kind, enabled=False) for kind in ("cpu", *present)]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        for context in autocast:
            context.__enter__()
        with torch.no_grad():
            yield
    finally:
        for context in reversed(autocast):
            context.__exit__(None, None, None)
        for setting, value in zip(settings, before):
            setting.fp32_precision = value
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
