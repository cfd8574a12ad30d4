"""What a proof asks of a runtime, and the live model as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from fastplug.exporters.api import ExportError
from fastplug.exporters.models import base_of, unwrap
from fastplug.exporters.proof.exact import exact_model
from fastplug.exporters.tensors import peft_kind


class Runtime(Protocol):
    """Something that computes logits: a live model, or a file loaded by the program that it is meant for."""

    @property
    def name(self) -> str:
        """For people, with the version: ``transformers 5.23.0``, ``libllama b7000``."""

    def logits(self, token_ids: Tensor) -> Tensor:
        """The logits at every position of one sequence.

        Args:
            token_ids: int64 ``[length]`` on the CPU; nothing is added to it, no beginning-of-sequence token either.

        Returns:
            fp32 ``[length, vocabulary]`` on the CPU.
        """


class LiveRuntime:
    """A live model, with its adapters, patched or not. Computes in fp32, in evaluation mode, and is left as it was.

    Args:
        model: A transformers model or a PeftModel, possibly in DDP or ``torch.compile``.
        adapters: Names of the adapters to run with; None: whichever are active.
        enabled: False runs the base without any adapter.
        name: For people; default: "live" and the class.
    """

    def __init__(
        self, model: Any, adapters: Sequence[str] | None = None, *, enabled: bool = True, name: str = ""
    ) -> None:
        self._model, self._base = unwrap(model), base_of(model)
        self._adapters = None if adapters is None else list(adapters)
        self._enabled = enabled
        self.name = name or f"live {type(self._base).__name__}"

    def logits(self, token_ids: Tensor) -> Tensor:
        device = next(self._base.parameters()).device
        with exact_model(self._model), _adapted(self._model, self._adapters, self._enabled):
            try:
                output = self._model(input_ids=token_ids.to(device).unsqueeze(0), use_cache=False)
            except Exception as error:
                reason = str(error).strip().splitlines() or [""]
                raise ExportError(
                    f"fastplug: the {self.name} cannot run here ({type(error).__name__}: {reason[0]}), so nothing can "
                    "be proven; verify=False (--no-verify) writes the file without"
                ) from error
        logits: Tensor = output.logits
        if logits.dim() != 3 or logits.shape[1] != len(token_ids):
            raise ExportError(f"fastplug: {type(self._base).__name__} gives no logits for every position to compare")
        return logits[0].float().cpu()


class Recorded:
    """A runtime that computes the logits of a sequence once: the reference of several files in one export."""

    def __init__(self, runtime: Runtime) -> None:
        self.name = runtime.name
        self._runtime = runtime
        self._known: dict[tuple[int, ...], Tensor] = {}

    def logits(self, token_ids: Tensor) -> Tensor:
        key = tuple(token_ids.tolist())
        if key not in self._known:
            self._known[key] = self._runtime.logits(token_ids)
        return self._known[key]


@contextmanager
def _adapted(model: Any, adapters: list[str] | None, enabled: bool) -> Iterator[None]:
    """Other adapters for a while, without PEFT's ``set_adapter``, which also changes what trains."""
    names = ("_active_adapter", "_disable_adapters")
    states = [
        (module, {name: module.__dict__[name] for name in names if name in module.__dict__})
        for module in model.modules()
        if peft_kind(module)
    ]
    try:
        for module, state in states:
            if adapters is not None and "_active_adapter" in state:
                held = getattr(module, "modules_to_save", None)
                chosen = adapters if held is None else [name for name in adapters if name in held]
                module.__dict__["_active_adapter"] = chosen
            if not enabled and "_disable_adapters" in state:
                module.__dict__["_disable_adapters"] = True
        yield
    finally:
        for module, state in states:
            module.__dict__.update(state)


__all__ = ["LiveRuntime", "Recorded", "Runtime"]
