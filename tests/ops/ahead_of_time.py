"""Compile kernels for a GPU that is not there, as its launchers would have them.

    python -m tests.ops.ahead_of_time 75 90

Prints a line of JSON for every kernel of every op and compute capability: what the compiler says of registers and
memory. It runs without Triton's interpreter and so in a process of its own: a driver that names the GPU takes the place
of the CUDA one, and a launch becomes Triton's ``warmup``, which compiles for the arguments that were given and stops.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class Driver:
    """What Triton's compiler asks of a driver: the target, and a device number."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # a kernel keeps what was compiled for it by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Launches compile for ``capability`` and run nothing; yields the ``(name, compiled kernel)`` of each launch."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, KernelInterface

    from fastplug.ops import configs

    compiled: list[tuple[str, Any]] = []

    def launch(self: Any, grid: Any) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            compiled.append((f"{self.fn.__module__}.{self.fn.__name__}", self.warmup(*args, grid=grid, **kwargs)))

        return call

    kept = KernelInterface.__getitem__, configs.architecture, JITFunction.__getitem__
    driver.set_active(Driver(capability))
    KernelInterface.__getitem__ = JITFunction.__getitem__ = launch
    configs.architecture = lambda device: max(known for known in configs.TABLE if known <= capability)
    configs.config.cache_clear()
    try:
        yield compiled
    finally:
        KernelInterface.__getitem__, configs.architecture, JITFunction.__getitem__ = kept
        configs.config.cache_clear()


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of spilled registers and of shared memory a program, of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", shown)}
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": max(kernel.metadata.shared, found["SHARED"]),
        "warps": kernel.metadata.num_warps,
    }


