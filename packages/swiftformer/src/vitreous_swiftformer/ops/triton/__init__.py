"""Triton kernels of additive attention and of the convolutional block, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import torch

from vitreous_core.triton_support import DTYPES, device_reasons

from .configs import MOST_CHANNELS, takes_encoder


def unsupported_reasons(device: torch.device, dtype: torch.dtype, w_dtype: torch.dtype, channels: int) -> list[str]:
    """Why the kernels of additive attention cannot run this; empty when they can."""
    reasons = device_reasons(device)
    if dtype not in DTYPES:
        reasons.append(f"query and key must be float16, bfloat16 or float32; got {dtype}")
    if w_dtype not in DTYPES:
        reasons.append(f"w_g must be float16, bfloat16 or float32; got {w_dtype}")
    if not 0 < channels <= MOST_CHANNELS:
        reasons.append(f"channels must be from 1 to {MOST_CHANNELS}; got {channels}")
    return reasons


def encoder_unsupported_reasons(
    device: torch.device, dtypes: tuple[torch.dtype, ...], channels: int, needs_grad: bool
) -> list[str]:
    """Why the kernel of the convolutional block cannot run this; empty when it can."""
    reasons = device_reasons(device)
    if dtypes[0] not in (torch.float16, torch.bfloat16) or any(dtype != dtypes[0] for dtype in dtypes):
        names = ", ".join(sorted({str(dtype) for dtype in dtypes}))
        reasons.append(f"image and weights must be all float16 or all bfloat16; got {names}")
    elif device.type != "cuda" and torch.bfloat16 in dtypes:
        reasons.append("Triton's interpreter computes no bfloat16 products")
    if not takes_encoder(channels):
        reasons.append(f"channels must be a multiple of 8 from 8 to 256; got {channels}")
    if needs_grad:
        reasons.append("the kernel is for inference and has no derivative: use torch.no_grad()")
    return reasons
