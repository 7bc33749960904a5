"""Which windows the short kernels take, and their tile shapes, as data.

Nothing here depends on the number of windows, so a shape compiles once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from .arguments import padded_head_dim

LARGEST_TOKENS = 256
_LARGEST_TENSOR = 64 * 1024


class Tile(NamedTuple):
    """How one pass runs.

    Args:
        rows: queries (or, for the gradients of keys and values, keys) that a program owns.
        main, tail: columns, powers of two; the tail can be 0.
        warps, stages: of Triton.
        programs: per multiprocessor, as many as run at once.
    """

    rows: int
    main: int
    tail: int
    warps: int
    stages: int
    programs: int


def fits_on_chip(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether the short kernels take windows of N tokens: keys and values of one head, 64 KiB each at most, on chip."""
    rows = -(-tokens // 16) * 16
    return tokens <= LARGEST_TOKENS and rows * padded_head_dim(head_dim) * itemsize <= _LARGEST_TENSOR


def count_parts(device: torch.device, tile: Tile, windows: int, programs_per_part: int) -> int:
    """Into how many parts the windows are cut so that the programs of all parts fill the GPU once."""
    return max(1, min(windows, _multiprocessors(device) * tile.programs // programs_per_part))


@cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter any number will do; several parts are better tested than one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def columns_of(tokens: int) -> tuple[int, int]:
    """The fewest columns that hold N tokens as one power of two, or as two of which the second is the tail."""
    whole = max(16, 1 << (tokens - 1).bit_length())
    main = whole // 2
    tail = max(16, 1 << (tokens - main - 1).bit_length()) if main >= 16 else 0
    return (main, tail) if 64 <= main and main + tail < whole else (whole, 0)


def choose_forward(dtype: torch.dtype, tokens: int, head_dim: int) -> Tile:
    """The tile of the forward pass."""
    main, tail = columns_of(tokens)
    rows = min(64, main)
    return Tile(rows, main, tail, 4 if rows == 64 else 1, 3, 4)


def choose_rows(dtype: torch.dtype, tokens: int, head_dim: int) -> Tile:
    """The tile of the backward pass over queries."""
    main, tail = columns_of(tokens)
    rows = min(64, main)
    return Tile(rows, main, tail, 4 if rows == 64 else 1, 2, 2)


def choose_keys(dtype: torch.dtype, tokens: int, head_dim: int) -> Tile:
    """The tile of the backward pass over keys, of windows that are more than one strip."""
    main, tail = columns_of(tokens)
    return Tile(min(64, main), main, tail, 8, 2, 1)
