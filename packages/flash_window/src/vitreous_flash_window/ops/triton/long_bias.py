"""The bias as the kernels for long windows read it: rows padded by minus infinity; fp32 in base 2.

Made once per call, so that the inner loops need not mask it. Reading it again and again from the second-level cache is
what bounds them, so a bias in half precision stays as it is, and is converted where it is used. A table is spread out:
gathering it in every program costs more than that.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of

from .tile_math import in_base_2

_ROW_MULTIPLE = 128
"""Of the length of a row: no kernel's columns reach past it."""

_BLOCK = 64

_LOWEST = tl.constexpr(-2.3e38)
"""Finite, also times log2 e."""


@triton.jit
def _as_read(bias):
    """Fp32 in base 2; half precision as it is, but for what times log2 e would be infinite."""
    if bias.dtype == tl.float32:
        bias = in_base_2(bias)
    elif bias.dtype == tl.bfloat16:
        bias = tl.where(bias == -float("inf"), bias, tl.maximum(bias.to(tl.float32), _LOWEST).to(tl.bfloat16))
    return bias


@triton.jit
def _prepare_bias_kernel(
    bias_ptr, out_ptr, stride_h, stride_q, stride_k, tokens, row_length, TURNED: tl.constexpr, BLOCK: tl.constexpr
):
    """`[H, N, row_length]` from `[H, N, N]`, transposed when `TURNED`. Grid: column blocks, row blocks, heads."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query, key = (column, row) if TURNED else (row, column)
    place = query.to(tl.int64)[:, None] * stride_q + key.to(tl.int64)[None, :] * stride_k
    is_pair = (query < tokens)[:, None] & (key < tokens)[None, :]
    # Read along its rows, whichever way it is written.
    bias = tl.load(bias_ptr + head * stride_h + place, mask=is_pair, other=-float("inf"))
    bias = _as_read(bias)
    if TURNED:
        bias = tl.trans(bias)
    place = (head * tokens + row)[:, None] * row_length + column[None, :]
    tl.store(out_ptr + place, bias, mask=(row < tokens)[:, None] & (column < row_length)[None, :])


@triton.jit
def _spread_table_kernel(
    table_ptr, out_ptr, heads, row_length, SIDE: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr
):
    """`[H, N, row_length]` from a table `[(2 SIDE - 1)^2, H]`; else as `_prepare_bias_kernel`."""
    TOKENS: tl.constexpr = SIDE * SIDE
    head = tl.program_id(2)
    row = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    query, key = (column, row) if TURNED else (row, column)
    y = query // SIDE - key // SIDE + (SIDE - 1)
    x = query % SIDE - key % SIDE + (SIDE - 1)
    is_pair = (row < TOKENS) & (column < TOKENS)
    bias = tl.load(table_ptr + (y * (2 * SIDE - 1) + x) * heads + head, mask=is_pair, other=-float("inf"))
    place = (head.to(tl.int64) * TOKENS + row) * row_length + column
    tl.store(out_ptr + place, _as_read(bias), mask=(row < TOKENS) & (column < row_length))


def prepare_bias(bias: Tensor, turned: bool) -> Tensor:
    """A bias `[H, N, N]`, any strides, as kernels read it, or transposed."""
    heads, tokens, _ = bias.shape
    out, grid = _allocate(heads, tokens, bias.dtype, bias.device)
    with device_of(bias):
        _prepare_bias_kernel[grid](
            bias, out, *bias.stride(), tokens, out.shape[2], TURNED=turned, BLOCK=_BLOCK, num_warps=4
        )
    return out


def spread_table(table: Tensor, side: int, turned: bool) -> Tensor:
    """A table `[(2w - 1)^2, H]` of windows of side w as kernels read the bias, or transposed."""
    heads = table.shape[1]
    table = table.contiguous()
    out, grid = _allocate(heads, side**2, table.dtype, table.device)
    with device_of(table):
        _spread_table_kernel[grid](table, out, heads, out.shape[2], SIDE=side, TURNED=turned, BLOCK=_BLOCK, num_warps=4)
    return out


def _allocate(heads: int, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[int, int, int]]:
    row_length = -(-tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE
    out = torch.empty(heads, tokens, row_length, dtype=dtype, device=device)
    return out, (row_length // _BLOCK, -(-tokens // _BLOCK), heads)
