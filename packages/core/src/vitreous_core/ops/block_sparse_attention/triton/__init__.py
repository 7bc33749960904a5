"""Triton kernels of block-sparse attention, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ....layout import BlockLayout
from ....schedule import IMAGE

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256
_LOWEST_CAPABILITY = (8, 0)
_LARGEST_DIVIDEND = 2**30
"""See `primitives.divide`: cells of a rectangle times its width stay below this."""


def unsupported_reasons(query: Tensor, layout: BlockLayout, needs_grad: bool, dropout_p: float = 0.0) -> list[str]:
    """Why the Triton kernels cannot run this; empty when they can."""
    if not _is_installed():
        return ["the package triton is not installed"]
    reasons = []
    if query.is_cuda:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < _LOWEST_CAPABILITY:
            reasons.append(f"the GPU must have compute capability 8.0 or more; got {capability[0]}.{capability[1]}")
    elif not _is_interpreted():
        reasons.append(f"tensors must be on a CUDA device; got {query.device}")
    elif query.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes no bfloat16 products")
    if query.dtype not in _DTYPES:
        reasons.append(f"dtype must be float16, bfloat16 or float32; got {query.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > _LARGEST_HEAD_DIM:
        reasons.append(
            f"head_dim must be a multiple of 8 up to {_LARGEST_HEAD_DIM}; got {query.shape[-1]}. Pad the heads"
        )
    if layout.schedule.geometry == IMAGE and layout.length * layout.width >= _LARGEST_DIVIDEND:
        reasons.append(f"height * width^2 must be below 2^30; got {layout.height} x {layout.width}. Turn the image")
    return reasons


# These two ask the environment, which Dynamo cannot trace; neither answer changes within a process.
@torch.compiler.assume_constant_result
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