def launches(dtype: torch.dtype = torch.bfloat16, hidden: int = 4096, inner: int = 14336) -> None:
    """Call every launcher as a training step of an 8B model does; the tensors stay on the CPU and are not read."""
    from fastplug.ops.glu import kernel as glu
    from fastplug.ops.logprobs import kernel as logprobs
    from fastplug.ops.nf4 import kernel as nf4
    from fastplug.ops.nf4.reference import Stored
    from fastplug.ops.rms_norm import kernel as rms_norm
    from fastplug.ops.rope import kernel as rope

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind)

    rows = 64
    x, weight = empty(rows, hidden), empty(hidden)
    _, h, rstd = rms_norm.forward(x, weight, 1e-5, residual=x)
    rms_norm.forward(x, weight, 1e-5)
    rms_norm.backward(x, h, rstd, weight, dh=x)
    rms_norm.backward(x, h, rstd, weight, weight_grad=True)
    q, k = empty(1, rows, 32, 128), empty(1, rows, 8, 128)
    cos, head = empty(1, rows, 128), empty(128)
    rope.forward(q, k, cos, cos, q, k)
    rope.backward(q, k, cos, cos, q, k)
    rope.forward(q, k, cos, cos, q, k, q_weight=head, k_weight=head, eps=1e-6)
    normed = {"q": q, "k": k, "q_weight": head, "k_weight": head, "eps": 1e-6}
    rope.backward(q, k, cos, cos, torch.empty_like(q), torch.empty_like(k), **normed)
    both, out = empty(rows, 2 * inner), empty(rows, inner)
    for activation in ("silu", "gelu_tanh"):
        glu.forward(both[:, :inner], both[:, inner:], activation, out)
        glu.backward(out, both[:, :inner], both[:, inner:], activation, both[:, :inner], both[:, inner:], out)
    blocks = inner * hidden // 64
    nested = (empty(256, kind=torch.float32), empty(blocks // 256, kind=torch.float32),
              empty(1, kind=torch.float32)[0], 256)  # fmt: skip
    packed, scales = empty(inner * hidden // 2, kind=torch.uint8), empty(blocks, kind=torch.uint8)
    code = empty(16, kind=torch.float32)
    nf4.decode(packed, scales, code, 64, empty(inner, hidden), nested=nested)
    nf4.decode(packed, scales, code, 64, empty(inner, hidden + 16)[:, :hidden], nested=nested)
    nf4.decode(packed, scales.float(), code, 64, empty(inner, hidden))
    nf4.decode(packed, scales, code, 64, empty(9, 1001), nested=nested)
    for outer, found in ((nested, scales), (None, scales.float())):
        for count in (2, 3):
            stored = [Stored(packed, found, code, outer, inner)] * count
            assert nf4.decode_all(stored, 64, empty(count * inner, hidden))
    logits, targets = empty(4, 128256), torch.zeros(4, dtype=torch.int64)
    found = (empty(4, kind=torch.float32), empty(4, 2, kind=torch.float32), targets.clone())
    entropy = empty(4, kind=torch.float32)
    for softcap in (0.0, 30.0):
        rest = (1.0, softcap, 1.0, -100)
        logprobs.token_logprobs(logits, targets, *found, entropy, *rest)
        logprobs.token_logprobs_and_gradient(logits, targets, *found, None, *rest)
        logprobs.token_logprobs_and_gradient(logits, targets, *found[:2], None, None, *rest)
        logprobs.token_logprobs_backward(logits, targets, found[1], entropy, entropy, entropy, *rest)


def other_formats(capability: int, n: int = 14336, k: int = 4096) -> None:
    """Likewise for the kernels that read and write weights of other formats, and for the products."""
    from fastplug.ops.adapter_matrices import kernel as adapter_matrices
    from fastplug.ops.column_dots import kernel as column_dots
    from fastplug.ops.float_weights import kernel as float_weights
    from fastplug.ops.float_weights.reference import Layout as Float
    from fastplug.ops.fp8 import kernel as fp8
    from fastplug.ops.int_weights import kernel as int_weights
    from fastplug.ops.int_weights.reference import Layout as Int
    from fastplug.ops.quantize_4bit import kernel as quantize_4bit
    from fastplug.ops.scaling import kernel as scaling

    out = torch.empty(n, k, dtype=torch.bfloat16)

    def codes(*shape: int, kind: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind)

    def scales(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    zeros, bytes_ = codes(n // 8, k // 128), torch.uint8
    int_weights.decode(codes(n, k, kind=torch.int8), scales(n, 1), Int((n, k), 8, "row", k, "twos"), out)
    gptq = Int((n, k), 4, "input", 128, packed_zeros=True, zero_plus_one=True)
    int_weights.decode(codes(k // 8, n), scales(k // 128, n).t(), gptq, out, zeros=zeros)
    int_weights.decode(codes(k // 8, n), scales(k // 128, n).t(), gptq, out, zeros=zeros, g_idx=codes(k))
    three = gptq._replace(bits=3)
    int_weights.decode(codes(k * 3 // 32, n), scales(k // 128, n).t(), three, out, zeros=codes(n * 3 // 32, k // 128))
    hqq = Int((n, k), 3, "split", 64)
    int_weights.decode(codes(n * k // 640 * 64 + 64), scales(n, k // 64), hqq, out, zeros=scales(n, k // 64))
    awq = Int((n, k), 4, "output", 128, packed_zeros=True)
    int_weights.decode(codes(k, n // 8), scales(k // 128, n).t(), awq, out, zeros=zeros)
    int_weights.decode(codes(n, k // 8), scales(n, k // 128), Int((n, k), 4, "row", 128, "offset"), out)
    float_weights.decode(codes(n, k, kind=bytes_), scales(n, 1), Float((n, k), "e4m3", (1, k)), out)
    mx = Float((n, k), "e2m1", (1, 32), "e8m0")
    float_weights.decode(codes(n, k // 2, kind=bytes_), codes(n, k // 32, kind=bytes_), mx, out)
    for count in (1, 2, 3):
        a, b = [torch.empty(16, k)] * count, [torch.empty(n, 16)] * count
        adapter_matrices.matrices(a, b, [n * i for i in range(count)], n * count, torch.bfloat16)
    column_dots.column_dots(out, out)
    scaling.scale_columns(out, torch.empty(k), torch.empty_like(out))
    scaling.scale_columns(out, torch.empty(k), torch.empty_like(out), accumulate=True)
    scaling.scale_rows(out, torch.empty(n), out)
    quantize_4bit._approximate = lambda tensor: True  # the instruction that a CPU does not have
    quantize_4bit.quantize(out)
    quantize_4bit.quantize_scales(torch.empty(n * k // 64))
    if capability >= 80 and importlib.util.find_spec("fastplug.ops.low_rank"):  # Triton multiplies by tensor cores
        low_rank = importlib.import_module("fastplug.ops.low_rank.kernel")
        for rank in (32, low_rank.LARGEST_RANK):
            low_rank.add(out, scales(n, rank), scales(k, rank))
    if capability >= 80:
        gradients = importlib.import_module("fastplug.ops.adapter_gradients.kernel")
        for rank in (16, 32):
            places = gradients.Places((0, k, 2 * k, 3 * k), (0, rank, 2 * rank, 3 * rank))
            gradients.gradients(scales(k, 3 * k), scales(k, 3 * rank), scales(3 * k, 3 * rank), places, [1.0] * 3)
        rope = importlib.import_module("fastplug.ops.adapted_rope.kernel")
        for width, rank in ((64, 16), (128, 16), (128, rope.LARGEST_RANK)):
            channels, angles = 48 * width, torch.empty(1, 64, width, dtype=torch.bfloat16)
            adapted = rope.Adapted(scales(64, 3 * rank), scales(channels, 3 * rank), (rank, 2 * rank, 3 * rank))
            rope.forward(scales(64, channels), adapted, rope.Heads(32, 8, width), angles, angles)
    if capability < 89:  # no conversion to FP8 in hardware
        return
    for width in (k, n, 28672):
        fp8.quantize_rows(torch.empty(64, width, dtype=torch.bfloat16))
    fp8.quantize_columns(out, torch.empty(k))


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        with compiling(capability) as compiled:
            launches()
            other_formats(capability)
        seen = set()
        for name, kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps({"capability": capability, "kernel": name, **resources(kernel)}), flush=True)


if __name__ == "__main__":
    main()
