"""Milliseconds of a training step, from operations and bytes.

Matrix products count two operations for each weight and token, forward and once more for the gradient of their input,
and a third time where the weight is trained. Causal attention counts half of the square. Everything else is limited by
memory: the passes over activations that the kernels make (norms, activation, RoPE, the adapters' thin products) and
the decoding of quantized weights. Launches take no time: the GPU is taken to never wait for Python. In short steps it
does, unless their layers are recorded as CUDA graphs: Llama-3.1-8B with 2 x 512 tokens took an H100 78 ms recorded and
249 ms else, where 71 ms are foretold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastplug.memory.bytes import Step, kept
from fastplug.memory.gpus import GPU
from fastplug.memory.policy import Policy
from fastplug.memory.shapes import LayerShape, Linears, ModelShape


@dataclass(frozen=True)
class _Passes:
    """How often activations are read or written, in elements a token of H (hidden), I (one of gate and up) and Q
    (queries, keys and values): norms, residual adds, activation, RoPE, x Aᵀ, g B, and the gradients of A and B."""

    hidden: float
    inner: float
    heads: float


FORWARD = _Passes(11, 4, 3)
BACKWARD = _Passes(13, 11, 6)
AGAIN = _Passes(11, 0, 3)  # a forward that makes no activation
GATE_UP_AGAIN = _Passes(3, 0, 0)


class LayerTime(NamedTuple):
    """Milliseconds of one layer's forward, of its backward with what is computed again, and of copying what it keeps to
    the host's memory, or from there."""

    forward: float
    backward: float
    copy: float


def layer_ms(layer: LayerShape, step: Step, policy: Policy, gpu: GPU) -> LayerTime:
    """What one layer takes under a policy."""
    forward = _products(layer.linears, layer, step, gpu) + _decoding(layer.linears, step, gpu)
    forward += _attention(layer, step, gpu, False) + _elementwise(layer, step, gpu, FORWARD)
    backward = _products(layer.linears, layer, step, gpu) + _decoding(layer.linears, step, gpu)
    backward += _attention(layer, step, gpu, True) + _elementwise(layer, step, gpu, BACKWARD)
    trained = tuple(linear for linear in layer.linears if linear.trained)
    backward += _products(trained, layer, step, gpu)
    tiles = -(-step.tokens // step.tile)
    if not policy.keeps_gate_up and tiles > 1:
        decoding = _decoding(layer.gate_up + layer.down, step, gpu)
        forward, backward = forward + (tiles - 1) * decoding, backward + (tiles - 1) * decoding
    if not policy.keeps_gate_up:
        again = layer.gate_up
        if policy.checkpoints:
            again = layer.qkv + layer.out + layer.gate_up + layer.others
        backward += _products(again, layer, step, gpu) + tiles * _decoding(again, step, gpu)
        backward += _elementwise(layer, step, gpu, AGAIN if policy.checkpoints else GATE_UP_AGAIN)
        if policy.checkpoints and not policy.keeps_attention:
            backward += _attention(layer, step, gpu, False)
    copy = gpu.host_ms(sum(kept(layer, step, policy).values())) if policy.offloads else 0.0
    return LayerTime(forward, backward, copy)


def keeping_ms(layer: LayerShape, step: Step, gpu: GPU) -> float:
    """What decoding takes in a step of the weights that can be kept: forward and backward."""
    return 2 * _decoding(layer.keepable, step, gpu)


def other_ms(shape: ModelShape, step: Step, gpu: GPU) -> float:
    """Embedding, head, loss and optimizer."""
    T, H, V = step.tokens, shape.hidden, shape.vocabulary
    products = 3 if shape.head_trained else 2
    found = gpu.gemm_ms(2 * products * T * H * V, T) + gpu.copy_ms(4 * T * V * step.compute)
    found += gpu.copy_ms(8 * T * H * step.stream)
    return found + gpu.copy_ms(sum(7 * count * itemsize for count, itemsize in shape.trained))


def _products(linears: Linears, layer: LayerShape, step: Step, gpu: GPU) -> float:
    inside = set(map(id, layer.others))
    weights = sum(linear.weights * (layer.active if id(linear) in inside else 1) for linear in linears)
    share = 2 if step.compute == 2 else 8  # fp32 products, TF32 left off
    return gpu.gemm_ms(2 * step.tokens * weights * share / 2, step.tokens)


def _decoding(linears: Linears, step: Step, gpu: GPU) -> float:
    """Packed weights are read, decoded ones written."""
    size = sum(linear.bytes + linear.weights * step.compute for linear in linears if linear.decoded)
    return gpu.copy_ms(size)


def _attention(layer: LayerShape, step: Step, gpu: GPU, backward: bool) -> float:
    """4·S²·D operations a head forward, of which a causal mask leaves half; 2.5 times that backward."""
    reach = min(layer.window or step.length, step.length)
    pairs = step.length * reach - (reach * reach) / 2
    operations = 4 * step.batch * layer.heads * layer.head_dim * pairs
    if step.masked(layer):  # under a mask PyTorch's kernels compute the whole square, and slower
        operations = 4 * step.batch * layer.heads * layer.head_dim * step.length**2 * 2
    share = gpu.attention_backward if backward else gpu.attention
    return operations * (2.5 if backward else 1.0) / (gpu.tflops * share * 1e9)


def _elementwise(layer: LayerShape, step: Step, gpu: GPU, passes: _Passes) -> float:
    wide = layer.queries + 2 * layer.keys
    inner = layer.intermediate or max((linear.out_features for linear in layer.others), default=0)
    elements = passes.hidden * layer.hidden + passes.inner * inner + passes.heads * wide
    itemsize = (step.stream + step.compute) / 2
    return gpu.copy_ms(step.tokens * elements * itemsize)


__all__ = ["keeping_ms", "layer_ms", "other_ms"]
