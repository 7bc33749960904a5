"""Sum of partial bias gradients in a fixed order: no atomics, and reruns agree bitwise."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import device_of

_ENTRIES, _PARTS, _WARPS = 32, 64, 4


@triton.jit(do_not_specialize=["parts"])
def _fold_kernel(partials_ptr, total_ptr, parts, entries, PARTS: tl.constexpr, ENTRIES: tl.constexpr):
    """`total = partials.sum(0)`. Grid: blocks of entries."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < entries
    total = tl.zeros([PARTS, ENTRIES], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        offset = part.to(tl.int64)[:, None] * entries + entry[None, :]
        total += tl.load(partials_ptr + offset, mask=(part < parts)[:, None] & is_entry[None, :], other=0.0)
    tl.store(total_ptr + entry, tl.sum(total, 0).to(total_ptr.dtype.element_ty), mask=is_entry)


def fold_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum fp32 partial tiles `[parts, ...]`, contiguous, over the first dimension; rounded once, to `dtype`."""
    parts, *shape = partials.shape
    total = torch.empty(shape, dtype=dtype, device=partials.device)
    with device_of(partials):
        _fold_kernel[(triton.cdiv(total.numel(), _ENTRIES),)](
            partials, total, parts, total.numel(), PARTS=_PARTS, ENTRIES=_ENTRIES, num_warps=_WARPS
        )
    return total
