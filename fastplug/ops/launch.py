"""What every Triton launcher needs on the host: layouts it can address, the right device, tile and program counts."""

from __future__ import annotations

import contextlib

import torch

from fastplug.ops.configs import config


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if its last dimension is contiguous, else a contiguous copy. Outer strides are kept."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def check_output(name: str, out: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """Raise ``ValueError`` unless ``out`` has ``shape`` and a contiguous last dimension."""
    if out.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(out.shape)}, expected {tuple(shape)}")
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"{name} has strides {out.stride()}: its last dimension must be contiguous to be written into")


def stride_unit(*strides: int) -> int:
    """8 if every stride is a multiple of 8, else 1.

    Triton's compiler knows of an integer argument only whether it is a multiple of 16. Kernels take their strides
    divided by this unit and multiply again, so that rows padded by 8 elements still get 16-byte accesses. The unit is
    all that the compiler needs to know, so strides and numbers of rows are arguments that kernels are not specialized
    on: a batch of another length compiles nothing.
    """
    return 1 if any(stride % 8 for stride in strides) else 8


def power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return int(getattr(torch.xpu.get_device_properties(device), "gpu_subslice_count", 64))
    return 1


def persistent_programs(device: torch.device, tiles: int) -> int:
    """How many programs share ``tiles`` when each keeps a partial sum: at most as many, and as many as run at once.

    On the CPU (the interpreter) it is four, so that the loop over tiles is exercised.
    """
    return max(1, min(tiles, config(device).persistent * _processors(device)))


def recording(device: torch.device) -> bool:
    """Whether launches on the current stream of a device go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches on the current device, whatever the pointers say."""
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index != torch.xpu.current_device():
        return torch.xpu.device(device)
    return contextlib.nullcontext()
