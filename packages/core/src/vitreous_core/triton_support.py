"""What every Triton kernel here asks of the machine; importing this needs no Triton."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOWEST_CAPABILITY = (8, 0)
_INSTALLED = importlib.util.find_spec("triton") is not None


def device_reasons(device: torch.device) -> list[str]:
    """Why no kernel can run on a device; empty when they can: an NVIDIA GPU from Ampere on, or Triton's interpreter."""
    if not _INSTALLED:
        return ["the package triton is not installed"]
    if device.type != "cuda":
        return [] if _is_interpreted() else [f"tensors must be on a CUDA device; got {device.type!r}"]
    reason = _capability_reason(device.index)
    return [reason] if reason else []


def dtype_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why kernels that multiply matrices cannot compute in a dtype on a device; empty when they can."""
    if dtype not in DTYPES:
        return [f"dtype must be float16, bfloat16 or float32; got {dtype}"]
    if dtype == torch.bfloat16 and device.type != "cuda" and _INSTALLED and _is_interpreted():
        return ["Triton's interpreter computes no bfloat16 products"]
    return []


# Dynamo cannot trace what these two ask for; the answers do not change within a process.
@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def _capability_reason(index: int | None) -> str:
    # A string, as Dynamo of PyTorch 2.11 cannot compare a constant tuple.
    index = torch.cuda.current_device() if index is None and torch.cuda.is_available() else index
    capability = _read_capability(index)
    if capability is None or capability >= _LOWEST_CAPABILITY:
        return ""
    return f"the GPU must have compute capability 8.0 or more; got {capability[0]}.{capability[1]}"


@cache  # asked for on every call of an operation
def _read_capability(index: int | None) -> tuple[int, int] | None:
    """Of one GPU; None on a machine without one, where only the choice for another machine is asked for."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None
