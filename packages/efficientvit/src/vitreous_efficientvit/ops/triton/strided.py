"""Convolutions of the stem, 3x3 and stride 2, as they train: without bias, and their gradients.

`../README.md` explains the design. The forward is deploy mode's (`convolution.py`).
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
from vitreous_core.ops.block_sparse_attention.triton.primitives import operand

from . import resources
from .configs import PLANS, Launch, precision, strided_tile, strided_walk
from .convolution import WORDS_OF_A_ROW, cells_of, convolve, image_cells, image_tap, is_read_by_pairs


@triton.jit(do_not_specialize=["tiles", "walk"])
def _input_gradient_kernel(
    dout_ptr, weight_ptr, dx_ptr, height, width, out_height, out_width, row_tiles, column_tiles, tiles, walk,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: walks over tiles of output cells. Each cell makes the gradients of a square of two by two input cells.

    Those see it and the cells right of it, below and both: two runs of channels-last memory in, two out. The upper row
    of the square has but the middle row of taps; the lower one has the others.
    """
    dtype = dx_ptr.dtype.element_ty
    offs_k, offs_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    upper = _taps(weight_ptr, offs_k, offs_n, 1, CHANNELS, OUTPUTS, PRECISION, dtype)
    lower = _taps(weight_ptr, offs_k, offs_n, 2, CHANNELS, OUTPUTS, PRECISION, dtype)
    lower_below = _taps(weight_ptr, offs_k, offs_n, 0, CHANNELS, OUTPUTS, PRECISION, dtype)
    for step in tl.range(walk, num_stages=STAGES):
        tile = tl.program_id(0) * walk + step
        image, y, x = cells_of(tile, row_tiles, column_tiles, ROWS, COLUMNS)
        y = tl.where(tile < tiles, y, out_height)
        is_run = (offs_k < 2 * OUTPUTS)[None, :] & (x[:, None] + (offs_k // OUTPUTS)[None, :] < out_width)
        source = dout_ptr + image * out_height * out_width * OUTPUTS
        place = ((y * out_width + x) * OUTPUTS)[:, None] + offs_k[None, :]
        here = tl.load(source + place, mask=is_run & (y < out_height)[:, None], other=0.0)
        below = tl.load(source + place + out_width * OUTPUTS, mask=is_run & (y + 1 < out_height)[:, None], other=0.0)
        here, below = operand(here, here, PRECISION), operand(below, below, PRECISION)
        even = tl.dot(here, upper, input_precision=PRECISION)
        odd = tl.dot(here, lower, input_precision=PRECISION)
        odd = tl.dot(below, lower_below, odd, input_precision=PRECISION)

        is_target = (offs_n < 2 * CHANNELS)[None, :] & (2 * x[:, None] + (offs_n // CHANNELS)[None, :] < width)
        target = dx_ptr + image * height * width * CHANNELS
        place = ((2 * y * width + 2 * x) * CHANNELS)[:, None] + offs_n[None, :]
        tl.store(target + place, even.to(dtype), mask=is_target & (2 * y < height)[:, None])
        tl.store(target + place + width * CHANNELS, odd.to(dtype), mask=is_target & (2 * y + 1 < height)[:, None])


@triton.jit
def _taps(
    weight_ptr,
    offs_k,
    offs_n,
    row: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """A row of taps from the outputs of a cell and of the one right of it to the channels of two columns.

    The left column has the middle tap of the cell; the right one the last of the cell and the first of its neighbour.
    """
    is_next, output = (offs_k // OUTPUTS)[:, None], (offs_k % OUTPUTS)[:, None]
    is_right, channel = (offs_n // CHANNELS)[None, :], (offs_n % CHANNELS)[None, :]
    column = 1 + is_right - 2 * is_next
    is_tap = (column >= 0) & (offs_k < 2 * OUTPUTS)[:, None] & (offs_n < 2 * CHANNELS)[None, :]
    taps = tl.load(weight_ptr + (output * 9 + row * 3 + column) * CHANNELS + channel, mask=is_tap, other=0.0)
    return operand(taps, tl.zeros([1], dtype), PRECISION)


@triton.jit(do_not_specialize=["tiles", "walk"])
def _weight_gradient_kernel(
    x_ptr, dout_ptr, partial_ptr, height, width, out_height, out_width, row_tiles, column_tiles, tiles, walk,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: walks over tiles of output cells. A program sums `neighbours^T gradients` of its tiles in registers.

    Args:
        WORDS: pairs of numbers of a row of an image's neighbourhood, all in one product; 0 where each row has its own.
    """
    dtype = x_ptr.dtype.element_ty
    offs_k, offs_o = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_O)
    is_run, is_output = (offs_k < 3 * CHANNELS)[None, :], (offs_o < OUTPUTS)[None, :]
    GROUPS: tl.constexpr = 1 if WORDS else 3
    sums = ()
    for _ in tl.static_range(GROUPS):
        sums = sums + (tl.zeros([BLOCK_K, BLOCK_O], tl.float32),)
    for step in tl.range(walk, num_stages=STAGES):
        tile = tl.program_id(0) * walk + step
        image, y, x = cells_of(tile, row_tiles, column_tiles, ROWS, COLUMNS)
        y = tl.where(tile < tiles, y, out_height)
        is_cell = (y < out_height) & (x < out_width)
        place = image * out_height * out_width * OUTPUTS + ((y * out_width + x) * OUTPUTS)[:, None] + offs_o[None, :]
        gradient = tl.load(dout_ptr + place, mask=is_cell[:, None] & is_output, other=0.0)
        gradient = operand(gradient, gradient, PRECISION)
        # Where there is no cell there are no neighbours: zero times one that is not finite is no zero.
        y = tl.where(is_cell, y, -2)
        added = ()
        if WORDS:
            cells = image_cells(x_ptr, image, y, x, height, width, out_width, ROWS * COLUMNS, WORDS, dtype)
            added = (tl.dot(tl.trans(cells), gradient, sums[0]),)
        else:
            source = x_ptr + image * height * width * CHANNELS
            column = 2 * x[:, None] - 1 + (offs_k // CHANNELS)[None, :]
            is_inside = (column >= 0) & (column < width) & is_run
            for row in tl.static_range(3):
                in_y = 2 * y - 1 + row
                cells = tl.load(
                    source + ((in_y * width + 2 * x - 1) * CHANNELS)[:, None] + offs_k[None, :],
                    mask=is_inside & ((in_y >= 0) & (in_y < height))[:, None], other=0.0,
                )  # fmt: skip
                cells = operand(cells, gradient, PRECISION)
                added = added + (tl.dot(tl.trans(cells), gradient, sums[row], input_precision=PRECISION),)
        sums = added
    partial = partial_ptr + (tl.program_id(0) * OUTPUTS + offs_o[None, :]) * (9 * CHANNELS)
    if WORDS:
        tap = image_tap(offs_k, WORDS)[:, None]
        tl.store(partial + tap, sums[0], mask=(tap >= 0) & is_output)
    else:
        for row in tl.static_range(3):
            place = row * 3 * CHANNELS + offs_k[:, None]
            tl.store(partial + place, sums[row], mask=(offs_k < 3 * CHANNELS)[:, None] & is_output)


def launch_forward(x: Tensor, weight: Tensor) -> Tensor:
    """The operator; the result is channels-last, and so is `x` unless a copy is made."""
    return convolve(x, _outputs_first(weight), None, relu=False)


def launch_backward(
    dout: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight, both channels-last; `[0]` where not needed."""
    dx = torch.empty_like(x, memory_format=torch.channels_last) if needs_x else x.new_empty(0)
    dweight = weight.new_empty(0)
    if not dout.numel():
        return dx, torch.zeros_like(weight, memory_format=torch.channels_last) if needs_weight else dweight
    dout = dout.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    sizes = x.shape, weight.shape[0], x.dtype, precision(x.dtype)
    with device_of(x):
        if needs_x:
            launch = _plan_input_gradient(*sizes, x.device)
            launch_kernel(_input_gradient_kernel, launch.grid, (dout, _outputs_first(weight), dx), *launch[1:])
        if needs_weight:
            launch = _plan_weight_gradient(*sizes, is_read_by_pairs(x), x.device)
            outputs, channels = weight.shape[:2]
            partials = x.new_empty((launch.grid[0], outputs, 3, 3, channels), dtype=torch.float32)
            launch_kernel(_weight_gradient_kernel, launch.grid, (x, dout, partials), *launch[1:])
            dweight = partials.sum(0).to(weight.dtype).permute(0, 3, 1, 2)
    return dx, dweight


def _outputs_first(weight: Tensor) -> Tensor:
    """`[outputs, 3, 3, channels]`; a view of a weight in channels-last."""
    return weight.permute(0, 2, 3, 1).contiguous()


@lru_cache(maxsize=PLANS)
def _plan_input_gradient(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype, products: str, device: torch.device
) -> Launch:
    numbers, constants, programs = _walk(shape, outputs, dtype, device, of_weight=False)
    constants |= {
        "BLOCK_K": _padded(2 * outputs), "BLOCK_N": _padded(2 * shape[1]), "PRECISION": products,
    }  # fmt: skip
    return Launch((programs,), numbers, constants)


@lru_cache(maxsize=PLANS)
def _plan_weight_gradient(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype, products: str, by_pairs: bool, device: torch.device
) -> Launch:
    numbers, constants, programs = _walk(shape, outputs, dtype, device, of_weight=True)
    constants |= {
        "WORDS": WORDS_OF_A_ROW if by_pairs else 0, "BLOCK_K": 32 if by_pairs else _padded(3 * shape[1]),
        "BLOCK_O": _padded(outputs), "PRECISION": products,
    }  # fmt: skip
    return Launch((programs,), numbers, constants)


def _walk(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype, device: torch.device, *, of_weight: bool
) -> tuple[tuple[int, ...], dict[str, int], int]:
    """What both launches share: numbers, constants, programs."""
    batch, channels, height, width = shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    multiprocessors, shared_memory = resources(device)
    tile = strided_tile(dtype, (channels, outputs, out_height, out_width), of_weight, shared_memory)
    rows, columns = triton.cdiv(out_height, tile.rows), triton.cdiv(out_width, tile.columns)
    tiles = batch * rows * columns
    walk = strided_walk(tiles, multiprocessors)
    numbers = height, width, out_height, out_width, rows, columns, tiles, walk
    constants = {
        "CHANNELS": channels, "OUTPUTS": outputs, "ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": tile.stages,
        "num_warps": tile.warps,
    }  # fmt: skip
    return numbers, constants, triton.cdiv(tiles, walk)


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)
