"""How each launch is shaped: pure functions of dtype and sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..weights import BIAS_TILE

PLANS = 1024
"""How many launches of each kernel are remembered."""


class Launch(NamedTuple):
    """One launch, planned: what `launch_kernel` takes beside pointers."""

    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class AttentionTile:
    """Launch of the attention kernel.

    Args:
        rows: tokens of one tile.
        windows: in one tile.
        columns, depth: of a tile of the projection's weight.
        programs: per multiprocessor, at most.
        warps, stages: of a program, and of the projection's loop.
    """

    rows: int
    windows: int
    columns: int
    depth: int
    programs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class HeadTile:
    """Launch of a kernel of one head.

    Args:
        tokens: of one window, padded.
        programs: per multiprocessor, at most.
        warps, stages: of a program, and of its walk over windows.
    """

    tokens: int
    programs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class FeedForwardTile:
    """Launch of the FFN kernel.

    Args:
        rows: cells of one tile.
        hidden: hidden channels at a time.
        warps, stages: of a program, and of the loop over hidden channels.
        local: channels of the depthwise convolution at a time.
    """

    rows: int
    hidden: int
    warps: int
    stages: int
    local: int


@dataclass(frozen=True)
class ConvolutionTile:
    """Launch of a convolution kernel of stride 2.

    Args:
        rows, columns: of output cells in one tile; of the depthwise kernel, cells and channels.
        taps: neighbours of a row in one product, 1 or 3.
        warps: of a program.
    """

    rows: int
    columns: int
    taps: int
    warps: int


@dataclass(frozen=True)
class StridedTile:
    """Launch of a kernel of a strided convolution's gradient.

    Args:
        rows, columns: of output cells in one tile.
        warps, stages: of a program, and of its walk over tiles.
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Walk:
    """Launch of a kernel whose programs walk over tiles.

    Args:
        rows, columns: of a tile: cells and channels.
        tiles: of one program.
        warps: of a program.
    """

    rows: int
    columns: int
    tiles: int
    warps: int


