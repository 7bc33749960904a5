"""Which windows the short kernels take, and their tile shapes, as data.

Nothing here depends on the number of windows, so a shape compiles once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from .arguments import padded_head_dim

LARGEST_TOKENS = 256
LARGEST_TILE = 64
_LARGEST_TENSOR = 32 * 1024


class Tile(NamedTuple):
    """How one pass runs.

    Args:
        rows: queries (or, for the gradients of keys and values, keys) that a program owns.
        columns, tail: width of the chunks that the other side comes in, and of the last one; 0: like the others.
        warps, stages: of Triton.
        programs: per multiprocessor, as many as run at once.
    """

    rows: int
    columns: int
    tail: int
    warps: int
    stages: int
    programs: int


def fits_on_chip(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether the short kernels take windows of N tokens: keys and values of one head, 32 KiB each at most, on chip."""
    rows = -(-tokens // 16) * 16
    return tokens <= LARGEST_TOKENS and rows * padded_head_dim(head_dim) * itemsize <= _LARGEST_TENSOR


def keeps_statistics(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether the backward pass needs output and log-sum-exp: not where one tile holds all scores of a window."""
    return tokens > LARGEST_TILE or not fits_on_chip(tokens, head_dim, itemsize)


def count_parts(device: torch.device, tile: Tile, windows: int, programs_per_part: int) -> int:
    """Among how many parts the windows are divided so that the programs of all parts fill the GPU once."""
    return max(1, min(windows, _multiprocessors(device) * tile.programs // programs_per_part))


@cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter any number will do; several parts are better tested than one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())


def _tile(tokens: int, warps: int, stages: int, programs: int) -> Tile:
    """A tile of 16 rows per warp; chunks of as many columns, the last as narrow as it can be."""
    if tokens <= LARGEST_TILE:
        side = _power_of_two(tokens)
        return Tile(side, side, 0, max(1, side // 16), stages, programs)
    rest = tokens % LARGEST_TILE
    tail = _power_of_two(rest) if rest else 0
    return Tile(16 * warps, LARGEST_TILE, tail if tail < LARGEST_TILE else 0, warps, stages, programs)


def choose_forward(dtype: torch.dtype, tokens: int, head_dim: int) -> Tile:
    """The tile of the forward pass."""
    return _tile(tokens, 4, 3, 2)


def choose_rows(dtype: torch.dtype, tokens: int, head_dim: int) -> Tile:
    """The tile of the backward pass over queries."""
    return _tile(tokens, 4, 2, 2)


def choose_keys(dtype: torch.dtype, tokens: int, head_dim: int) -> Tile:
    """The tile of the backward pass over keys, of windows that are more than one tile."""
    return _tile(tokens, 4, 2, 2)
