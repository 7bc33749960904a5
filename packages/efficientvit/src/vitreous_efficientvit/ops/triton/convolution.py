"""Convolutions of stride 2 with bias and ReLU, dense and depthwise; `../README.md` explains the design."""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel
from vitreous_core.ops.block_sparse_attention.triton.primitives import operand

from ..weights import ConvolutionWeights, DepthwiseWeights
from .configs import PLANS, Launch, convolution_tile, depthwise_tile, precision

IMAGE_CHANNELS = 3
WORDS_OF_A_ROW = 5
"""Pairs of numbers that hold the nine of a kernel's row and one in front."""


@triton.jit
def _convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, out_height, out_width, row_tiles, column_tiles,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of `ROWS` x `COLUMNS` output cells, blocks of outputs; a product has `TAPS` neighbours, 1 or 3.

    Neighbours in a row are one run of channels-last memory.
    """
    dtype = x_ptr.dtype.element_ty
    image, y, x = cells_of(tl.program_id(0), row_tiles, column_tiles, ROWS, COLUMNS)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    is_output = (offs_o < OUTPUTS)[None, :]
    is_run = offs_k < TAPS * CHANNELS
    source = x_ptr + image * height * width * CHANNELS
    total = tl.zeros([ROWS * COLUMNS, BLOCK_O], tl.float32)
    for row in tl.static_range(3):
        in_y = 2 * y - 1 + row
        for first in tl.static_range(0, 3, TAPS):
            in_x = 2 * x - 1 + first
            column = in_x[:, None] + (offs_k // CHANNELS)[None, :]
            is_there = ((in_y >= 0) & (in_y < height))[:, None] & (column >= 0) & (column < width) & is_run[None, :]
            place = ((in_y * width + in_x) * CHANNELS)[:, None] + offs_k[None, :]
            cells = tl.load(source + place, mask=is_there, other=0.0)
            taps = offs_o[None, :] * (9 * CHANNELS) + (row * 3 + first) * CHANNELS + offs_k[:, None]
            weight = tl.load(weight_ptr + taps, mask=is_run[:, None] & is_output, other=0.0)
            cells, weight = operand(cells, cells, PRECISION), operand(weight, cells, PRECISION)
            total = tl.dot(cells, weight, total, input_precision=PRECISION)
    _store(out_ptr, bias_ptr, total, image, y, x, out_height, out_width, offs_o, OUTPUTS, RELU, dtype)


@triton.jit
def _image_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, out_height, out_width, row_tiles, column_tiles,
    OUTPUTS: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """`_convolution_kernel` of an image of three 16-bit channels and even width, read by pairs of numbers.

    Three neighbours are nine numbers from an odd place on, which no load of more than one number could fetch; with the
    one in front they are five aligned pairs. Three rows of them fill a product of 32.
    """
    dtype = out_ptr.dtype.element_ty
    image, y, x = cells_of(tl.program_id(0), row_tiles, column_tiles, ROWS, COLUMNS)
    cells = image_cells(x_ptr, image, y, x, height, width, out_width, ROWS * COLUMNS, WORDS, dtype)
    offs_k, offs_o = tl.arange(0, 32), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    tap = image_tap(offs_k, WORDS)
    weight = tl.load(
        weight_ptr + offs_o[None, :] * 27 + tap[:, None],
        mask=(tap >= 0)[:, None] & (offs_o < OUTPUTS)[None, :], other=0.0,
    )  # fmt: skip
    total = tl.dot(cells, weight.to(dtype))
    _store(out_ptr, bias_ptr, total, image, y, x, out_height, out_width, offs_o, OUTPUTS, RELU, dtype)


@triton.jit
def image_cells(
    x_ptr, image, y, x, height, width, out_width, CELLS: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr
):
    """The neighbours of output cells, `[CELLS, 32]`, in the order of `image_tap`; zeros where there are none."""
    word = tl.arange(0, 16)
    row, place = word // WORDS, word % WORDS
    in_y = 2 * y[:, None] - 1 + row[None, :]
    # The first two pairs are the column left of the others, the only one that can be outside.
    is_there = (row < 3)[None, :] & (in_y >= 0) & (in_y < height) & (x < out_width)[:, None]
    is_there = is_there & ((x > 0)[:, None] | (place >= 2)[None, :])
    offset = in_y * (width * 3 // 2) + (3 * x - 2)[:, None] + place[None, :]
    words_ptr = x_ptr.to(tl.pointer_type(tl.int32)) + image * height * (width * 3 // 2)
    words = tl.load(words_ptr + offset, mask=is_there, other=0)
    low = words.to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    # The number in front is no neighbour, and might not be finite.
    low = tl.where((place > 0)[None, :], low, 0.0)
    return tl.reshape(tl.join(low, high), [CELLS, 32])


@triton.jit
def image_tap(offs_k, WORDS: tl.constexpr):
    """Of the 27 numbers of a cell's neighbourhood the one at each place of `image_cells`; negative at empty places."""
    tap = offs_k // 2 % WORDS * 2 + offs_k % 2 - 1
    return tl.where((tap >= 0) & (offs_k < 6 * WORDS), offs_k // (2 * WORDS) * 9 + tap, -1)


@triton.jit
def cells_of(tile, row_tiles, column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile: the image, 64-bit, and row and column of every output cell."""
    image = (tile // (row_tiles * column_tiles)).to(tl.int64)
    cell = tl.arange(0, ROWS * COLUMNS)
    y = tile // column_tiles % row_tiles * ROWS + cell // COLUMNS
    x = tile % column_tiles * COLUMNS + cell % COLUMNS
    return image, y, x


@triton.jit
def _store(
    out_ptr, bias_ptr, total, image, y, x, out_height, out_width, offs_o, OUTPUTS: tl.constexpr, RELU: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Write the sums of a tile with their bias."""
    is_output = offs_o < OUTPUTS
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_o, mask=is_output, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0)
    target = out_ptr + image * out_height * out_width * OUTPUTS
    place = ((y * out_width + x) * OUTPUTS)[:, None] + offs_o[None, :]
    is_cell = ((y < out_height) & (x < out_width))[:, None]
    tl.store(target + place, total.to(dtype), mask=is_cell & is_output[None, :])


@triton.jit
def _depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, height, width, out_width, cells, blocks,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of channels of an image, so that the mean over its cells is one program's."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = (channel < CHANNELS)[None, :]
    source = x_ptr + image * height * width * CHANNELS
    bias = tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    mean = tl.zeros([BLOCK_C], tl.float32)
    for first in tl.range(0, cells, BLOCK_M, num_stages=1):
        cell = first + tl.arange(0, BLOCK_M)
        y, x = cell // out_width, cell % out_width
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32) + bias
        for row in tl.static_range(3):
            for column in tl.static_range(3):
                in_y, in_x = 2 * y - 1 + row, 2 * x - 1 + column
                is_there = (cell < cells) & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
                neighbour = tl.load(
                    source + ((in_y * width + in_x) * CHANNELS)[:, None] + channel[None, :],
                    mask=is_there[:, None] & is_channel, other=0.0,
                )  # fmt: skip
                tap = tl.load(
                    weight_ptr + (row * 3 + column) * CHANNELS + channel, mask=channel < CHANNELS, other=0.0
                )  # fmt: skip
                total += tl.maximum(neighbour, 0.0).to(tl.float32) * tap.to(tl.float32)[None, :]
        is_cell = (cell < cells)[:, None]
        total = tl.maximum(total, 0.0).to(out_ptr.dtype.element_ty)
        place = image * cells * CHANNELS + (cell * CHANNELS)[:, None] + channel[None, :]
        tl.store(out_ptr + place, total, mask=is_cell & is_channel)
        mean += tl.sum(tl.where(is_cell, total.to(tl.float32), 0.0), 0)
    tl.store(
        mean_ptr + image * CHANNELS + channel, (mean / cells).to(mean_ptr.dtype.element_ty), mask=channel < CHANNELS
    )  # fmt: skip


