"""Bytes of a decoder layer in a training step, from shapes: what it keeps, and the highest of each moment.

Letters as in ``saved.py``: T tokens, H hidden, I width of gate, Q and K channels of queries and keys; c bytes of an
element in the compute dtype, e in the residual stream. Peaks follow the order in which ``fastplug.ops.lora`` allocates
and frees, on a GPU; a *moment* below is a line of that code at which most is alive.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastplug.graphs.replay import FLOPS
from fastplug.memory import offload
from fastplug.memory.gpus import CPU, GPU
from fastplug.memory.policy import Policy
from fastplug.memory.saved import BESIDE, PIECE, STAGED, Rank, Widths, tensors
from fastplug.memory.shapes import LayerShape, Linears, ModelShape
from fastplug.ops.adapted_glu.sizes import backward_bytes, compiled_rank, covers


@dataclass(frozen=True)
class Step:
    """One micro-batch.

    Attributes:
        batch, length: Its shape; tokens are their product.
        compute, stream: Bytes of an element in products and in the residual stream.
        windowed_mask: Whether attention gets a mask in layers with a window: ``sdpa`` does, once it is exceeded.
        eager: Whether attention keeps its scores.
        tile_rows: Tokens that go through a gated MLP at once where gate and up are not kept, or None.
        graphs: Whether layers are replayed as CUDA graphs where their step is short.
        adapted_glu: Whether the GPU has the kernels of ``ops/adapted_glu``.
    """

    batch: int
    length: int
    compute: int = 2
    stream: int = 2
    windowed_mask: bool = True
    eager: bool = False
    tile_rows: int | None = None
    graphs: bool = False
    adapted_glu: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        batch: int,
        length: int,
        gpu: GPU = CPU,
        tile_rows: int | None = None,
        graphs: bool = False,
    ) -> Step:
        """The step of a model at a batch and length."""
        eager = shape.attention == "eager"
        windowed = shape.attention in ("sdpa", "eager")
        graphs = graphs and shape.attention == "sdpa"
        sizes = shape.compute_itemsize, shape.stream_itemsize
        return cls(batch, length, *sizes, windowed, eager, tile_rows, graphs, gpu.adapted_glu)

    def replayed(self, layer: LayerShape, policy: Policy) -> bool:
        """Whether the layer is one that graphs/replay.py records."""
        weights = sum(linear.weights for linear in layer.linears)
        short = 4 * self.tokens * weights <= FLOPS
        plain = policy is not Policy.DROP_GATE_UP and self.tile == self.tokens and not policy.offloads
        return self.graphs and layer.fused and layer.active == 1.0 and short and plain

    def masked(self, layer: LayerShape) -> bool:
        """Whether attention of this layer runs under a mask."""
        return self.windowed_mask and layer.window is not None and self.length > layer.window

    @property
    def tile(self) -> int:
        """Tokens in the MLP at once where gate and up are not kept."""
        return self.tokens if self.tile_rows is None else min(self.tokens, self.tile_rows)


# --- what a layer keeps -----------------------------------------------------------------------------------------------


def kept(layer: LayerShape, step: Step, policy: Policy = Policy.KEEP) -> dict[str, int]:
    """Bytes by tensor that a layer has from its forward to its backward; under an offloading policy, on the host."""
    if not layer.fused:
        return _kept_by_host(layer, step)
    tile_rows = None if step.tile == step.tokens else step.tile_rows
    found = tensors(policy, _widths(layer, step), step.tokens, tile_rows)
    if not policy.checkpoints:
        found.update(_by_row(layer, step, policy))
    return {name: size for name, size in found.items() if size}


def _by_row(layer: LayerShape, step: Step, policy: Policy) -> dict[str, int]:
    """What layers keep that differ from Llama's (patching/forwards/layer_by_row.py), as corrections."""
    T, H, c, e = step.tokens, layer.hidden, step.compute, step.stream
    row = T * H * e
    found: dict[str, int] = {"1/rms": 0, "1/rms of the MLP": 0}
    statistics = 8 if layer.layer_norm else 4  # LayerNorm keeps a mean too
    in_tiles = not policy.keeps_gate_up and step.tile < T
    found["1/rms"] += {"": 0, "fused": 4}.get(layer.input_norm, statistics) * T
    found["1/rms of the MLP"] += {"": 0, "shared": 0, "fused": 0 if in_tiles else 4}.get(
        layer.post_norm, statistics
    ) * T
    if layer.input_norm == "apart":
        found["normalized input"] = row
    if layer.post_norm == "apart":
        found["normalized middle"] = row
    if layer.attention_post_norm:
        found["output of attention"], found["1/rms"] = row, found["1/rms"] + statistics * T
    if layer.mlp_post_norm:
        found["output of the MLP"], found["1/rms"] = row, found["1/rms"] + statistics * T
    if layer.parallel and layer.post_norm in ("shared", "apart"):
        found["middle of the residual stream"] = 0  # there is none: both read x, or what was normalized of it
    if layer.table_copies:
        found["cos and sin"] = 2 * step.length * layer.head_dim * e
    if layer.head_norm == "apart":
        found["q, k turned"] = T * (layer.queries + layer.keys) * c
        found["1/rms"] += 2 * statistics * T
    if layer.dropouts:
        found["dropout masks of the stream"] = layer.dropouts * T * H
    if layer.scaled:
        found["scaled queries"] = T * layer.queries * c
    if step.eager:
        found.update({"q, k, v": 0, "logsumexp": 0, "q, k turned": 0, "q, k before their norm": 0})
        found["repeated k, v"] = 3 * T * layer.queries * c  # q too is laid out by head for a batched product
        found["scores"] = step.batch * layer.heads * step.length**2 * _score_bytes(layer, c)
    elif step.masked(layer):
        found["mask of the window"] = step.batch * step.length**2 * c
        if layer.head_norm and layer.heads != layer.kv_heads:  # the k that was turned is repeated and not kept itself
            name = "q, k turned" if layer.head_norm == "apart" else "q, k before their norm"
            found[name] = T * layer.queries * c
        if layer.scaled and layer.heads != layer.kv_heads:
            found["q, k, v"] = 0  # k and v are repeated, q is scaled: nobody keeps the buffer
    if not layer.gated:
        inner = sum(linear.out_features for linear in layer.gate_up)
        found["gate, up"] = 2 * T * inner * c  # before and after the activation
        if not layer.gate_up:
            found["experts"] = _experts(layer, step)
    return found


