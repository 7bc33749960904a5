"""Triton kernels of EfficientViT, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

from functools import cache

import torch


@cache
def resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have; one H100's share in the interpreter."""
    if device.type != "cuda":
        return 1, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