@lru_cache(maxsize=PLANS)
def _plan_convolution(
    shape: tuple[int, ...], dtype: torch.dtype, products: str, outputs: int, relu: bool, by_pairs: bool
) -> Launch:  # fmt: skip
    batch, channels, height, width = shape
    out_height, out_width = _halved(height), _halved(width)
    tile = convolution_tile(dtype, channels, out_height, out_width)
    rows, columns = triton.cdiv(out_height, tile.rows), triton.cdiv(out_width, tile.columns)
    # As many outputs at a time as registers hold the weights of.
    most = 32 if dtype == torch.float32 else 128 if channels <= 64 else 64
    block_o = min(max(triton.next_power_of_2(outputs), 16), most)
    constants = {
        "OUTPUTS": outputs, "RELU": relu, "ROWS": tile.rows, "COLUMNS": tile.columns, "BLOCK_O": block_o,
        "num_warps": tile.warps,
    }  # fmt: skip
    if by_pairs:
        constants |= {"WORDS": WORDS_OF_A_ROW}
    else:
        block_k = max(triton.next_power_of_2(tile.taps * channels), 16)
        constants |= {"CHANNELS": channels, "TAPS": tile.taps, "BLOCK_K": block_k, "PRECISION": products}
    grid = (batch * rows * columns, triton.cdiv(outputs, block_o))
    return Launch(grid, (height, width, out_height, out_width, rows, columns), constants)


