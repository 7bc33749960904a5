"""Triton kernels of window attention, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import importlib.util

import torch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256
_LOWEST_CAPABILITY = (8, 0)


def unsupported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int, mask_needs_grad: bool) -> list[str]:
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
    elif dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes no bfloat16 products")
    if dtype not in _DTYPES:
        reasons.append(f"dtype must be float16, bfloat16 or float32; got {dtype}")
    if head_dim % 4 or not 0 < head_dim <= _LARGEST_HEAD_DIM:
        reasons.append(f"head_dim must be a multiple of 4 from 4 to {_LARGEST_HEAD_DIM}; got {head_dim}. Pad the heads")
    if mask_needs_grad:
        reasons.append("the kernels compute no gradient of a mask: detach it, or pass it as the bias")
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
