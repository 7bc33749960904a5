"""Host-side arguments that the launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_ALIGNMENTS = (8, 4, 2)


def strides_of(*tensors: Tensor) -> tuple[int, list[int]]:
    """A number that divides the strides of images and tokens, and the strides as kernels take them.

    Triton knows of an integer only whether 16 divides it. Kernels take strides over the number, a constant at compile
    time, and multiply: rows of 56 or 220 channels are then read in vectors too. The stride of an only entry, which may
    be anything, is 0.

    Args:
        tensors: `[B, L, D]` each.

    Returns:
        8, 4, 2 or 1; for each tensor the strides of images and tokens over that number, and that of channels.
    """
    outer = [
        stride if size > 1 else 0
        for tensor in tensors
        for size, stride in zip(tensor.shape[:2], tensor.stride()[:2], strict=True)
    ]
    align = next((number for number in _ALIGNMENTS if all(stride % number == 0 for stride in outer)), 1)
    strides = []
    for i, tensor in enumerate(tensors):
        strides += [outer[2 * i] // align, outer[2 * i + 1] // align, tensor.stride(2)]
    return align, strides


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's GPU; one in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def shared_memory(tensor: Tensor) -> int:
    """Bytes that a program on the tensor's GPU can have; no bound in the interpreter."""
    if not tensor.is_cuda:
        return 1 << 30
    size: int = torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
    return size


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, as launches need; nothing to do on a CPU (the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
