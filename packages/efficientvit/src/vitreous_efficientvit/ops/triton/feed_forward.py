"""Depthwise convolution and FFN in one kernel, hidden activations on chip; `../README.md` explains the design."""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from ..weights import FeedForwardWeights
from . import resources
from .configs import PLANS, Launch, feed_forward_tile, precision, split_channels


@triton.jit
def _feed_forward_kernel(
    x_ptr, local_weight_ptr, local_bias_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr, out_ptr,
    cells, height, width,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, HAS_LOCAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of cells. The channels are two blocks, the second empty if `BLOCK_B` is 0: 384 is 256 + 128."""
    dtype = x_ptr.dtype.element_ty
    # 64-bit once for the tile; within it 32 bits do.
    start = tl.program_id(0) * BLOCK_M
    x_tile, out_tile = x_ptr + start.to(tl.int64) * CHANNELS, out_ptr + start.to(tl.int64) * CHANNELS
    row = tl.arange(0, BLOCK_M)
    rows = cells - start
    offs_a = tl.arange(0, BLOCK_A)
    offs_b = BLOCK_A + tl.arange(0, max(BLOCK_B, 1))
    source = x_tile
    if HAS_LOCAL:
        # Few channels at a time, as registers do not hold nine neighbours of all. This program's rows of the output
        # keep them meanwhile.
        source = out_tile
        for first in tl.range(0, CHANNELS, BLOCK_L, num_stages=1):
            offs_l = first + tl.arange(0, BLOCK_L)
            tokens = _convolve(
                x_tile, local_weight_ptr, local_bias_ptr, start, row, offs_l, cells, height, width, CHANNELS
            )  # fmt: skip
            _store_rows(out_tile, row, offs_l, rows, CHANNELS, tokens.to(dtype))
        tl.debug_barrier()
    tokens_a = _load_rows(source, row, offs_a, rows, CHANNELS)
    sum_a = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
    if BLOCK_B > 0:
        tokens_b = _load_rows(source, row, offs_b, rows, CHANNELS)
        sum_b = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
    for first in tl.range(0, HIDDEN, BLOCK_H, num_stages=STAGES):
        offs_h = first + tl.arange(0, BLOCK_H)
        # Weights [HIDDEN, CHANNELS] and [CHANNELS, HIDDEN], both read transposed.
        hidden = tl.dot(
            tokens_a, _load_transposed(in_weight_ptr, offs_h, offs_a, HIDDEN, CHANNELS), input_precision=PRECISION
        )  # fmt: skip
        if BLOCK_B > 0:
            hidden = tl.dot(
                tokens_b, _load_transposed(in_weight_ptr, offs_h, offs_b, HIDDEN, CHANNELS), hidden,
                input_precision=PRECISION,
            )  # fmt: skip
        hidden += _load_row(in_bias_ptr, offs_h, HIDDEN)
        hidden = tl.maximum(hidden, 0.0).to(dtype)
        sum_a = tl.dot(
            hidden, _load_transposed(out_weight_ptr, offs_a, offs_h, CHANNELS, HIDDEN), sum_a, input_precision=PRECISION
        )  # fmt: skip
        if BLOCK_B > 0:
            sum_b = tl.dot(
                hidden, _load_transposed(out_weight_ptr, offs_b, offs_h, CHANNELS, HIDDEN), sum_b,
                input_precision=PRECISION,
            )  # fmt: skip
    # Read before any of it is overwritten.
    sum_a += _load_rows(source, row, offs_a, rows, CHANNELS).to(tl.float32) + _load_row(out_bias_ptr, offs_a, CHANNELS)
    if BLOCK_B > 0:
        sum_b += _load_rows(source, row, offs_b, rows, CHANNELS).to(tl.float32)
        sum_b += _load_row(out_bias_ptr, offs_b, CHANNELS)
    if HAS_LOCAL:
        tl.debug_barrier()
    _store_rows(out_tile, row, offs_a, rows, CHANNELS, sum_a.to(dtype))
    if BLOCK_B > 0:
        _store_rows(out_tile, row, offs_b, rows, CHANNELS, sum_b.to(dtype))


@triton.jit
def _convolve(
    x_tile, weight_ptr, bias_ptr, start, row, channel, cells, height, width, CHANNELS: tl.constexpr
):  # fmt: skip
    """The depthwise 3x3 convolution of channels of the tile's cells, in fp32."""
    is_channel = (channel < CHANNELS)[None, :]
    cell = start + row
    y, x = cell // width % height, cell % width
    total = tl.zeros([row.shape[0], channel.shape[0]], tl.float32) + _load_row(bias_ptr, channel, CHANNELS)
    for tap in tl.static_range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        is_there = (cell < cells) & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        neighbour = tl.load(
            x_tile + ((row + dy * width + dx) * CHANNELS)[:, None] + channel[None, :],
            mask=is_there[:, None] & is_channel, other=0.0,
        )  # fmt: skip
        total += neighbour.to(tl.float32) * _load_row(weight_ptr + tap * CHANNELS, channel, CHANNELS)
    return total


@triton.jit
def _load_rows(tile, row, channel, rows, CHANNELS: tl.constexpr):
    """Channels of the tile's cells, zero outside."""
    mask = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(tile + (row * CHANNELS)[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(tile, row, channel, rows, CHANNELS: tl.constexpr, values):
    """Write channels of the tile's cells."""
    mask = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(tile + (row * CHANNELS)[:, None] + channel[None, :], values, mask=mask)


@triton.jit
def _load_row(pointer, offs, SIZE: tl.constexpr):
    """`[1, BLOCK]` in fp32, zero from `SIZE` on."""
    return tl.load(pointer + offs, mask=offs < SIZE, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_transposed(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[BLOCK_COLUMNS, BLOCK_ROWS]` of a matrix `[ROWS, COLUMNS]`, zero outside."""
    place = pointer + rows[None, :] * COLUMNS + columns[:, None]
    # The interpreter passes sizes as plain numbers.
    if tl.constexpr(ROWS) % rows.shape[0] == 0 and tl.constexpr(COLUMNS) % columns.shape[0] == 0:
        # Blocks of one size from zero on, or the two of the channels, of which the first is a multiple of the second.
        return tl.load(place)
    else:
        return tl.load(place, mask=(rows < ROWS)[None, :] & (columns < COLUMNS)[:, None], other=0.0)


@lru_cache(maxsize=PLANS)
def _plan(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, products: str, hidden: int, has_local: bool
) -> Launch:  # fmt: skip
    batch, channels, height, width = shape
    cells = batch * height * width
    block_a, block_b = split_channels(channels)
    tile = feed_forward_tile(dtype, cells, channels, *resources(device))
    constants = {
        "CHANNELS": channels, "HIDDEN": hidden, "HAS_LOCAL": has_local, "BLOCK_M": tile.rows, "BLOCK_A": block_a,
        "BLOCK_B": block_b, "BLOCK_H": tile.hidden, "BLOCK_L": min(block_a, tile.local), "PRECISION": products,
        "STAGES": tile.stages, "num_warps": tile.warps,
    }  # fmt: skip
    return Launch((triton.cdiv(cells, tile.rows),), (cells, height, width), constants)


def launch_feed_forward(x: Tensor, weights: FeedForwardWeights) -> Tensor:
    """The operator; the result is channels-last, and so is `x` unless a copy is made."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return out
    hidden, has_local = weights.in_bias.shape[0], weights.local_weight is not None
    launch = _plan(x.shape, x.dtype, x.device, precision(x.dtype), hidden, has_local)
    with device_of(x):
        launch_kernel(_feed_forward_kernel, launch.grid, (x, *weights, out), *launch[1:])
    return out
