"""Which windows the short kernels take, and their tile shapes, as data.

Nothing here depends on the number of windows, so a shape compiles once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from .arguments import dot_precision, padded_head_dim

LARGEST_TOKENS = 256
LARGEST_TILE = 64
_LARGEST_TENSOR, _LARGEST_SINGLE = 32 * 1024, 16 * 1024


class Tile(NamedTuple):
    """One launch of a pass.

    Args:
        first, strips: its first row and its number of strips.
        rows: queries (or, for the gradients of keys and values, keys) of a strip, which a program owns.
        columns, tail: width of the chunks that the other side comes in, and of the last one; 0: like the others.
        warps, stages: of Triton.
        programs: per multiprocessor, as many as run at once.
        rest: tile of the rows that the strips leave and further programs of the launch own; 0: none. Over queries only.
        halved: whether factors of sums over tokens are halved in the backward passes: see `tile_math.halves`.
    """

    first: int
    strips: int
    rows: int
    columns: int
    tail: int
    warps: int
    stages: int
    programs: int
    rest: int = 0
    halved: bool = False


def tile_constants(tile: Tile) -> dict[str, int]:
    """What every kernel takes of a launch, as its constants and options."""
    return {
        "STRIPS": tile.strips, "ROWS": tile.rows, "COLUMNS": tile.columns, "TAIL": tile.tail,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def fits_on_chip(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether the short kernels take windows of N tokens: keys and values of one head on chip, 32 KiB each at most."""
    rows, columns = -(-tokens // 16) * 16, padded_head_dim(head_dim)
    size = rows * columns * itemsize
    # Scalar products of fp32 with more channels than that would not fit into the registers.
    narrow = itemsize < 4 or columns <= 32 or size <= _LARGEST_SINGLE
    return tokens <= LARGEST_TOKENS and size <= _LARGEST_TENSOR and narrow


def is_short(dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """Whether the short kernels run; where statistics are kept, the long ones could as well."""
    return fits_on_chip(tokens, head_dim, dtype.itemsize) and (
        # Chunks of scalar fp32 products would not fit into the registers.
        tokens <= LARGEST_TILE or dot_precision(dtype) != "ieee"
    )


def tiles_channels(dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """Whether a window is one tile of scores, but its rows are too long for a kernel that holds them on chip."""
    return tokens <= LARGEST_TILE and not fits_on_chip(tokens, head_dim, dtype.itemsize)


def tiles_channels_backward(dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """The same of the backward pass; faster there too for TF32 rows that would fit: over 32 channels and 32 tokens."""
    is_wide = padded_head_dim(head_dim) > 32 and tokens > LARGEST_TILE // 2
    is_faster = dtype == torch.float32 and dot_precision(dtype) != "ieee" and is_wide
    return tokens <= LARGEST_TILE and (is_faster or tiles_channels(dtype, tokens, head_dim))


def keeps_statistics(tokens: int) -> bool:
    """Whether the backward pass needs output and statistics: not where one tile holds all scores of a window."""
    return tokens > LARGEST_TILE


def count_parts(device: torch.device, tile: Tile, windows: int, heads: int) -> int:
    """Among how many parts the windows are divided: so that all programs run at once, or in a few full waves."""
    return count_parts_and_rest(device, tile, windows, heads)[0]


def count_parts_and_rest(device: torch.device, tile: Tile, windows: int, heads: int) -> tuple[int, int]:
    """The same for the strips and for the rest, 0 if there is none: so that programs of both take equally long."""
    slots = _multiprocessors(device) * tile.programs
    return _count_parts(slots, heads, tile.strips, _COST_OF_THE_REST if tile.rest else 0.0, windows)


@lru_cache(maxsize=1024)
def _count_parts(slots: int, heads: int, strips: int, cost_of_rest: float, windows: int) -> tuple[int, int]:
    def parts(waves: int) -> tuple[int, int]:
        of_strips = min(windows, int(waves * slots / (heads * (strips + cost_of_rest))))
        left = (waves * slots - heads * strips * of_strips) // heads
        return max(1, of_strips), max(1, min(windows, left)) if cost_of_rest else 0

    def cost(waves: int) -> float:
        of_strips, of_rest = parts(waves)
        if waves * slots < heads * (strips * of_strips + of_rest):
            return float("inf")
        steps = max(-(-windows // of_strips), cost_of_rest * -(-windows // of_rest) if of_rest else 0)
        # Steps of the longest program, and what it takes to begin and end a wave.
        return waves * (steps + _COST_OF_A_WAVE)

    return parts(min(range(1, _LARGEST_WAVES + 1), key=cost))


@cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter any number will do; several parts are better tested than one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


# Measured on an H100 80GB HBM3, torch 2.11, Triton 3.6: (stages, programs per multiprocessor), best first. The first
# entry that fits into shared memory is taken; the last one always does.
_FORWARD = ((4, 2), (3, 2), (2, 2), (2, 1), (1, 1))
_FORWARD_CHUNKS = ((3, 2), (2, 2), (2, 1), (1, 1))
_ROWS = ((3, 2), (2, 2), (2, 1), (1, 1))
_ROWS_SCALAR = ((2, 2), (2, 1), (1, 1))
_KEYS = ((3, 2), (2, 2), (2, 1), (1, 1))
_BIAS = ((3, 3), (3, 2), (2, 2), (2, 1), (1, 1))
_BIAS_MASKED = _BIAS[1:]
# Programs of one or two warps: many of them make up for their being narrow.
_SMALL = ((4, 8), (3, 8), (2, 8), (3, 4), (2, 6), (2, 4), (2, 3), (2, 2), (1, 2))
_SMALL_CHUNKS = ((2, 8), (2, 6), (2, 4), (2, 2), (1, 1))

_SHARED_MEMORY = 227 * 1024
"""Of one multiprocessor."""

_LARGEST_WAVES, _COST_OF_A_WAVE = 4, 2
"""The latter in windows: filling the pipeline, reading the bias, writing the partial bias gradient."""

_COST_OF_THE_REST = 0.5
"""Of one window's, in 16 rows, where those of a strip of 64 cost 1."""

Choices = tuple[tuple[int, int], ...]

_FORWARD_COLUMNS = ((144, 64), (192, 128), (208, 64), (256, 128))
"""(largest N, width of the chunks of keys), for half precision and at most 32 channels; else 64."""

_LARGEST_WITH_BIAS = 144
"""N up to which the backward pass over queries has registers for the bias gradient; above, it gets its own pass."""


def choose_forward(dtype: torch.dtype, tokens: int, head_dim: int) -> Tile:
    """The launch of the forward pass; few rows in the last strip cost less than a launch of their own would."""
    choices = _FORWARD_CHUNKS if tokens > LARGEST_TILE or dtype == torch.float32 else _FORWARD
    columns = LARGEST_TILE
    if _is_slim(dtype, head_dim):
        columns = next(columns for largest, columns in _FORWARD_COLUMNS if tokens <= largest)
    strips, rows = -(-tokens // LARGEST_TILE), min(LARGEST_TILE, _power_of_two(tokens))
    return _launch(dtype, dot_precision(dtype), tokens, head_dim, 1, choices, columns, 0, strips, rows)


def choose_rows(dtype: torch.dtype, tokens: int, head_dim: int) -> list[Tile]:
    """The launches of the backward pass over queries; between them, each row is in one strip or in the rest."""
    choices = _ROWS_SCALAR if dot_precision(dtype) == "ieee" else _ROWS
    if _is_slim(dtype, head_dim) and 2 * LARGEST_TILE < tokens <= _LARGEST_WITH_BIAS:
        # Beside bias and bias gradient of a strip, wider chunks spill more. The 16 rows or fewer that are left find in
        # the second-level cache what the strips have just read; in a launch of their own they would read it all again.
        strips = _launch(dtype, dot_precision(dtype), tokens, head_dim, 2, choices, 32, 0, 2, LARGEST_TILE)
        return [strips._replace(rest=16)]
    return _launches(dtype, dot_precision(dtype), tokens, head_dim, choices)


def choose_keys(dtype: torch.dtype, tokens: int, head_dim: int) -> list[Tile]:
    """The launches of the backward pass over keys, of windows that are more than one tile."""
    return _launches(dtype, dot_precision(dtype), tokens, head_dim, _KEYS)


def choose_bias_gradient(dtype: torch.dtype, tokens: int, head_dim: int, masked: bool) -> Tile | None:
    """The launch of the pass over tiles of the bias gradient; none where the pass over queries computes it."""
    if tokens <= _LARGEST_WITH_BIAS:
        return None
    strips, channels = -(-tokens // LARGEST_TILE), padded_head_dim(head_dim)
    stage = 4 * LARGEST_TILE * channels * dtype.itemsize
    stages, programs = _fitting(_BIAS_MASKED if masked else _BIAS, lambda stages: stages * stage)
    return Tile(0, strips, LARGEST_TILE, LARGEST_TILE, 0, 4, stages, programs)


class ChannelTiles(NamedTuple):
    """Launches of windows whose channels come in chunks, which `columns` counts here."""

    forward: Tile
    backward: Tile


def choose_channels(tokens: int, head_dim: int, precision: str) -> ChannelTiles:
    """The launches of windows tiled along the head dimension; a pure function of the shape class."""
    rows = min(LARGEST_TILE, _power_of_two(tokens))
    if precision == "ieee":  # compiled, not timed
        return ChannelTiles(Tile(0, 1, rows, 16, 0, 4, 3, 3), Tile(0, 1, rows, 16, 0, 8, 2, 2))
    # Measured on an H100 80GB HBM3, torch 2.11, Triton 3.6: windows-channels.txt and windows-tf32.txt in
    # docs/results/profiles.
    is_long = padded_head_dim(head_dim) > 128
    halved = not is_long and _is_halved(torch.float32, precision, rows)
    backward = Tile(0, 1, rows, 32, 0, 8 if is_long else 4, 3, 2, halved=halved)
    return ChannelTiles(Tile(0, 1, rows, 32, 0, 4, 3, 2), backward)


def _is_halved(dtype: torch.dtype, precision: str, rows: int) -> bool:
    """TF32 on four warps or more; fewer read fp32 along either side of a tile, and lack the registers for halves."""
    return dtype == torch.float32 and precision == "tf32" and rows == LARGEST_TILE


def _is_slim(dtype: torch.dtype, head_dim: int) -> bool:
    """Half precision, at most 32 channels: what launches were tuned for above 64 tokens."""
    return dtype != torch.float32 and padded_head_dim(head_dim) <= 32


@cache
def _launches(dtype: torch.dtype, precision: str, tokens: int, head_dim: int, choices: Choices) -> list[Tile]:
    """Launches of a backward pass. If strips of 64 rows leave 32 or fewer, these get a launch of their own."""
    whole, left = divmod(tokens, LARGEST_TILE)
    # One or two warps have no registers for the gradients of many channels.
    if whole == 0 or not 0 < left <= LARGEST_TILE // 2 or padded_head_dim(head_dim) > LARGEST_TILE:
        strips = [(0, whole + (left > 0), min(LARGEST_TILE, _power_of_two(tokens)))]
    else:
        strips = [(0, whole, LARGEST_TILE), (whole * LARGEST_TILE, 1, _power_of_two(left))]
    return [_launch(dtype, precision, tokens, head_dim, 2, choices, LARGEST_TILE, *strip) for strip in strips]


@cache
def _launch(
    dtype: torch.dtype, precision: str, tokens: int, head_dim: int, row_tensors: int, choices: Choices,
    columns: int, first: int, strips: int, rows: int,
) -> Tile:  # fmt: skip
    """The launch for some strips of rows, from the first: with as many stages as shared memory holds."""
    columns = min(columns, _power_of_two(tokens))
    left = tokens % columns
    tail = _power_of_two(left) % columns if tokens > columns and left else 0
    width = tokens // columns * columns + tail if tail else -(-tokens // columns) * columns
    channels = padded_head_dim(head_dim)
    stage = (rows * row_tensors + width * 2) * channels * dtype.itemsize
    # What goes from the registers through shared memory: the output, or the gradient of the scores.
    scratch = rows * (channels if row_tensors == 1 else columns) * dtype.itemsize
    halved = row_tensors == 2 and _is_halved(dtype, precision, rows)
    if halved:
        scratch += (width + rows) * channels * dtype.itemsize
    if rows < LARGEST_TILE:
        choices = _SMALL if tokens <= rows else _SMALL_CHUNKS
    # Only products of four warps read a tile from shared memory while the next is written there.
    spare = 0 if rows == LARGEST_TILE and not halved else 1
    stages, programs = _fitting(choices, lambda stages: (stages - spare) * stage + scratch)
    # 16 rows per warp are what the matrix units work on; many channels and scalar products are spread over more.
    warps = rows // 16 * (2 if precision == "ieee" else 1)
    if rows < LARGEST_TILE:
        warps = max(warps, min(4, channels // 64))
    return Tile(first, strips, rows, columns, tail, warps, stages, programs, halved=halved)


def _fitting(choices: Choices, shared_memory: Callable[[int], int]) -> tuple[int, int]:
    """The first choice whose programs have room for their stages; the last if none has."""
    fitting = (choice for choice in choices if choice[1] * shared_memory(choice[0]) <= _SHARED_MEMORY)
    return next(fitting, choices[-1])


def _power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())
