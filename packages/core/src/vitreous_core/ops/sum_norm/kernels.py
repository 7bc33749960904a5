"""Triton kernels of `sum_norm`: several rows at a time, statistics in registers, no atomics."""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernel_launch import device_of, launch_kernel

_ELEMENTS = 4096
"""Of a tile in the forward; the backward, which holds three tensors of it, has half."""

_MOST_PROGRAMS, _MOST_PARTIAL_CHANNELS = 12, 8192
"""Per multiprocessor in the backward, whose programs walk over rows and each leave one partial sum of the parameters'
gradients: programs, and channels of all of them together, which bounds the workspace."""


@triton.jit
def _sum_norm_fwd_kernel(
    shortcut_ptr, branch_ptr, factor_ptr, weight_ptr, bias_ptr, tokens_ptr, normed_ptr, rows, rows_per_sample, eps,
    HAS_BRANCH: tl.constexpr, HAS_FACTOR: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < CHANNELS)[None, :]
    offs = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    tokens = tl.load(shortcut_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            branch *= tl.load(factor_ptr + row // rows_per_sample, mask=row < rows, other=0.0)[:, None]
        rounded = (tokens + branch).to(tokens_ptr.dtype.element_ty)
        tl.store(tokens_ptr + offs, rounded, mask=mask)
        tokens = rounded.to(tl.float32)
    centred = tl.where(mask, tokens - (tl.sum(tokens, 1) / CHANNELS)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / CHANNELS + eps)
    weight = tl.load(weight_ptr + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_norm_bwd_kernel(
    dtokens_ptr, dnormed_ptr, tokens_ptr, factor_ptr, weight_ptr, dshortcut_ptr, dbranch_ptr, partial_ptr,
    rows, rows_per_sample, eps,
    HAS_DTOKENS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_FACTOR: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: programs that walk over the tiles of rows. Partial sums `[programs, 2, BLOCK_C]` of dweight and dbias."""
    column = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    # Summed over rows once at the end: sums across warps cost barriers.
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (column < CHANNELS)[None, :]
        offs = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
        tokens = tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dnormed = tl.load(dnormed_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, tokens - (tl.sum(tokens, 1) / CHANNELS)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / CHANNELS + eps)
        unit = centred * rstd[:, None]
        dweight += dnormed * unit
        dbias += dnormed
        dunit = dnormed * weight[None, :]
        along = tl.sum(dunit * unit, 1) / CHANNELS
        gradient = (dunit - (tl.sum(dunit, 1) / CHANNELS)[:, None] - unit * along[:, None]) * rstd[:, None]
        if HAS_DTOKENS:
            gradient += tl.load(dtokens_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dshortcut_ptr + offs, gradient.to(dshortcut_ptr.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            if HAS_FACTOR:
                gradient *= tl.load(factor_ptr + row // rows_per_sample, mask=row < rows, other=0.0)[:, None]
            tl.store(dbranch_ptr + offs, gradient.to(dbranch_ptr.dtype.element_ty), mask=mask)
    slot = partial_ptr + tl.program_id(0) * 2 * BLOCK_C + column
    tl.store(slot, tl.sum(dweight, 0))
    tl.store(slot + BLOCK_C, tl.sum(dbias, 0))


def launch_forward(
    shortcut: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, factor: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens (`shortcut` itself without a branch) and norm."""
    shortcut = shortcut.contiguous()
    tokens = shortcut if branch is None else torch.empty_like(shortcut)
    normed = torch.empty_like(shortcut, dtype=dtype)
    rows, channels, block = _shape(shortcut)
    if not rows:
        return tokens, normed
    block_r = max(_ELEMENTS // block, 1)
    constants = {
        "HAS_BRANCH": branch is not None, "HAS_FACTOR": factor is not None, "CHANNELS": channels, "BLOCK_C": block,
        "BLOCK_R": block_r, "num_warps": 4,
    }  # fmt: skip
    with device_of(shortcut):
        launch_kernel(
            _sum_norm_fwd_kernel, (-(-rows // block_r),),
            (shortcut, None if branch is None else branch.contiguous(), factor, weight, bias, tokens, normed),
            (rows, rows // shortcut.shape[0], float(eps)), constants,
        )  # fmt: skip
    return tokens, normed


def launch_backward(
    dtokens: Tensor | None, dnormed: Tensor | None, tokens: Tensor, weight: Tensor, bias: Tensor,
    factor: Tensor | None, eps: float, branch_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of shortcut, branch (None without one), weight and bias."""
    if dnormed is None:
        dnormed = torch.zeros_like(tokens)
    dshortcut = torch.empty_like(tokens)
    dbranch = None if branch_dtype is None else torch.empty_like(tokens, dtype=branch_dtype)
    rows, channels, block = _shape(tokens)
    if not rows:
        return dshortcut, dbranch, torch.zeros_like(weight), torch.zeros_like(bias)
    block_r = max(_ELEMENTS // 2 // block, 1)
    per_multiprocessor = max(1, min(_MOST_PROGRAMS, _MOST_PARTIAL_CHANNELS // block))
    programs = min(-(-rows // block_r), _multiprocessors(tokens.device) * per_multiprocessor)
    partial = tokens.new_empty((programs, 2, block), dtype=torch.float32)
    constants = {
        "HAS_DTOKENS": dtokens is not None, "HAS_BRANCH": dbranch is not None, "HAS_FACTOR": factor is not None,
        "CHANNELS": channels, "BLOCK_C": block, "BLOCK_R": block_r, "num_warps": 4,
    }  # fmt: skip
    with device_of(tokens):
        launch_kernel(
            _sum_norm_bwd_kernel, (programs,),
            (
                None if dtokens is None else dtokens.contiguous(), dnormed.contiguous(), tokens, factor, weight,
                dshortcut, dbranch, partial,
            ),
            (rows, rows // tokens.shape[0], float(eps)), constants,
        )  # fmt: skip
    dweight, dbias = partial.sum(0)[:, :channels].unbind(0)
    return dshortcut, dbranch, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _shape(tokens: Tensor) -> tuple[int, int, int]:
    """Rows, channels, and the power of two that holds the channels."""
    channels = tokens.shape[-1]
    return tokens.numel() // max(channels, 1), channels, 1 << max(channels - 1, 0).bit_length()


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
