"""Depthwise convolution and FFN in one kernel, hidden activations on chip; `../README.md` explains the design."""

# mypy: ignore-errors

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import FeedForwardWeights
from . import resources
from .configs import feed_forward_tile, precision, split_channels


@triton.jit
def _feed_forward_kernel(
    x_ptr, local_weight_ptr, local_bias_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr, out_ptr,
    cells, height, width,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, HAS_LOCAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of cells. The channels are two blocks, the second empty if `BLOCK_B` is 0: 384 is 256 + 128."""
    dtype = x_ptr.dtype.element_ty
    cell = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_a = tl.arange(0, BLOCK_A)
    tokens_a = _load_tokens(
        x_ptr, local_weight_ptr, local_bias_ptr, cell, offs_a, cells, height, width, CHANNELS, HAS_LOCAL
    )  # fmt: skip
    sum_a = tokens_a.to(tl.float32) + _load_row(out_bias_ptr, offs_a, CHANNELS)
    if BLOCK_B > 0:
        offs_b = BLOCK_A + tl.arange(0, BLOCK_B)
        tokens_b = _load_tokens(
            x_ptr, local_weight_ptr, local_bias_ptr, cell, offs_b, cells, height, width, CHANNELS, HAS_LOCAL
        )  # fmt: skip
        sum_b = tokens_b.to(tl.float32) + _load_row(out_bias_ptr, offs_b, CHANNELS)
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
    is_cell = (cell < cells)[:, None]
    place = out_ptr + cell[:, None] * CHANNELS
    tl.store(place + offs_a[None, :], sum_a.to(dtype), mask=is_cell & (offs_a < CHANNELS)[None, :])
    if BLOCK_B > 0:
        tl.store(place + offs_b[None, :], sum_b.to(dtype), mask=is_cell & (offs_b < CHANNELS)[None, :])


@triton.jit
def _load_tokens(
    x_ptr, weight_ptr, bias_ptr, cell, channel, cells, height, width, CHANNELS: tl.constexpr, HAS_LOCAL: tl.constexpr
):  # fmt: skip
    """Channels of cells, after the depthwise 3x3 convolution if there is one; rounded, as a separate layer would."""
    is_channel = (channel < CHANNELS)[None, :]
    place = cell[:, None] * CHANNELS + channel[None, :]
    if HAS_LOCAL:
        y, x = cell // width % height, cell % width
        tokens = tl.zeros(place.shape, tl.float32) + _load_row(bias_ptr, channel, CHANNELS)
        for row in range(3):
            # The loads of a row wait together.
            for column in tl.static_range(3):
                dy, dx = row - 1, column - 1
                is_there = (cell < cells) & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
                neighbour = tl.load(
                    x_ptr + place + (dy * width + dx) * CHANNELS, mask=is_there[:, None] & is_channel, other=0.0
                )  # fmt: skip
                tap = _load_row(weight_ptr + (row * 3 + column) * CHANNELS, channel, CHANNELS)
                tokens += neighbour.to(tl.float32) * tap
        tokens = tokens.to(x_ptr.dtype.element_ty)
    else:
        tokens = tl.load(x_ptr + place, mask=(cell < cells)[:, None] & is_channel, other=0.0)
    return tokens


@triton.jit
def _load_row(pointer, offs, SIZE: tl.constexpr):
    """`[1, BLOCK]` in fp32, zero from `SIZE` on."""
    return tl.load(pointer + offs, mask=offs < SIZE, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_transposed(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[BLOCK_COLUMNS, BLOCK_ROWS]` of a matrix `[ROWS, COLUMNS]`, zero outside."""
    mask = (rows < ROWS)[None, :] & (columns < COLUMNS)[:, None]
    return tl.load(pointer + rows[None, :] * COLUMNS + columns[:, None], mask=mask, other=0.0)


def launch_feed_forward(x: Tensor, weights: FeedForwardWeights) -> Tensor:
    """The operator; the result is channels-last, and so is `x` unless a copy is made."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    cells = batch * height * width
    if not cells:
        return out
    block_a, block_b = split_channels(channels)
    tile = feed_forward_tile(x.dtype, cells, channels, *resources(x.device))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _feed_forward_kernel[(triton.cdiv(cells, tile.rows),)](
            x, *weights, out, cells, height, width,
            CHANNELS=channels, HIDDEN=weights.in_bias.shape[0], HAS_LOCAL=weights.local_weight is not None,
            BLOCK_M=tile.rows, BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_H=tile.hidden, PRECISION=precision(x.dtype),
            STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out