def _score_bytes(layer: LayerShape, c: int) -> int:
    """A score as the host's own attention keeps it: the softmax in fp32, cast, and what the soft cap needs."""
    return 4 + (c if c != 4 else 0) + (c if layer.softcap else 0)


def _experts(layer: LayerShape, step: Step) -> int:
    """About what frozen experts keep that the host runs, for each that a token goes through: gate and up, the activated
    gate, and the output that the router's weight multiplies."""
    downs = [linear for linear in layer.others if linear.out_features == layer.hidden]
    widths = sum(3 * linear.in_features + layer.hidden for linear in downs) * layer.active
    return int(step.tokens * widths * step.compute)


def _kept_by_host(layer: LayerShape, step: Step) -> dict[str, int]:
    """What a layer keeps that runs as the host wrote it, as PyTorch and PEFT save it.

    Norms keep their input, projections with an adapter theirs (and x Aᵀ), attention q, k, v and its output, the
    activation of an MLP without a gate its input and, where it is a formula of several operations (GPT-2's), what is
    between them.
    """
    T, H, c, e = step.tokens, layer.hidden, step.compute, step.stream
    adapted = [linear for linear in layer.linears if linear.rank]
    trained = [linear for linear in layer.linears if linear.trained and not linear.rank]
    norm = 8 if layer.layer_norm else 4
    found = {
        "residual stream": T * H * e,
        "middle of the residual stream": T * H * e,
        "1/rms": 2 * norm * T,
        "q, k, v": T * (layer.queries + 2 * layer.keys) * c,
        "attention output": T * layer.queries * c,
        "logsumexp": 4 * T * layer.heads,
        "inputs of projections": sum(
            T * linear.in_features * (linear.adapter_itemsize if linear.rank and c != 2 else c)
            for linear in {(x.in_features, x.out_features): x for x in (*adapted, *trained)}.values()
            if linear.in_features == H  # the others read what attention or the activation keeps
        ),
        "x Aᵀ": sum(T * linear.rank * c for linear in adapted),
    }
    out = [linear.in_features for linear in layer.others if linear.out_features == H]
    inner = max(out, default=4 * H)
    found["activation"] = layer.activation * T * inner * c
    if step.eager:
        found["scores"] = step.batch * layer.heads * step.length**2 * _score_bytes(layer, c)
    return found