def attention_tile(
    dtype: torch.dtype, tf32: bool, windows: int, window_size: int, value_dim: int, multiprocessors: int
) -> AttentionTile:
    """As many windows in a tile as its rows hold.

    Of 64 rows Triton gives the chained products of a second warp group the same rows as the first: four warps there,
    but for products without matrix units. Lower tiles are no work for a warp group and spread over eight warps.
    """
    tokens = window_size**2
    rows = max(_rows(windows * tokens, BIAS_TILE, multiprocessors), 1 << (tokens - 1).bit_length())
    if dtype == torch.float32:
        return AttentionTile(rows, rows // tokens, 32, 32, 1, 4 if tf32 and rows == BIAS_TILE else 8, 2)
    warps = 8 if rows < BIAS_TILE and value_dim > 64 else 4
    columns = 128 if tokens > 32 and value_dim > 16 else 64
    return AttentionTile(rows, rows // tokens, columns, 64, 4, warps, 2)


def head_tile(dtype: torch.dtype, tokens: int, value_dim: int, backward: bool) -> HeadTile:
    """One window at a time, 16 tokens to a warp; twice as many warps where their registers would not do.

    The backward keeps the bias and the sum of its gradients beside four products: half as many programs fit.
    """
    rows = max(1 << (tokens - 1).bit_length(), 16)
    warps = rows // 16
    if dtype == torch.float32 or (value_dim > 64 and rows > 16):
        warps *= 2
    return HeadTile(rows, 256 // rows // (2 if backward else 1), warps, 2)


def feed_forward_tile(
    dtype: torch.dtype, cells: int, channels: int, multiprocessors: int, shared_memory: int
) -> FeedForwardTile:
    """Tall tiles, which read the weights least often, as far as the registers of a warp group go, or of two.

    Two programs fit on a multiprocessor of an H100 up to 256 channels and wait for each other's loads. Fewer hidden
    channels at a time, then no overlap of copies and products, where shared memory is small.
    """
    if dtype == torch.float32:
        tile = FeedForwardTile(16 if channels > 256 else 32, 16, 8, 2, 32)
    else:
        rows = _rows(cells, 64, multiprocessors)
        is_low = rows < 64  # room for twice the weights, work for one warp group
        tile = FeedForwardTile(
            rows, 64 if channels <= 128 or is_low else 32, 4 if channels <= 256 or is_low else 8, 2, 32
        )
    while tile.hidden > 16 and _shared_bytes(tile, dtype, channels) > shared_memory:
        tile = replace(tile, hidden=tile.hidden // 2)
    return tile if _shared_bytes(tile, dtype, channels) <= shared_memory else replace(tile, stages=1)


def convolution_tile(dtype: torch.dtype, channels: int, out_height: int, out_width: int) -> ConvolutionTile:
    """Columns that divide the maps of images of 224 pixels, and 128 cells together.

    Half as many above 32 channels, and fewer where the map is lower than the tile.
    A product's depth is a power of two from 16 up: of three neighbours where that holds few zeros. In fp32, whose
    products may run on scalar units, fewer cells.
    """
    columns = 16
    while columns > 2 and out_width % columns:
        columns //= 2
    cells = 32 if dtype == torch.float32 else 128 if channels <= 32 else 64
    rows = min(cells // columns, 1 << (out_height - 1).bit_length())
    taps = 3 if channels <= 8 else 1
    return ConvolutionTile(max(rows, 16 // columns), columns, taps, 8 if dtype == torch.float32 else 4)


def depthwise_tile(channels: int) -> ConvolutionTile:
    """One vector of 16 bytes a thread in half precision."""
    columns = min(64, 1 << (channels - 1).bit_length())
    return ConvolutionTile(16, columns, 1, 4)


def depthwise_walk(cells: int, channels: int, groups: int, multiprocessors: int) -> Walk:
    """Four channels a thread: nine weights and nine sums of so many fit its registers, and four programs side by side.

    Programs walk as far as leaves each multiprocessor its four: the fewer, the less often they sum.

    Args:
        cells, channels: of the map.
        groups: of taps, which have programs of their own.
        multiprocessors: of the GPU.
    """
    columns = min(64, 1 << (channels - 1).bit_length())
    rows = 512 // columns
    programs = -(-cells // rows) * -(-channels // columns) * groups
    return Walk(rows, columns, max(1, min(128, programs // (4 * multiprocessors))), 4)


def strided_tile(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], of_weight: bool, shared_memory: int
) -> StridedTile:
    """The columns of the forward's tile, and 64 cells: shared memory holds a copy of them for each row of taps.

    256 cells of an image for the weight's gradient, whose taps share one product; 128 for the input's above 16
    channels. One tile at a time, then fewer cells, where shared memory is small.

    Args:
        dtype: of the maps.
        sizes: channels, outputs, and height and width of the output.
        of_weight: whether it is the weight's gradient, or the input's.
        shared_memory: bytes that a program may have.
    """
    channels, outputs, *out_size = sizes
    tile = convolution_tile(dtype, channels, *out_size)
    is_wide = channels > 16 and not of_weight
    is_image = channels <= 3 and of_weight and dtype != torch.float32
    cells = 256 if is_image else 128 if is_wide else 64
    run = max(1 << ((3 * channels if of_weight else 2 * outputs) - 1).bit_length(), 16)
    kept = 0 if of_weight else 3 * dtype.itemsize * run * max(1 << (2 * channels - 1).bit_length(), 16)
    cell = dtype.itemsize * (3 * run + max(outputs, 16) if of_weight else 2 * run)
    stages = 2
    if kept + stages * cells * cell > shared_memory:
        stages = 1
    while cells > tile.columns and cells > 16 and kept + stages * cells * cell > shared_memory:
        cells //= 2
    return StridedTile(cells // tile.columns, tile.columns, 8 if is_wide else tile.warps, stages)


def strided_walk(tiles: int, multiprocessors: int) -> int:
    """Tiles of a program: four programs on a multiprocessor, with a weight or its sums kept as they walk."""
    return max(1, -(-tiles // (4 * multiprocessors)))


def _shared_bytes(tile: FeedForwardTile, dtype: torch.dtype, channels: int) -> int:
    """At least what the compiler takes: the cells, two weights for every stage, some for barriers."""
    return dtype.itemsize * sum(split_channels(channels)) * (tile.rows + 2 * tile.stages * tile.hidden) + 1024


def _rows(cells: int, most: int, multiprocessors: int) -> int:
    """Fewer rows in a tile while multiprocessors would be idle.

    Not below 32: each tile reads all weights, and 16 rows need their products' time twice over for that.
    """
    if cells <= 16:
        return 16
    rows = most
    while rows > 32 and cells < rows * multiprocessors:
        rows //= 2
    return rows


def split_channels(channels: int) -> tuple[int, int]:
    """Two block sizes, powers of two from 16 up, that hold the channels: fewer empty columns than one.

    The second is 0 where one block does.
    """
    first = max(1 << (channels.bit_length() - 1), 16)
    rest = channels - first
    return (first, 0) if rest <= 0 else (first, max(1 << (rest - 1).bit_length(), 16))


def precision(dtype: torch.dtype) -> str:
    """Of products of fp32 factors, as `torch.set_float32_matmul_precision` has it."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"
