"""A live model as the cost model sees it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastplug.errors import OptionError
from fastplug.families import Family
from fastplug.memory.bytes import Step
from fastplug.memory.checkpoint import attention_refusal
from fastplug.memory.costs import LayerCosts
from fastplug.memory.estimate import TILES, Estimate, estimate, handed_bytes, keepable
from fastplug.memory.gpus import CPU, GPU, find, of_memory
from fastplug.memory.host_memory import copy_rate
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy
from fastplug.memory.shapes import ModelShape
from fastplug.ops.lora.kept_weights import LARGEST_BLOCK
from fastplug.options import Options
from fastplug.patching.sites import KEY, Site
from fastplug.patching.weights import planned
from fastplug.sharding import distributed

SCATTERING = 2  # layers whose gradients FSDP has as a whole at a time: one that is made, one that is being summed


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
        self._gpu: GPU = CPU
        self._keeps_attention: list[bool] = []
        self._share = 1.0  # of the gradients that stays in this process
        self._sharded = False
        self.in_backward = False  # an optimizer uses the gradients within the backward

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
        self._share = _share(model.parameters())
        self._sharded = any(map(distributed, model.parameters()))
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

    def estimates(self, batch: int, length: int, recorded: bool = False) -> list[tuple[int | None, Estimate]]:
        """For each size of tiles worth a try (None: no tiles), the costs of a micro-batch.

        ``recorded`` counts what CUDA graphs hold, in the layers that are recorded; these have no tiles.
        """
        found = []
        tiles = () if recorded else (rows for rows in TILES if rows < batch * length)
        for rows in (None, *tiles):
            made = estimate(self.shape, batch, length, gpu=self._gpu, tile_rows=rows, graphs=recorded)
            layers = list(made.layers)
            for i, keeps in enumerate(self._keeps_attention):
                if not keeps:
                    possible = (p for p in layers[i].policies if not (p.checkpoints and p.keeps_attention))
                    layers[i] = layers[i].only(*possible)
                layers[i] = self._with_passing_gradients(layers[i], i)
            found.append((rows, Estimate(tuple(layers), made.fixed, made.head, made.other_ms, made.step)))
        return found

    def records(self, batch: int, length: int) -> bool:
        """Whether any layer is recorded as CUDA graphs in such a micro-batch, where the device has them."""
        step = Step.of(self.shape, batch, length, gpu=self._gpu, graphs=True)
        return any(step.replayed(layer, Policy.KEEP) for layer in self.shape.layers)

    def decoded(self, batch: int, length: int) -> tuple[int, float]:
        """Bytes of all decoded weights that can stay from step to step, and the milliseconds that this spares."""
        if self._sharded or not planned(self._options):
            return 0, 0.0
        step = Step.of(self.shape, batch, length, gpu=self._gpu)
        return keepable(self.shape, step, self._gpu)

    def cut_up(self, plan: Plan) -> bool:
        """Whether activations are so much larger than weights that decoded weights in their place would cut up the
        memory which activations need next."""
        return plan.batch * plan.sequence > LARGEST_BLOCK * self.shape.hidden

    def handed(self, plan: Plan) -> list[int]:
        """Bytes at most of decoded weights that the backward of each layer may leave to the next forward."""
        step = Step.of(self.shape, plan.batch, plan.sequence, gpu=self._gpu)
        layers = zip(self.shape.layers, plan.policies, strict=True)
        return [handed_bytes(layer, policy, step) for layer, policy in layers]

    def _with_passing_gradients(self, layer: LayerCosts, index: int) -> LayerCosts:
        """A layer's costs where its gradients do not stay as a whole: FSDP keeps a part of them, an optimizer within
        the backward none."""
        whole = layer.gradients
        stays = int(whole * self._share)
        passing = SCATTERING * (whole - stays)
        if self.in_backward:
            last = self.shape.head_trained if index == self.count - 1 else 0
            kept = last if self.shape.tied else 0  # autograd waits with it for the embedding's
            passing, stays = passing + stays - last, kept
        if stays == whole:
            return layer
        costs = {p: replace(cost, backward_peak=cost.backward_peak + passing) for p, cost in layer.policies.items()}
        return replace(layer, policies=costs, gradients=stays)

    @property
    def count(self) -> int:
        return len(self._sites)

    def copies(self, device: torch.device) -> float:
        """Measured over assumed milliseconds of copies to the host's memory. Waits for the device."""
        measured = copy_rate(device)
        return 1.0 if measured is None else self.copy_ratio(measured)

    def copy_ratio(self, rate: float) -> float:
        """Measured over assumed milliseconds of copies that reach a rate, in 10^9 bytes a second."""
        return self._gpu.host / rate


def _share(parameters: Iterable[Any]) -> float:
    """The part of the trained numbers that FSDP2 leaves to each process, the same on all ranks; 1.0 without it.

    A model is read in its first forward, when its first layer has been gathered, so the others tell.
    """
    whole, here = 0, 0.0
    for parameter in parameters:
        if parameter.requires_grad and distributed(parameter):
            sizes = zip(parameter.placements, parameter.device_mesh.shape)
            whole += parameter.numel()
            here += parameter.numel() / math.prod(size for placement, size in sizes if placement.is_shard())
    return here / whole if whole else 1.0


__all__ = ["Reading"]
