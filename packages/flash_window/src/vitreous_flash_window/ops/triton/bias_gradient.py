"""Sum of partial bias gradients in a fixed order: no atomics, and reruns agree bitwise."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

_ENTRIES, _PARTS, _WARPS = 32, 64, 4


@triton.jit(do_not_specialize=["parts"])
def _fold_kernel(
    partials_ptr, total_ptr, parts, entries, stride_total, PARTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`total[head] = partials[:, head].sum(0)`. Grid: blocks of entries x heads."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < entries
    total = tl.zeros([PARTS, ENTRIES], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        offset = (part.to(tl.int64) * heads + head)[:, None] * entries + entry[None, :]
        total += tl.load(partials_ptr + offset, mask=(part < parts)[:, None] & is_entry[None, :], other=0.0)
    to = total_ptr + head * stride_total + entry
    tl.store(to, tl.sum(total, 0).to(total_ptr.dtype.element_ty), mask=is_entry)


def fold_rows(partials: Tensor, total: Tensor, first: int) -> None:
    """Write the sum of partial tiles to some rows of a bias gradient, rounded once.

    Args:
        partials: fp32 `[parts, H, rows, N]`, contiguous.
        total: `[H, N, N]`, contiguous, any floating dtype: written in rows `first` to `first + rows`.
    """
    parts, heads, rows, tokens = partials.shape
    entries = rows * tokens
    with device_of(partials):
        launch_kernel(
            _fold_kernel, (triton.cdiv(entries, _ENTRIES), heads), (partials, total[:, first:]),
            (parts, entries, total.stride(0)), {"PARTS": _PARTS, "ENTRIES": _ENTRIES, "num_warps": _WARPS},
        )  # fmt: skip


def fold_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum fp32 partial results `[parts, ...]`, contiguous, over the first dimension; rounded once, to `dtype`."""
    parts, *shape = partials.shape
    total = torch.empty(shape, dtype=dtype, device=partials.device)
    fold_rows(partials.view(parts, 1, -1, 1), total.view(1, -1, 1), 0)
    return total
