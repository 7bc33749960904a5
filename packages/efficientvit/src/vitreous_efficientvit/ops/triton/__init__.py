"""Triton kernels of EfficientViT's inference, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOWEST_CAPABILITY = (8, 0)


def device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the kernels cannot run on this device in this dtype; empty when they can."""
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
    return reasons + dtype_reasons(dtype)


def dtype_reasons(dtype: torch.dtype) -> list[str]:
    """Why the kernels cannot compute in this dtype; empty when they can."""
    return [] if dtype in _DTYPES else [f"dtype must be float16, bfloat16 or float32; got {dtype}"]


@cache
def resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have; one H100's share in the interpreter."""
    if device.type != "cuda":
        return 1, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


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
    """Of one GPU; None on a machine without one, where nothing can run anyway."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None