def launch_convolution(x: Tensor, weights: ConvolutionWeights, relu: bool) -> Tensor:
    """The operator; the result is channels-last, and so is `x` unless a copy is made."""
    return convolve(x, weights.weight, weights.bias, relu)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """`launch_convolution` of a weight `[outputs, 3, 3, channels]` in any floating dtype, with or without a bias."""
    x = x.contiguous(memory_format=torch.channels_last)
    outputs = weight.shape[0]
    out = _halved_map(x, outputs)
    if not out.numel():
        return out
    by_pairs = is_read_by_pairs(x)
    launch = _plan_convolution(x.shape, x.dtype, precision(x.dtype), outputs, relu, by_pairs)
    kernel = _image_kernel if by_pairs else _convolution_kernel
    with device_of(x):
        launch_kernel(kernel, launch.grid, (x, weight, bias, out), *launch[1:])
    return out


def is_read_by_pairs(x: Tensor) -> bool:
    """Whether a channels-last map is an image that kernels read by aligned pairs of numbers."""
    return x.shape[1] == IMAGE_CHANNELS and x.shape[3] % 2 == 0 and x.itemsize == 2 and x.data_ptr() % 4 == 0


@lru_cache(maxsize=PLANS)
def _plan_depthwise(shape: tuple[int, ...]) -> Launch:
    batch, channels, height, width = shape
    out_height, out_width = _halved(height), _halved(width)
    tile = depthwise_tile(channels)
    blocks = triton.cdiv(channels, tile.columns)
    constants = {"CHANNELS": channels, "BLOCK_M": tile.rows, "BLOCK_C": tile.columns, "num_warps": tile.warps}
    return Launch((batch * blocks,), (height, width, out_width, out_height * out_width, blocks), constants)


def launch_depthwise(x: Tensor, weights: DepthwiseWeights) -> tuple[Tensor, Tensor]:
    """The operator; the map is channels-last, and so is `x` unless a copy is made."""
    x = x.contiguous(memory_format=torch.channels_last)
    out, mean = _halved_map(x, x.shape[1]), x.new_empty(x.shape[:2])
    if not out.numel():
        return out, mean
    launch = _plan_depthwise(x.shape)
    with device_of(x):
        launch_kernel(_depthwise_kernel, launch.grid, (x, *weights, out, mean), *launch[1:])
    return out, mean


def _halved(size: int) -> int:
    return (size + 1) // 2


def _halved_map(x: Tensor, channels: int) -> Tensor:
    """Half as high and wide as `x`, channels-last."""
    batch, _, height, width = x.shape
    height, width = _halved(height), _halved(width)
    strides = (height * width * channels, 1, width * channels, channels)
    return x.new_empty_strided((batch, channels, height, width), strides)
