"""Triton kernels of block-sparse attention, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

from torch import Tensor

from ....layout import BlockLayout
from ....schedule import IMAGE
from ....triton_support import device_reasons, dtype_reasons

_LARGEST_HEAD_DIM = 256
_LARGEST_DIVIDEND = 2**30
"""See `primitives.divide`: cells of a rectangle times its width stay below this."""


def unsupported_reasons(
    query: Tensor, head_dim: int, layout: BlockLayout, needs_grad: bool, dropout_p: float = 0.0
) -> list[str]:
    """Why the Triton kernels cannot run this; empty when they can. Of the query, device and dtype count."""
    reasons = device_reasons(query.device) + dtype_reasons(query.device, query.dtype)
    if head_dim % 8 or head_dim > _LARGEST_HEAD_DIM:
        reasons.append(f"head_dim must be a multiple of 8 up to {_LARGEST_HEAD_DIM}; got {head_dim}. Pad the heads")
    if layout.schedule.geometry == IMAGE and layout.length * layout.width >= _LARGEST_DIVIDEND:
        reasons.append(f"height * width^2 must be below 2^30; got {layout.height} x {layout.width}. Turn the image")
    return reasons
