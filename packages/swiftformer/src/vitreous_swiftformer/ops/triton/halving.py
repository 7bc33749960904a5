"""Inference kernels of 3x3 convolutions of stride 2, with bias and perhaps ReLU; `../README.md` explains the design."""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from .arguments import PLANS, Launch, resources
from .configs import plan_halving
from .tile_math import places

_IMAGE_CHANNELS = 3
_WORDS = 5
"""Pairs of numbers that hold the nine of a kernel's row and one in front."""


@triton.jit(do_not_specialize=["cells", "height", "width", "out_height", "out_width"])
def _halving_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, cells, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of output cells, blocks of output channels. Weights are `[OUTPUTS, 9 * CHANNELS]`.

    Neighbours and channels are one run of 9 CHANNELS factors, so that few of a product's are zeros.
    """
    first_cell = tl.program_id(0).to(tl.int64) * BLOCK_P
    cell = first_cell + tl.arange(0, BLOCK_P)
    image, row, column = places(first_cell, out_height, out_width, BLOCK_P)
    y, x = 2 * row - 1, 2 * column - 1  # of the first neighbour
    x_ptrs = x_ptr + ((image * height + y) * width + x)[:, None] * CHANNELS
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for first in tl.range(0, 9 * CHANNELS, BLOCK_K, num_stages=STAGES):
        factor = first + tl.arange(0, BLOCK_K)
        tap = factor // CHANNELS
        in_y, in_x = y[:, None] + (tap // 3)[None, :], x[:, None] + (tap % 3)[None, :]
        is_there = (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width) & (tap < 9)[None, :]
        is_there = is_there & (cell < cells)[:, None]
        offset = (tap // 3 * width + tap % 3) * CHANNELS + factor % CHANNELS
        neighbours = tl.load(x_ptrs + offset[None, :], mask=is_there, other=0.0)
        weight = tl.load(
            weight_ptr + outputs[:, None] * (9 * CHANNELS) + factor[None, :],
            mask=(outputs < OUTPUTS)[:, None] & (tap < 9)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(neighbours, tl.trans(weight), total)
    _store(out_ptr, bias_ptr, total, cell, cells, outputs, OUTPUTS, RELU)


@triton.jit(do_not_specialize=["cells", "height", "width", "out_height", "out_width"])
def _image_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, cells, height, width, out_height, out_width,
    OUTPUTS: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`_halving_kernel` of an image of three 16-bit channels and even width, read by pairs of numbers.

    Three neighbours are nine numbers from an odd place on, which no load of more than one number could fetch; with the
    one in front they are five aligned pairs. Three rows of them fill a product of 32.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first_cell = tl.program_id(0).to(tl.int64) * BLOCK_P
    cell = first_cell + tl.arange(0, BLOCK_P)
    image, row, column = places(first_cell, out_height, out_width, BLOCK_P)
    y, x = 2 * row - 1, 2 * column - 1  # of the first neighbour
    word = tl.arange(0, 16)
    line, place = word // WORDS, word % WORDS
    in_y = y[:, None] + line[None, :]
    # The first two pairs lie left of the other columns, the only ones that can be outside.
    is_there = (line < 3)[None, :] & (in_y >= 0) & (in_y < height) & (cell < cells)[:, None]
    is_there = is_there & ((x >= 0)[:, None] | (place >= 2)[None, :])
    # Column x is odd: its three numbers start at the second of a pair.
    pair = (image * height + y) * (width * 3 // 2) + (3 * x - 1) // 2
    offset = line * (width * 3 // 2) + place
    words = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + pair[:, None] + offset[None, :], mask=is_there, other=0)
    low = words.to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    # The number in front is no neighbour, and might not be finite.
    low = tl.where((place > 0)[None, :], low, 0.0)
    neighbours = tl.reshape(tl.join(low, high), [BLOCK_P, 32])

    factor, outputs = tl.arange(0, 32), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    number = factor // 2 % WORDS * 2 + factor % 2 - 1
    is_factor = (number >= 0) & (factor < 6 * WORDS)
    weight = tl.load(
        weight_ptr + outputs[None, :] * 27 + (factor // (2 * WORDS) * 9 + number)[:, None],
        mask=is_factor[:, None] & (outputs < OUTPUTS)[None, :], other=0.0,
    )  # fmt: skip
    total = tl.dot(neighbours, weight)
    _store(out_ptr, bias_ptr, total, cell, cells, outputs, OUTPUTS, RELU)


@triton.jit
def _store(out_ptr, bias_ptr, total, cell, cells, outputs, OUTPUTS: tl.constexpr, RELU: tl.constexpr):
    """Write the sums of a tile with their bias."""
    total += tl.load(bias_ptr + outputs, mask=outputs < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mask = (cell < cells)[:, None] & (outputs < OUTPUTS)[None, :]
    tl.store(out_ptr + cell[:, None] * OUTPUTS + outputs[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=PLANS)
def _plan(shape: tuple[int, ...], outputs: int, relu: bool, by_pairs: bool, device: torch.device) -> Launch:
    batch, channels, height, width = shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    _, shared_memory = resources(device)
    plan = plan_halving(channels, outputs, shared_memory)
    cells = batch * out_height * out_width
    constants = {
        "OUTPUTS": outputs, "RELU": relu, "BLOCK_P": plan.block_p, "BLOCK_O": plan.block_o, "num_warps": plan.warps,
    }  # fmt: skip
    if by_pairs:
        constants |= {"WORDS": _WORDS}
    else:
        constants |= {"CHANNELS": channels, "BLOCK_K": plan.block_k, "STAGES": plan.stages}
    grid = (triton.cdiv(cells, plan.block_p), triton.cdiv(outputs, plan.block_o))
    return Launch(grid, (cells, height, width, out_height, out_width), constants)


def launch_halving(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """The operator; the result is channels-last, and so are x and weight unless copies are made."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    outputs, out_height, out_width = weight.shape[0], (height + 1) // 2, (width + 1) // 2
    strides = (out_height * out_width * outputs, 1, out_width * outputs, outputs)
    out = x.new_empty_strided((batch, outputs, out_height, out_width), strides)
    if not out.numel():
        return out
    by_pairs = channels == _IMAGE_CHANNELS and width % 2 == 0 and x.itemsize == 2 and x.data_ptr() % 4 == 0
    launch = _plan(x.shape, outputs, relu, by_pairs, x.device)
    kernel = _image_kernel if by_pairs else _halving_kernel
    with device_of(x):
        launch_kernel(kernel, launch.grid, (x, weight, bias.contiguous(), out), *launch[1:])
    return out
