"""Which windows the short kernels take, and their tile shapes, as data.

Nothing here depends on the number of windows, so a shape compiles once.
"""

from __future__ import annotations

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
    """

    first: int
    strips: int
    rows: int
    columns: int
    tail: int
    warps: int
    stages: int
    programs: int


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


def keeps_statistics(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether the backward pass needs output and statistics: not where one tile holds all scores of a window."""
    return tokens > LARGEST_TILE or not fits_on_chip(tokens, head_dim, itemsize)


def count_parts(device: torch.device, tile: Tile, windows: int, heads: int) -> int:
    """Among how many parts the windows are divided: so that all programs run at once, or in a few full waves."""
    return _count_parts(_multiprocessors(device) * tile.programs, heads * tile.strips, windows)


@lru_cache(maxsize=1024)
def _count_parts(slots: int, programs_per_part: int, windows: int) -> int:
    def cost(waves: int) -> float:
        parts = min(windows, waves * slots // programs_per_part)
        # Steps of the longest program, and what it takes to begin and end a wave.
        return waves * (-(-windows // parts) + _COST_OF_A_WAVE) if parts else float("inf")

    waves = min(range(1, _LARGEST_WAVES + 1), key=cost)
    return max(1, min(windows, waves * slots // programs_per_part))


@cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter any number will do; several parts are better tested than one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


# Measured on an H100 80GB HBM3, torch 2.11, Triton 3.6: (stages, programs per multiprocessor), best first. The first
# entry that fits into shared memory is taken; the last one always does.
_FORWARD = ((4, 2), (3, 2), (2, 2), (2, 1), (1, 1))
_FORWARD_CHUNKS = ((3, 2), (2, 2), (2, 1), (1, 1))
_ROWS = ((3, 2), (2, 2), (2, 1), (1, 1))
_ROWS_SINGLE = ((2, 2), (2, 1), (1, 1))
_KEYS = ((3, 2), (2, 2), (2, 1), (1, 1))
# Programs of one or two warps: many of them make up for their being narrow.
_SMALL = ((4, 8), (3, 8), (2, 8), (3, 4), (2, 6), (2, 4), (2, 3), (2, 2), (1, 2))
_SMALL_CHUNKS = ((2, 8), (2, 6), (2, 4), (2, 2), (1, 1))

_SHARED_MEMORY = 227 * 1024
"""Of one multiprocessor."""

_LARGEST_WAVES, _COST_OF_A_WAVE = 4, 2
"""The latter in windows: filling the pipeline, reading the bias, writing the partial bias gradient."""

Choices = tuple[tuple[int, int], ...]


def choose_forward(dtype: torch.dtype, tokens: int, head_dim: int) -> list[Tile]:
    """The launches of the forward pass; between them, each row is in one strip."""
    choices = _FORWARD_CHUNKS if tokens > LARGEST_TILE or dtype == torch.float32 else _FORWARD
    return _launches(dtype, dot_precision(dtype), tokens, head_dim, 1, choices, False)


def choose_rows(dtype: torch.dtype, tokens: int, head_dim: int) -> list[Tile]:
    """The launches of the backward pass over queries."""
    choices = _ROWS_SINGLE if dtype == torch.float32 else _ROWS
    return _launches(dtype, dot_precision(dtype), tokens, head_dim, 2, choices, True)


def choose_keys(dtype: torch.dtype, tokens: int, head_dim: int) -> list[Tile]:
    """The launches of the backward pass over keys, of windows that are more than one tile."""
    return _launches(dtype, dot_precision(dtype), tokens, head_dim, 2, _KEYS, True)


@cache
def _launches(
    dtype: torch.dtype, precision: str, tokens: int, head_dim: int, row_tensors: int, choices: Choices, splits: bool
) -> list[Tile]:
    # One or two warps have no registers for the gradients of many channels.
    splits &= padded_head_dim(head_dim) <= LARGEST_TILE
    return [
        _launch(dtype, precision, tokens, head_dim, row_tensors, choices, *strips) for strips in _strips(tokens, splits)
    ]


def _strips(tokens: int, splits: bool) -> list[tuple[int, int, int]]:
    """First row, number and rows of strips: of 64 rows; if `splits`, 32 or fewer that remain get a launch of their own.

    The backward passes gain by it (144 = 64 + 64 + 16, not 3 x 64), the forward pass does not.
    """
    if tokens <= LARGEST_TILE:
        return [(0, 1, _power_of_two(tokens))]
    whole, rest = divmod(tokens, LARGEST_TILE)
    if splits and 0 < rest <= LARGEST_TILE // 2:
        return [(0, whole, LARGEST_TILE), (whole * LARGEST_TILE, 1, _power_of_two(rest))]
    return [(0, whole + (rest > 0), LARGEST_TILE)]


def _launch(
    dtype: torch.dtype, precision: str, tokens: int, head_dim: int, row_tensors: int, choices: Choices,
    first: int, strips: int, rows: int,
) -> Tile:  # fmt: skip
    """The launch for some strips: chunks of 64 columns, and as many stages as shared memory holds."""
    columns = min(LARGEST_TILE, _power_of_two(tokens))
    rest = tokens % columns
    tail = _power_of_two(rest) % columns if tokens > columns and rest else 0
    width = tokens // columns * columns + tail if tail else -(-tokens // columns) * columns
    channels = padded_head_dim(head_dim)
    stage = (rows * row_tensors + width * 2) * channels * dtype.itemsize
    # What goes from the registers through shared memory: the output, or the gradient of the scores.
    scratch = rows * (channels if row_tensors == 1 else columns) * dtype.itemsize
    if rows < LARGEST_TILE:
        choices = _SMALL if tokens <= rows else _SMALL_CHUNKS
    # Only products of four warps read a tile from shared memory while the next is written there.
    spare = 0 if rows == LARGEST_TILE else 1
    stages, programs = next(
        (size for size in choices if size[1] * ((size[0] - spare) * stage + scratch) <= _SHARED_MEMORY), choices[-1]
    )
    # 16 rows per warp are what the matrix units work on; many channels and scalar products are spread over more.
    warps = rows // 16 * (2 if precision == "ieee" else 1)
    if rows < LARGEST_TILE:
        warps = max(warps, min(4, channels // 64))
    return Tile(first, strips, rows, columns, tail, warps, stages, programs)


def _power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())