def _widths(layer: LayerShape, step: Step) -> Widths:
    return Widths(
        hidden=layer.hidden,
        intermediate=layer.intermediate if layer.gated else 0,
        queries=layer.queries,
        keys=layer.keys,
        heads=layer.heads,
        residual_bytes=step.stream,
        compute_bytes=step.compute,
        qkv=_rank(layer.qkv, step),
        out=_rank(layer.out, step),
        gate_up=_rank(layer.gate_up, step),
        down=_rank(layer.down, step),
        head_norm=layer.head_norm == "fused",
        repeats=step.masked(layer) and layer.heads != layer.kv_heads,
    )


def _rank(linears: Linears, step: Step) -> Rank:
    adapted = [linear for linear in linears if linear.rank]
    copied = len(linears) > 1 or any(linear.adapter_itemsize != step.compute for linear in adapted)
    return Rank(sum(linear.rank for linear in adapted), sum(linear.drops for linear in adapted), copied)


# --- moments ----------------------------------------------------------------------------------------------------------


ADAPTERS = {
    "adapters of q, k, v": "qkv",
    "adapter of the output": "out",
    "adapters of gate, up": "gate_up",
    "adapter of down": "down",
}
"""What the adapters of a group keep -> the linear layers of that group."""
OF_THE_MLP = frozenset(
    (
        "gate, up",
        "adapters of gate, up",
        "adapter of down",
        "1/rms of the MLP",
        "middle of the residual stream",
        "normalized middle",
        "output of the MLP",
        "experts",
    )
)
"""Tensors that the layer's backward has freed when attention's begins."""


@dataclass(frozen=True)
class Peaks:
    """One layer under one policy: bytes it keeps on the device and, in whole pieces, on the host, the highest of its
    forward and of its backward (see :class:`~fastplug.memory.costs.PolicyCost`), and staging buffers."""

    saved: int
    host: int
    forward: int
    backward: int
    shared: int


def peaks(layer: LayerShape, step: Step, policy: Policy) -> Peaks:
    """The bytes of a layer under a policy."""
    held = sum(kept(layer, step, policy).values())
    everything = sum(kept(layer, step).values())
    row = step.tokens * layer.hidden * step.stream
    if not layer.fused:
        inner = 2 * step.tokens * max((linear.out_features for linear in layer.linears), default=0) * step.compute
        return Peaks(held, 0, held + inner + row, held + 2 * inner + 2 * row + _buffer(layer.linears, step), 0)
    mlp = sum(size for name, size in kept(layer, step).items() if name in OF_THE_MLP)
    before_mlp = everything - mlp  # what attention keeps
    inside = everything  # what is there when the layer's backward begins, recomputed or not
    if policy.level is Policy.DROP_GATE_UP or (not policy.keeps_gate_up and step.tile < step.tokens):
        inside = sum(kept(layer, step, Policy.DROP_GATE_UP).values())
    forward = max(_attention_forward(layer, step), before_mlp + _mlp_forward(layer, step, policy))
    backward = row + max(inside + _mlp_backward(layer, step, policy), before_mlp + _attention_backward(layer, step))
    if policy.checkpoints:
        backward = max(backward, row + forward)  # which runs again
        own = sum(kept(layer, step, Policy.RESIDUAL).values())
        forward = max(_attention_forward(layer, step), own + _mlp_forward(layer, step, policy))
    forward = max(forward, held + row)
    if step.replayed(layer, policy):  # a recording has its own gradients and, where it keeps, its own output
        more = layer.gradient_bytes + (0 if policy.checkpoints else row)
        shared = (4 if policy.checkpoints else 2) * row  # gradients of output and input; input and output
        return Peaks(held + more, 0, forward + more, backward + more, shared)
    if policy.offloads:
        stays, pinned = _offloaded(layer, step, policy)
        return Peaks(stays, pinned, forward, backward, (STAGED - 1) * held)
    return Peaks(held, 0, forward, backward, 0)


