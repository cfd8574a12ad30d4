"""From shapes to costs, and from costs to the best plan: what a plan rests on before anything was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastplug.errors import OptionError
from fastplug.memory.around import fixed_bytes, head_peak, step_bytes
from fastplug.memory.bytes import Step, peaks
from fastplug.memory.costs import LayerCosts, PolicyCost
from fastplug.memory.gpus import GPU, GPUS
from fastplug.memory.meter import CONTEXT
from fastplug.memory.moments import assemble
from fastplug.memory.plan import DECODED, Plan
from fastplug.memory.policy import Policy
from fastplug.memory.reserve import Reserve
from fastplug.memory.shapes import LayerShape, Linears, ModelShape
from fastplug.memory.solve import DoesNotFit, least_budget, solve
from fastplug.memory.times import keeping_ms, layer_ms, other_ms
from fastplug.ops.lora.kept_weights import block_size

SLACK = 0.05
"""Reserved beyond allocated bytes: blocks that are cut too small or too large for what comes next. 4.9 to 6.3% were
measured under budgets on an H100."""
LIBRARIES = 64 * 2**20
"""Workspaces that cuBLAS and cuDNN take from PyTorch's allocator and keep: 0.07 to 0.1 GiB on an H100."""
TILES = (16384, 8192, 4096, 2048)
"""Tokens in the MLP at once that are tried where gate and up are not kept, beside all of them."""


TILED = 1.05
"""Tiles round differently: a plan with them has to be faster by this factor than one without."""


def in_comparison(plan: Plan) -> float:
    """The milliseconds by which plans for the same batch are compared."""
    return plan.ms * (1.0 if plan.tile_rows is None else TILED)


@dataclass(frozen=True)
class Estimate:
    """All that :func:`~fastplug.memory.solve.solve` wants to know of one shape of batch.

    Attributes:
        layers: Costs of the decoder layers.
        fixed: Bytes by name that are always there.
        head: Bytes by name that head and loss need beside what layers keep.
        other_ms: Milliseconds outside the layers.
        step: The step.
    """

    layers: tuple[LayerCosts, ...]
    fixed: dict[str, int]
    head: dict[str, int]
    other_ms: float
    step: Step

    @property
    def head_peak(self) -> int:
        return sum(self.head.values())


def layer_costs(
    shape: ModelShape,
    batch: int,
    length: int,
    gpu: GPU = GPUS[0],
    tile_rows: int | None = None,
    graphs: bool = True,
) -> tuple[LayerCosts, ...]:
    """The costs of every layer under every policy that it can have, reasoned from shapes."""
    step = Step.of(shape, batch, length, gpu, tile_rows, graphs)
    known: dict[LayerShape, LayerCosts] = {}
    for layer in shape.layers:
        if layer not in known:
            known[layer] = LayerCosts(
                {policy: _cost(layer, step, policy, gpu) for policy in policies_of(layer)}, layer.gradient_bytes
            )
    made = [known[layer] for layer in shape.layers]
    # The head's gradient is there before the last layer's backward begins, the embedding's comes when all is done.
    made[-1] = replace(made[-1], gradients=made[-1].gradients + shape.head_trained)
    made[0] = replace(made[0], gradients=made[0].gradients + shape.other_trained - shape.head_trained)
    return tuple(made)


def policies_of(layer: LayerShape) -> tuple[Policy, ...]:
    """The policies that a layer can have: one that the host runs keeps what it keeps."""
    if not layer.fused:
        return (Policy.KEEP,)
    return tuple(policy for policy in Policy if layer.gated or policy.level is not Policy.DROP_GATE_UP)


def _cost(layer: LayerShape, step: Step, policy: Policy, gpu: GPU) -> PolicyCost:
    found = peaks(layer, step, policy)
    ms = layer_ms(layer, step, policy, gpu)
    time = ms.forward + ms.backward
    return PolicyCost(found.saved, found.forward, found.backward, time, found.host, found.shared, ms.forward, ms.copy)


def estimate(
    shape: ModelShape,
    batch: int,
    length: int,
    *,
    gpu: GPU = GPUS[0],
    optimizer: str = "adamw",
    tile_rows: int | None = None,
    graphs: bool = True,
) -> Estimate:
    """The costs of one micro-batch of ``batch`` x ``length`` tokens.

    ``graphs`` says whether short steps are replayed as CUDA graphs, as the option of that name has it.

    Raises:
        OptionError: There is no token.
    """
    if batch < 1 or length < 1:
        raise OptionError(f"fastplug: a batch of {batch} x {length} has no token")
    fixed = {**fixed_bytes(shape, optimizer), "libraries": LIBRARIES, "step": step_bytes(shape, batch, length)}
    step = Step.of(shape, batch, length, gpu, tile_rows, graphs)
    layers = layer_costs(shape, batch, length, gpu, tile_rows, graphs)
    return Estimate(layers, fixed, head_peak(shape, batch, length), other_ms(shape, step, gpu), step)


