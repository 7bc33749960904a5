"""Triton kernels of efficient additive attention, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import importlib.util

import torch

from .configs import MOST_CHANNELS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOWEST_CAPABILITY = (8, 0)


def unsupported_reasons(device: torch.device, dtype: torch.dtype, w_dtype: torch.dtype, channels: int) -> list[str]:
    """Why the Triton kernels cannot run this; empty when they can."""
    if not _is_installed():
        return ["the package triton is not installed"]
    reasons = []
    if device.type == "cuda":
        capability = _capability(device.index)
        if capability is not None and capability < _LOWEST_CAPABILITY:
            reasons.append(f"the GPU must have compute capability 8.0 or more; got {capability[0]}.{capability[1]}")
    elif not _is_interpreted():
        reasons.append(f"tensors must be on a CUDA device; got {device.type!r}")
    if dtype not in _DTYPES:
        reasons.append(f"query and key must be float16, bfloat16 or float32; got {dtype}")
    if w_dtype not in _DTYPES:
        reasons.append(f"w_g must be float16, bfloat16 or float32; got {w_dtype}")
    if not 0 < channels <= MOST_CHANNELS:
        reasons.append(f"channels must be from 1 to {MOST_CHANNELS}; got {channels}")
    return reasons


# These ask the environment, which Dynamo cannot trace; no answer changes within a process.
@torch.compiler.assume_constant_result
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    """Of one GPU; None on a machine without one, where only the choice for another machine is asked for."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None
