"""Depthwise convolutions without bias, forward and backward; `../README.md` explains the design.

A program walks over a run of cells, as many at a time as give each thread one vector of channels: neighbours come from
the caches, weights of nine taps and sums of their gradients stay in registers.
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

from ..convolution_contract import empty_output, pixel_of
from . import resources
from .configs import PLANS, Launch, depthwise_walk


@triton.jit(do_not_specialize=["cells", "walk"])
def _depthwise_fwd_kernel(
    x_ptr, weight_ptr, out_ptr, x_pixel, height, width, out_height, out_width, cells, walk,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, FLIPPED: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: runs of `walk` tiles of output cells, blocks of channels.

    Args:
        x_pixel: elements between two cells of x.
        FLIPPED: taps in reverse, which is the input's gradient of stride 1.
        KEPT: weights stay in registers.
    """
    PADDING: tl.constexpr = SIDE // 2
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    weights = ()
    if KEPT:
        for tap in tl.static_range(SIDE * SIDE):
            weights = weights + (_weight(weight_ptr, channel, is_channel, tap, SIDE, FLIPPED),)
    for tile in tl.range(walk, num_stages=1):
        cell = (tl.program_id(0) * walk + tile).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_cell = cell < cells
        x = (cell % out_width).to(tl.int32) * STRIDE - PADDING
        y = (cell // out_width % out_height).to(tl.int32) * STRIDE - PADDING
        corner = x_ptr + (((cell // (out_width * out_height) * height + y) * width + x) * x_pixel)[:, None] + channel
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for tap in tl.static_range(SIDE * SIDE):
            in_y, in_x = y + tap // SIDE, x + tap % SIDE
            is_there = is_cell & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
            neighbour = tl.load(
                corner + (tap // SIDE * width + tap % SIDE) * x_pixel, mask=is_there[:, None] & is_channel[None, :],
                other=0.0,
            )  # fmt: skip
            if KEPT:
                weight = weights[tap]
            else:
                weight = _weight(weight_ptr, channel, is_channel, tap, SIDE, FLIPPED)
            total += neighbour.to(tl.float32) * weight[None, :]
        place = out_ptr + (cell * CHANNELS)[:, None] + channel
        tl.store(place, total.to(out_ptr.dtype.element_ty), mask=is_cell[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=["cells", "walk"])
def _depthwise_bwd_kernel(
    x_ptr, weight_ptr, dout_ptr, dx_ptr, partial_ptr, x_pixel, height, width, out_height, out_width, cells, walk,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: runs of `walk` tiles of input cells, blocks of channels, groups of `ROWS` rows of taps.

    Each tap of an input cell belongs to one output cell, whose gradient goes into both sums. The input's gradient is
    made where a program has all rows of taps and its pointer is not None; the weight's where its pointer is not.
    """
    PADDING: tl.constexpr = SIDE // 2
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    first_row = tl.program_id(2) * ROWS
    weights = ()
    sums = ()
    for tap in tl.static_range(ROWS * SIDE):
        if dx_ptr is not None:
            weights = weights + (_weight(weight_ptr, channel, is_channel, tap, SIDE, False),)
        if partial_ptr is not None:
            sums = sums + (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)
    for tile in tl.range(walk, num_stages=1):
        cell = (tl.program_id(0) * walk + tile).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_cell = cell < cells
        x = (cell % width).to(tl.int32) + PADDING
        y = (cell // width % height).to(tl.int32) + PADDING - first_row
        image = cell // (width * height) * (out_height * out_width)
        is_inside = is_cell[:, None] & is_channel[None, :]
        if partial_ptr is not None:
            own = tl.load(x_ptr + (cell * x_pixel)[:, None] + channel, mask=is_inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        added = ()
        for tap in tl.static_range(ROWS * SIDE):
            out_y, out_x = y - tap // SIDE, x - tap % SIDE
            is_there = is_cell & (out_y >= 0) & (out_y < out_height * STRIDE)
            is_there = is_there & (out_x >= 0) & (out_x < out_width * STRIDE)
            if STRIDE == 2:
                is_there = is_there & (out_y % 2 == 0) & (out_x % 2 == 0)
            place = (image + (out_y // STRIDE) * out_width + out_x // STRIDE) * CHANNELS
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
            place = dx_ptr + (cell * CHANNELS)[:, None] + channel
            tl.store(place, total.to(dx_ptr.dtype.element_ty), mask=is_inside)
    if partial_ptr is not None:
        partial = partial_ptr + (tl.program_id(0) * CHANNELS + channel) * (SIDE * SIDE) + first_row * SIDE
        for tap in tl.static_range(ROWS * SIDE):
            tl.store(partial + tap, tl.sum(sums[tap], 0), mask=is_channel)


@triton.jit
def _weight(weight_ptr, channel, is_channel, tap: tl.constexpr, SIDE: tl.constexpr, FLIPPED: tl.constexpr):
    """Of one tap, fp32."""
    place: tl.constexpr = SIDE * SIDE - 1 - tap if FLIPPED else tap
    return tl.load(weight_ptr + channel * (SIDE * SIDE) + place, mask=is_channel, other=0.0).to(tl.float32)


def launch_forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The operator; the result is channels-last, and so is `x`, or a slice of such channels, unless a copy is made."""
    out = empty_output(x, weight, stride)
    if out.numel():
        _launch_forward(x, weight.contiguous(), out, stride, False)
    return out


def launch_backward(
    dout: Tensor, x: Tensor, weight: Tensor, stride: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input, channels-last, and of the weight, `[C, 1, k, k]`; `[0]` where not needed."""
    dx = torch.empty_like(x, memory_format=torch.channels_last) if needs_x else x.new_empty(0)
    if not dout.numel():
        return dx, torch.zeros_like(weight) if needs_weight else weight.new_empty(0)
    (x, pixel), weight, side = _with_pixels(x), weight.contiguous(), weight.shape[-1]
    all_taps = side == 3
    if needs_x and not all_taps:
        _launch_forward(dout, weight, dx, 1, True)
    if not (needs_weight or (needs_x and all_taps)):
        return dx, weight.new_empty(0)
    dout = dout.contiguous(memory_format=torch.channels_last)
    launch = _plan_backward(x.shape, pixel, dout.shape, side, stride, x.device)
    partials = weight.new_empty((launch.grid[0], *weight.shape), dtype=torch.float32) if needs_weight else None
    with device_of(x):
        launch_kernel(
            _depthwise_bwd_kernel, launch.grid,
            (x, weight, dout, dx if needs_x and all_taps else None, partials), *launch[1:],
        )  # fmt: skip
    return dx, weight.new_empty(0) if partials is None else partials.sum(0).to(weight.dtype)


def _launch_forward(x: Tensor, weight: Tensor, out: Tensor, stride: int, flipped: bool) -> None:
    x, pixel = _with_pixels(x)
    launch = _plan_forward(x.shape, pixel, out.shape, weight.shape[-1], stride, flipped, x.device)
    with device_of(x):
        launch_kernel(_depthwise_fwd_kernel, launch.grid, (x, weight, out), *launch[1:])


@lru_cache(maxsize=PLANS)
def _plan_forward(
    shape: tuple[int, ...], pixel: int, out_shape: tuple[int, ...], side: int, stride: int, flipped: bool,
    device: torch.device,
) -> Launch:  # fmt: skip
    _, channels, height, width = shape
    batch, _, out_height, out_width = out_shape
    cells = batch * out_height * out_width
    walk = depthwise_walk(cells, channels, side, False, resources(device)[0])
    grid = (triton.cdiv(cells, walk.rows * walk.tiles), triton.cdiv(channels, walk.columns))
    constants = {
        "CHANNELS": channels, "SIDE": side, "STRIDE": stride, "FLIPPED": flipped, "KEPT": side == 3,
        "BLOCK_M": walk.rows, "BLOCK_C": walk.columns, "num_warps": walk.warps,
    }  # fmt: skip
    return Launch(grid, (pixel, height, width, out_height, out_width, cells, walk.tiles), constants)


@lru_cache(maxsize=PLANS)
def _plan_backward(
    shape: tuple[int, ...], pixel: int, out_shape: tuple[int, ...], side: int, stride: int, device: torch.device
) -> Launch:
    batch, channels, height, width = shape
    cells = batch * height * width
    walk = depthwise_walk(cells, channels, side, True, resources(device)[0])
    rows = 3 if side == 3 else 1
    grid = (triton.cdiv(cells, walk.rows * walk.tiles), triton.cdiv(channels, walk.columns), side // rows)
    constants = {
        "CHANNELS": channels, "SIDE": side, "STRIDE": stride, "ROWS": rows, "BLOCK_M": walk.rows,
        "BLOCK_C": walk.columns, "num_warps": walk.warps,
    }  # fmt: skip
    return Launch(grid, (pixel, height, width, *out_shape[2:], cells, walk.tiles), constants)


def _with_pixels(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the elements between two of its cells, or a channels-last copy where its channels lie apart."""
    if pixel := pixel_of(x):
        return x, pixel
    return x.contiguous(memory_format=torch.channels_last), x.shape[1]