def _offloaded(layer: LayerShape, step: Step, policy: Policy) -> tuple[int, int]:
    """(bytes that stay on the device, bytes of pinned memory) of a layer that offloads what it keeps.

    Tensors that are too small stay (``offload.py``). Each of the others takes whole pieces of the host's memory.
    """
    stays = pinned = 0
    for name, size in kept(layer, step, policy).items():
        for part in _tensors_of(name, size, layer, step):
            if name == BESIDE or part < offload.SMALLEST:
                stays += part
            else:
                pinned += -(-part // PIECE) * PIECE
    return stays, pinned


def _tensors_of(name: str, size: int, layer: LayerShape, step: Step) -> list[int]:
    """The sizes of the tensors that an entry of :func:`kept` sums, each rounded up to pieces of its own."""
    T, c = step.tokens, step.compute
    linears: Linears = getattr(layer, ADAPTERS.get(name, ""), ())
    total = _rank(linears, step).total * c
    parts = [size]
    if total:  # x Aᵀ, and A and B where they are copies
        parts = [total * T, total * linears[0].in_features, total * sum(x.out_features for x in linears)]
        parts = parts if sum(parts) <= size else parts[:1]
    elif name in ("q, k before their norm", "q, k turned"):
        parts = [T * layer.queries * c, T * layer.keys * c]
    elif name == "q, k, v" and not layer.head_norm:  # attention saves k first, which offload.py takes by itself
        q, k = T * layer.queries * c, T * layer.keys * c
        return [k, size] if size <= offload.LARGEST_WHOLE * q else [k, q, k]
    rest = size - sum(parts)
    return [*parts, rest] if rest >= 0 else [size]


def _attention_forward(layer: LayerShape, step: Step) -> int:
    """From the layer's input to the output of attention's last projection."""
    T, c = step.tokens, step.compute
    x, wide = T * layer.hidden * step.stream, T * (layer.queries + 2 * layer.keys) * c
    entering = T * layer.hidden * c
    mixed, out = T * layer.queries * c, T * layer.hidden * c
    turned = T * (layer.queries + layer.keys) * c if layer.head_norm else 0
    repeated = 2 * mixed if step.masked(layer) and layer.heads != layer.kv_heads else 0
    mask = 2 * step.batch * step.length**2 * c if step.masked(layer) else 0
    scores = step.batch * layer.heads * step.length**2 * (c + 4) if step.eager else 0
    return x + max(
        entering + wide + max(_buffer(layer.qkv, step), turned),
        wide + turned + repeated + mask + scores + mixed,
        wide + turned + repeated + mask + mixed + out + _buffer(layer.out, step),
    )


def _mlp_forward(layer: LayerShape, step: Step, policy: Policy) -> int:
    """From attention's output to the layer's, above what attention keeps."""
    c, T = step.compute, step.tokens
    t = T if policy.keeps_gate_up else step.tile
    row = T * layer.hidden * step.stream
    base = T * layer.hidden * c + row  # attention's output and the stream between
    if not layer.down:
        return base + row + _experts(layer, step) * 2
    width = sum(linear.out_features for linear in layer.gate_up)
    entering, hidden = t * layer.hidden * c, t * layer.intermediate * c
    tiled = row if t < T else 0  # the output is there from the first tile on
    return (
        base
        + tiled
        + max(
            entering + t * width * c + _buffer(layer.gate_up, step),
            t * width * c + hidden + row + _buffer(layer.down, step),
        )
    )


def _mlp_backward(layer: LayerShape, step: Step, policy: Policy) -> int:
    """Above what the layer keeps and the gradient of its output (ops/lora/gated_mlp_rows.py)."""
    c, T = step.compute, step.tokens
    t = T if policy.keeps_gate_up else step.tile
    row = T * layer.hidden * step.stream
    if not layer.down:
        return _experts(layer, step) + row
    H, inner = layer.hidden, layer.intermediate
    width = sum(linear.out_features for linear in layer.gate_up)
    cast = t * H * c if step.stream != c else 0
    d_hidden, d_normed = t * inner * c, t * H * c
    again = policy.level is Policy.DROP_GATE_UP or (not policy.keeps_gate_up and t < T)
    # The gradient of gate and up is written over them, but where a recording needs them for its next replay.
    wide = t * width * c if again or (step.replayed(layer, policy) and not policy.checkpoints) else 0
    down, gate_up = _buffer(layer.down, step), _buffer(layer.gate_up, step)
    weights = _trained(layer.down) + _trained(layer.gate_up)
    moments = [
        cast + down + d_hidden + (wide if again else 0),
        cast + d_hidden + wide + _unit_sums(layer, step),
        cast + wide + gate_up + d_normed,
        cast + wide + 2 * d_normed + weights,
        cast + 2 * d_normed + row,
    ]
    if again:
        moments.append(cast + d_normed + gate_up + wide)
    return max(moments) + (row if t < T else 0)


def _unit_sums(layer: LayerShape, step: Step) -> int:
    """The partial sums of the adapted gated unit's backward, where its kernel is used."""
    linears = (*layer.gate_up, *layer.down)
    ranks = [linear.rank for linear in linears]
    if not step.adapted_glu or step.compute != 2 or step.tile < step.tokens or not all(ranks):
        return 0
    if any(linear.drops or linear.trained for linear in linears) or not covers(layer.intermediate, *ranks):
        return 0
    return backward_bytes(step.tokens, layer.intermediate, compiled_rank(*ranks))


def _attention_backward(layer: LayerShape, step: Step) -> int:
    """Above what attention keeps and the gradient of the layer's output, which the stream's replaces."""
    c, T = step.compute, step.tokens
    wide, mixed = T * (layer.queries + 2 * layer.keys) * c, T * layer.queries * c
    accumulator = T * layer.queries * 4  # dq is summed in fp32
    expanded = 2 * mixed if layer.heads != layer.kv_heads else 0
    mask = step.batch * step.length**2 * c if step.masked(layer) else 0
    scores = 2 * step.batch * layer.heads * step.length**2 * c if step.eager else 0
    d_normed = T * layer.hidden * c
    return max(
        d_normed + mixed + _buffer(layer.out, step) + _trained(layer.out),
        mixed + wide + accumulator + expanded + mask + scores,
        wide + wide + _buffer(layer.qkv, step) + d_normed,
        wide + wide + 2 * d_normed + _trained(layer.qkv),
    )


def _buffer(linears: Linears, step: Step) -> int:
    """Bytes of decoded or cast weights that a product needs at once."""
    if any(linear.decoded for linear in linears):
        return sum(linear.weights for linear in linears) * step.compute
    return sum(linear.weights * step.compute for linear in linears if linear.itemsize != step.compute)


def _trained(linears: Linears) -> int:
    return sum(linear.trained for linear in linears)


__all__ = ["Peaks", "Step", "kept", "peaks"]
