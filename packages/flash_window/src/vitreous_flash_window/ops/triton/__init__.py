"""Triton kernels of window attention, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import torch

from vitreous_core.triton_support import device_reasons, dtype_reasons

_LARGEST_HEAD_DIM = 256


def unsupported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int, mask_needs_grad: bool) -> list[str]:
    """Why the Triton kernels cannot run this; empty when they can."""
    reasons = device_reasons(device) + dtype_reasons(device, dtype)
    if head_dim % 4 or not 0 < head_dim <= _LARGEST_HEAD_DIM:
        reasons.append(f"head_dim must be a multiple of 4 from 4 to {_LARGEST_HEAD_DIM}; got {head_dim}. Pad the heads")
    if mask_needs_grad:
        reasons.append("the kernels compute no gradient of a mask: detach it, or pass it as the bias")
    return reasons
