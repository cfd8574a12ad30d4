"""A live model as the cost model sees it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from fastplug.errors import OptionError
from fastplug.families import Family
from fastplug.memory.around import optimizer_bytes
from fastplug.memory.checkpoint import attention_refusal
from fastplug.memory.estimate import TILES, Estimate, estimate
from fastplug.memory.gpus import GPU, GPUS, find, of_memory
from fastplug.memory.host_memory import copy_rate
from fastplug.memory.shapes import ModelShape
from fastplug.options import Options
from fastplug.patching.sites import KEY, Site


class Reading:
    """The shapes of a model, read at its first forward: by then hosts have chosen dtypes, adapters and devices.

    Args:
        model: The language model.
        sites: Its decoder layers in order, and whether fastplug runs each as a whole.
        options: Of the apply.
    """

    def __init__(self, model: nn.Module, sites: Sequence[tuple[Site, bool]], options: Options) -> None:
        self._model = weakref.ref(model)
        self._sites: list[tuple[str, weakref.ref[nn.Module], Family, bool]] = [
            (site.name, weakref.ref(site.module), site.family, fused) for site, fused in sites
        ]
        self._options = options
        self._shape: ModelShape | None = None
        self._gpu: GPU = GPUS[0]
        self._keeps_attention: list[bool] = []

    def read(self, device: torch.device) -> ModelShape:
        """The model's shape, on the device that its layers run on.

        Raises:
            OptionError: The model is of a kind that cannot be read.
        """
        model = self._model()
        assert model is not None
        sites = []
        for name, reference, family, fused in self._sites:
            layer = reference()
            assert layer is not None
            sites.append((Site("decoder_layer", name, layer, family), fused))
        dtype = self._options.residual_dtype
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        try:
            self._shape = ModelShape.of_model(
                model,
                sites,
                residual_dtype=None if dtype is None else getattr(torch, dtype),
                compute_dtype=autocast,
            )
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise OptionError(
                f"fastplug: memory={self._options.memory!r} cannot plan {type(model).__name__}, whose shapes are not "
                f"where they are looked for ({error}); leave memory= out for this model"
            ) from error
        self._keeps_attention = []
        for site, fused in sites:
            binding = site.module.__dict__.get(KEY)
            kept = fused and binding is not None and attention_refusal(site.module, binding) is None
            self._keeps_attention.append(kept)
        if device.type == "cuda":
            self._gpu = find(torch.cuda.get_device_name(device)) or of_memory(torch.cuda.mem_get_info(device)[1])
        return self._shape

    @property
    def shape(self) -> ModelShape:
        assert self._shape is not None
        return self._shape

    def estimates(self, batch: int, length: int) -> list[tuple[int | None, Estimate]]:
        """For each size of tiles worth a try (None: no tiles), the costs of a micro-batch."""
        found = []
        for rows in (None, *(rows for rows in TILES if rows < batch * length)):
            made = estimate(self.shape, batch, length, gpu=self._gpu, tile_rows=rows)
            layers = tuple(
                layer
                if keeps
                else layer.only(*(p for p in layer.policies if not (p.checkpoints and p.keeps_attention)))
                for layer, keeps in zip(made.layers, self._keeps_attention, strict=True)
            )
            found.append((rows, Estimate(layers, made.fixed, made.head, made.other_ms, made.step)))
        return found

    def copies(self, device: torch.device) -> float:
        """Measured over assumed milliseconds of copies to the host's memory. Waits for the device."""
        measured = copy_rate(device)
        return 1.0 if measured is None else self._gpu.host / measured

    def optimizer_bytes(self) -> int:
        """States that an AdamW will have once it has stepped."""
        return optimizer_bytes(self.shape.trained, "adamw")


__all__ = ["Reading"]
