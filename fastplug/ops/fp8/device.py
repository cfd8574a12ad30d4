"""Whether a device has the FP8 products that a model needs.

The compute capability says that the tensor cores multiply FP8. Whether there is a product with a scale for each row of
both operands is up to PyTorch: older builds have it for Hopper alone, and where it is cuBLAS's, that has it for some
GPUs and not for others. So a small one is tried, once for each device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastplug.ops.fp8.reference import FP8

SIZE = 16  # the least that every dimension may be, see torch._scaled_mm


def fp8_reason(device: torch.device, product: Callable[..., torch.Tensor]) -> str | None:
    """Why FP8 products cannot run on a device, or None if they can. Waits for the device at the first call.

    Args:
        device: Where to.
        product: What computes them: :func:`fastplug.ops.fp8.reference.product` of an op's implementation.
    """
    if device.type == "cpu":
        return None  # in fp32, for tests
    if device.type != "cuda" or torch.version.hip is not None:
        return f"FP8 products need an NVIDIA GPU, not {'ROCm' if device.type == 'cuda' else device.type}"
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if capability < (8, 9):
        return (
            f"FP8 products need compute capability 8.9 or newer (Ada, Hopper, Blackwell), "
            f"{name} has {capability[0]}.{capability[1]}"
        )
    failure = attempt(device, product)
    if failure is not None:
        return f"PyTorch {torch.__version__} has no FP8 product with a scale for each row on {name}: {failure}"
    return None


@functools.cache
def attempt(device: torch.device, product: Callable[..., torch.Tensor]) -> str | None:
    """What is wrong with a small product on a device, whose result is exact in bf16, or None."""
    try:
        ones = torch.ones(SIZE, SIZE, device=device).to(FP8)
        scale = torch.arange(1.0, SIZE + 1, device=device)
        found = product(ones, scale, ones, scale, torch.bfloat16)
        right = torch.equal(found.float(), SIZE * scale[:, None] * scale)
    except (RuntimeError, ValueError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None if right else "its result is wrong"