def best_plan(
    shape: ModelShape,
    batch: int,
    length: int,
    budget: int,
    *,
    gpu: GPU = GPUS[0],
    optimizer: str = "adamw",
    accumulating: bool = True,
    policies: Sequence[Policy] = tuple(Policy),
    host_budget: int | None = None,
    context: int = CONTEXT,
    slack: float = SLACK,
) -> Plan:
    """The fastest plan within ``budget`` bytes, MLPs in tiles included. See :func:`~fastplug.memory.solve.solve`.

    Raises:
        DoesNotFit: Nothing fits.
    """
    found: Plan | None = None
    error: DoesNotFit | None = None
    for tile_rows in (None, *(rows for rows in TILES if rows < batch * length)):
        given = estimate(shape, batch, length, gpu=gpu, optimizer=optimizer, tile_rows=tile_rows)
        try:
            made = solve(
                [layer.only(*policies) for layer in given.layers],
                given.fixed,
                budget,
                head_peak=given.head_peak,
                accumulating=accumulating,
                host_budget=host_budget,
                context=context,
                reserve=Reserve.of(slack, shape.weight_bytes),
                other_ms=given.other_ms,
                batch=batch,
                sequence=length,
            )
        except DoesNotFit as failed:
            error = failed if error is None or failed.least < error.least else error
            continue
        made = replace(made, tile_rows=tile_rows, model=shape.name, gpu=gpu.name)
        if found is None or in_comparison(made) < in_comparison(found):
            found = made
        if set(made.policies) == {Policy.KEEP}:
            break
    if found is None:
        assert error is not None
        raise error
    return found


def keepable(shape: ModelShape, step: Step, gpu: GPU) -> tuple[int, float]:
    """Bytes of all decoded weights that can stay from step to step, and the milliseconds that this spares."""
    weights = sum(linear.weights for layer in shape.layers for linear in layer.keepable)
    return weights * step.compute, sum(keeping_ms(layer, step, gpu) for layer in shape.layers)


def handed_bytes(layer: LayerShape, policy: Policy, step: Step) -> int:
    """Bytes at most of decoded weights that a layer's backward may leave to its next forward: those of nodes that keep
    as many numbers, on the device, those of the MLP in a block of gate's and up's size."""
    if not layer.fused or policy.offloads or policy.checkpoints:
        return 0

    def decoded(*groups: Linears) -> int:
        return sum(linear.weights for group in groups for linear in group if linear.decoded) * step.compute

    attention, mlp = decoded(layer.qkv, layer.out), decoded(layer.gate_up, layer.down)
    if not (mlp and policy.keeps_gate_up):
        return attention
    return max(attention + mlp, block_size(2 * layer.intermediate * step.tokens * step.compute, mlp))


def with_decoded(plan: Plan, left: int, weights: tuple[int, float], slack: float) -> Plan:
    """Spend ``left`` bytes on decoded weights that stay from step to step, of which there are :func:`keepable`.

    What layers keep for their backward comes first: a byte of it spares 2H operations, one of a weight two times 1.3
    bytes of traffic, ten times less in an 8B model.
    """
    whole, spared = weights
    size = min(whole, int(left / (1 + slack)))
    if size <= 0:
        return plan
    parts = {**plan.parts, DECODED: size, "slack": plan.parts["slack"] + int(slack * size)}
    return replace(plan, parts=parts, ms=plan.ms - spared * size / whole)


def uniform_plan(
    shape: ModelShape,
    batch: int,
    length: int,
    budget: int,
    policy: Policy,
    *,
    gpu: GPU = GPUS[0],
    optimizer: str = "adamw",
    accumulating: bool = True,
    tile_rows: int | None = None,
    context: int = CONTEXT,
    slack: float = SLACK,
) -> Plan:
    """What it needs if every layer has ``policy``, or KEEP where it cannot; it may exceed the budget."""
    given = estimate(shape, batch, length, gpu=gpu, optimizer=optimizer, tile_rows=tile_rows)
    chosen = [policy if policy in layer.policies else Policy.KEEP for layer in given.layers]
    made = assemble(
        given.layers,
        chosen,
        given.fixed,
        budget,
        head_peak=given.head_peak,
        accumulating=accumulating,
        context=context,
        reserve=Reserve.of(slack, shape.weight_bytes),
        other_ms=given.other_ms,
        batch=batch,
        sequence=length,
    )
    return replace(made, tile_rows=tile_rows, model=shape.name, gpu=gpu.name)


def least(
    shape: ModelShape,
    batch: int,
    length: int,
    *,
    optimizer: str = "adamw",
    accumulating: bool = True,
    policies: Sequence[Policy] = tuple(Policy),
    host_budget: int | None = None,
    context: int = CONTEXT,
    slack: float = SLACK,
) -> int:
    """The smallest budget in bytes for which there is a plan, MLPs in tiles included."""
    needs = []
    for tile_rows in {None, min(TILES)} if batch * length > min(TILES) else {None}:
        given = estimate(shape, batch, length, optimizer=optimizer, tile_rows=tile_rows)
        layers = [layer.only(*policies) for layer in given.layers]
        needs.append(
            least_budget(
                layers,
                given.fixed,
                head_peak=given.head_peak,
                accumulating=accumulating,
                host_budget=host_budget,
                context=context,
                reserve=Reserve.of(slack, shape.weight_bytes),
            )
        )
    return min(needs)


__all__ = [
    "SLACK",
    "TILES",
    "Estimate",
    "best_plan",
    "estimate",
    "handed_bytes",
    "in_comparison",
    "keepable",
    "layer_costs",
    "least",
    "policies_of",
    "uniform_plan",
    "with_decoded",
]
