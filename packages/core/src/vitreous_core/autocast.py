"""Autocast as operations meet it: which dtype it asks for now, and how to keep it away from an fp32 computation."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on a device; None where it is off or the device (such as "meta") has none."""
    if not _has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def to_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast asks for; as PyTorch's own rules have it, fp64 and integers stay."""
    dtype = autocast_dtype(tensor.device)
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast does not take promoted operands on the tensor's device back to the low dtype."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if _has_autocast(kind) else contextlib.nullcontext()


# Dynamo of PyTorch 2.11 cannot trace the question.
@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
