"""What a model's modules are called with: read off a forward of a few tokens, for checks of modules by structure."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from fastplug.patching.inspection import global_hooks

Call = tuple[tuple[Any, ...], dict[str, Any]]
TOKENS = (2, 9)


def tokens(model: Any) -> torch.Tensor:
    """Random token ids [2, 9] for a language model, on the device of its embeddings."""
    table = model.get_input_embeddings()
    return torch.randint(2, min(table.num_embeddings, 1000), TOKENS, device=table.weight.device)


class Samples:
    """The first call of each module of a language model, taken when one is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._calls: dict[int, Call] | None = None

    def of(self, module: nn.Module) -> Call | None:
        """Arguments of a call of ``module``, a copy at every call; None where a few tokens do not reach it.

        Raises:
            Exception: Whatever the model's own code has against the tokens.
        """
        if self._calls is None:
            self._calls = self._record()
        call = self._calls.get(id(module))
        return None if call is None else copy.deepcopy(call)

    def _record(self) -> dict[int, Call]:
        calls: dict[int, Call] = {}
        if global_hooks():
            return calls

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(id(module), (args, kwargs))

        parents = [module for module in self.model.modules() if any(True for _ in module.children())]
        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in parents]
        ids = tokens(self.model)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in inspect.signature(self.model.forward).parameters:
            inputs["token_type_ids"] = torch.zeros_like(ids)  # Gemma 3 does not train without
        try:
            with torch.no_grad():
                try:
                    self.model(**inputs, use_cache=False)
                except TypeError:
                    self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return calls
