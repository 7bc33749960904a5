"""Gradients of depthwise convolutions without bias; `../README.md` explains the design.

A program walks over a run of cells, as many at a time as give each thread four channels: neighbours come from the
caches, nine weights and the sums of their gradients stay in registers. The forward is cuDNN's, near what memory allows.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton joins tuples and does not unpack them)

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from ..convolution_contract import convolve_by_torch, pixel_of
from . import resources
from .configs import PLANS, Launch, depthwise_walk


@triton.jit(do_not_specialize=["cells", "walk"])
def _depthwise_bwd_kernel(
    x_ptr, weight_ptr, dout_ptr, dx_ptr, partial_ptr, x_pixel, height, width, cells, walk,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of stride 1. Grid: runs of `walk` tiles of cells, blocks of channels, groups of `ROWS` rows of taps.

    Each tap of an input cell belongs to one output cell, whose gradient goes into both sums. The input's gradient is
    made where its pointer is not None, which needs all rows of taps; the weight's likewise.

    Args:
        x_pixel: elements between two cells of x.
    """
    PADDING: tl.constexpr = SIDE // 2
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    first_row = tl.program_id(2) * ROWS
    weights, sums = _weights_and_sums(weight_ptr, channel, dx_ptr, partial_ptr, CHANNELS, SIDE, ROWS, BLOCK_M, BLOCK_C)
    for tile in tl.range(walk, num_stages=1):
        cell = (tl.program_id(0) * walk + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_cell = cell < cells
        x = cell % width + PADDING
        y = cell // width % height + PADDING - first_row
        is_inside = is_cell[:, None] & is_channel[None, :]
        if partial_ptr is not None:
            own = tl.load(x_ptr + (cell.to(tl.int64) * x_pixel)[:, None] + channel, mask=is_inside, other=0.0)
            own = own.to(tl.float32)
        first = (cell + (PADDING - first_row) * width + PADDING).to(tl.int64) * CHANNELS
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        added = ()
        for tap in tl.static_range(ROWS * SIDE):
            out_y, out_x = y - tap // SIDE, x - tap % SIDE
            is_there = is_cell & (out_y >= 0) & (out_y < height) & (out_x >= 0) & (out_x < width)
            place = first - (tap // SIDE * width + tap % SIDE) * CHANNELS
            gradient = tl.load(
                dout_ptr + place[:, None] + channel, mask=is_there[:, None] & is_channel[None, :], other=0.0
            ).to(tl.float32)  # fmt: skip
            if dx_ptr is not None:
                total += gradient * weights[tap][None, :]
            if partial_ptr is not None:
                added = added + (sums[tap] + gradient * own,)
        if partial_ptr is not None:
            sums = added
        if dx_ptr is not None:
            place = dx_ptr + (cell.to(tl.int64) * CHANNELS)[:, None] + channel
            tl.store(place, total.to(dx_ptr.dtype.element_ty), mask=is_inside)
    _store_sums(partial_ptr, sums, channel, first_row, CHANNELS, SIDE, ROWS)


@triton.jit(do_not_specialize=["cells", "walk"])
def _halved_bwd_kernel(
    x_ptr, weight_ptr, dout_ptr, dx_ptr, partial_ptr, x_pixel, height, width, out_height, out_width, cells, walk,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of 3x3 and stride 2. Grid: runs of `walk` tiles of output cells, blocks of channels.

    An output cell stands for a square of two by two input cells. Those see it and the cells right of it, below and
    both: the left column of the square by the middle taps, the right one by the last of the cell and the first of the
    next.
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = (channel < CHANNELS)[None, :]
    weights, sums = _weights_and_sums(weight_ptr, channel, dx_ptr, partial_ptr, CHANNELS, 3, 3, BLOCK_M, BLOCK_C)
    for tile in tl.range(walk, num_stages=1):
        cell = (tl.program_id(0) * walk + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        x, y = cell % out_width, cell // out_width % out_height
        corner = ((cell // (out_width * out_height)) * height + 2 * y).to(tl.int64) * width + 2 * x
        gradients = ()
        for step in tl.static_range(4):
            is_there = (cell < cells) & (y + step // 2 < out_height) & (x + step % 2 < out_width)
            place = (cell + step // 2 * out_width + step % 2).to(tl.int64) * CHANNELS
            gradient = tl.load(dout_ptr + place[:, None] + channel, mask=is_there[:, None] & is_channel, other=0.0)
            gradients = gradients + (gradient.to(tl.float32),)
        owns = ()
        for square in tl.static_range(4):
            is_there = (cell < cells) & (2 * y + square // 2 < height) & (2 * x + square % 2 < width)
            is_inside = is_there[:, None] & is_channel
            pixel = corner + square // 2 * width + square % 2
            if partial_ptr is not None:
                own = tl.load(x_ptr + (pixel * x_pixel)[:, None] + channel, mask=is_inside, other=0.0)
                owns = owns + (own.to(tl.float32),)
            if dx_ptr is not None:
                total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
                for tap in tl.static_range(9):
                    if (tap // 3 != 1) * 2 + (tap % 3 != 1) == square:
                        total += gradients[(tap // 3 == 0) * 2 + (tap % 3 == 0)] * weights[tap][None, :]
                place = dx_ptr + (pixel * CHANNELS)[:, None] + channel
                tl.store(place, total.to(dx_ptr.dtype.element_ty), mask=is_inside)
        if partial_ptr is not None:
            added = ()
            for tap in tl.static_range(9):
                own = owns[(tap // 3 != 1) * 2 + (tap % 3 != 1)]
                added = added + (sums[tap] + gradients[(tap // 3 == 0) * 2 + (tap % 3 == 0)] * own,)
            sums = added
    _store_sums(partial_ptr, sums, channel, 0, CHANNELS, 3, 3)


@triton.jit
def _weights_and_sums(
    weight_ptr, channel, dx_ptr, partial_ptr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The weights of the taps in fp32, where the input's gradient needs them, and zeros for their gradients."""
    weights = ()
    sums = ()
    for tap in tl.static_range(ROWS * SIDE):
        if dx_ptr is not None:
            weight = tl.load(weight_ptr + channel * (SIDE * SIDE) + tap, mask=channel < CHANNELS, other=0.0)
            weights = weights + (weight.to(tl.float32),)
        if partial_ptr is not None:
            sums = sums + (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)
    return weights, sums


@triton.jit
def _store_sums(partial_ptr, sums, channel, first_row, CHANNELS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """Write what a program has summed of the weight's gradient."""
    if partial_ptr is not None:
        partial = partial_ptr + (tl.program_id(0) * CHANNELS + channel) * (SIDE * SIDE) + first_row * SIDE
        for tap in tl.static_range(ROWS * SIDE):
            tl.store(partial + tap, tl.sum(sums[tap], 0), mask=channel < CHANNELS)


def launch_backward(
    dout: Tensor, x: Tensor, weight: Tensor, stride: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input, channels-last, and of the weight, `[C, 1, k, k]`; `[0]` where not needed."""
    if not dout.numel():
        dx = torch.empty_like(x, memory_format=torch.channels_last) if needs_x else x.new_empty(0)
        return dx, torch.zeros_like(weight) if needs_weight else weight.new_empty(0)
    weight, side = weight.contiguous(), weight.shape[-1]
    by_kernel = needs_x and side == 3
    if by_kernel:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
    else:  # of stride 1: a convolution with the taps in reverse
        dx = convolve_by_torch(dout, weight.flip(2, 3), 1) if needs_x else x.new_empty(0)
    if not (needs_weight or by_kernel):
        return dx, weight.new_empty(0)
    pixel = pixel_of(x)
    if not pixel:
        x, pixel = x.contiguous(memory_format=torch.channels_last), x.shape[1]
    dout = dout.contiguous(memory_format=torch.channels_last)
    launch = _plan(x.shape, pixel, dout.shape, side, stride, x.device)
    partials = weight.new_empty((launch.grid[0], *weight.shape), dtype=torch.float32) if needs_weight else None
    kernel = _depthwise_bwd_kernel if stride == 1 else _halved_bwd_kernel
    with device_of(x):
        launch_kernel(kernel, launch.grid, (x, weight, dout, dx if by_kernel else None, partials), *launch[1:])
    return dx, weight.new_empty(0) if partials is None else partials.sum(0).to(weight.dtype)


@lru_cache(maxsize=PLANS)
def _plan(
    shape: tuple[int, ...], pixel: int, out_shape: tuple[int, ...], side: int, stride: int, device: torch.device
) -> Launch:
    batch, channels, *size = shape
    out_size = out_shape[2:]
    cells = batch * out_size[0] * out_size[1]
    rows = 3 if side == 3 else 1
    walk = depthwise_walk(cells, channels, side // rows, resources(device)[0])
    grid = (triton.cdiv(cells, walk.rows * walk.tiles), triton.cdiv(channels, walk.columns), side // rows)
    constants = {
        "CHANNELS": channels, "BLOCK_M": walk.rows, "BLOCK_C": walk.columns, "num_warps": walk.warps,
    }  # fmt: skip
    if stride == 1:
        return Launch(grid, (pixel, *size, cells, walk.tiles), constants | {"SIDE": side, "ROWS": rows})
    return Launch(grid, (pixel, *size, *out_size, cells, walk.tiles), constants)
