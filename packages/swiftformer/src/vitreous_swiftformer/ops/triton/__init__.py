"""Triton kernels of additive attention and, for inference, of blocks and convolutions: NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import torch

from vitreous_core.triton_support import DTYPES, device_reasons

from .configs import MOST_CHANNELS, MOST_MLP_CHANNELS, takes_mlp


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


def mlp_unsupported_reasons(
    device: torch.device, dtypes: tuple[torch.dtype, ...], channels: int, needs_grad: bool
) -> list[str]:
    """Why the kernel of two 1x1 convolutions cannot run this; empty when it can."""
    reasons = _inference_reasons(device, dtypes, needs_grad)
    if not takes_mlp(channels):
        reasons.append(f"channels must be a multiple of 4 from 4 to {MOST_MLP_CHANNELS}; got {channels}")
    return reasons


def halving_unsupported_reasons(
    device: torch.device, dtypes: tuple[torch.dtype, ...], needs_grad: bool
) -> list[str]:  # fmt: skip
    """Why the kernel of convolutions of stride 2 cannot run this; empty when it can."""
    return _inference_reasons(device, dtypes, needs_grad)


def _inference_reasons(device: torch.device, dtypes: tuple[torch.dtype, ...], needs_grad: bool) -> list[str]:
    reasons = device_reasons(device)
    if dtypes[0] not in (torch.float16, torch.bfloat16) or any(dtype != dtypes[0] for dtype in dtypes):
        names = ", ".join(sorted({str(dtype) for dtype in dtypes}))
        reasons.append(f"maps and weights must be all float16 or all bfloat16; got {names}")
    elif device.type != "cuda" and torch.bfloat16 in dtypes:
        reasons.append("Triton's interpreter computes no bfloat16 products")
    if needs_grad:
        reasons.append("the kernel is for inference and has no derivative: use torch.no_grad()")
    return reasons
