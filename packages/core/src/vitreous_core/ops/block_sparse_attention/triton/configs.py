"""Tile shapes as data: what each pass runs with, by architecture, head dimension and pattern.

Nothing here depends on the batch or the length, so a shape class compiles once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ....schedule import BIT_BLOCK, BLOCKS, Schedule


class Tile(NamedTuple):
    """One pass: rows and columns of its matrix tiles, warps, pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


class Config(NamedTuple):
    """All passes. `closed` is the one-pass backward of tiles that see exactly themselves; rows 0: not used."""

    forward: Tile
    dq: Tile
    dkv: Tile
    closed: Tile
    bias: Tile


_NO_TILE = Tile(0, 0, 0, 0)

# Measured on an H100 80GB HBM3, torch 2.11, Triton 3.6. The last entry of each list fits any
# head dimension.
# Largest head dimension, then (forward, dq, dkv, bias) for half precision.
_HALF = (
    (64, Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
    (128, Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
    (256, Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
)
# Forward of windows that fill several tiles, half precision, head dimension up to 64.
_LARGE_WINDOWS = Tile(128, 64, 8, 4)
_SINGLE = (
    (64, Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
    (128, Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (256, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
)
# Largest rows x head dimension of the one-pass backward, which keeps a whole window's tensors on chip.
_CLOSED_HALF, _CLOSED_SINGLE = 128 * 64, 64 * 64


def choose(dtype: torch.dtype, head_dim: int, schedule: Schedule, groups: int, has_bias: bool) -> Config:
    """The tiles of every pass; a pure function of dtype, head dimension, grouping, pattern and bias or none."""
    table = _SINGLE if dtype == torch.float32 else _HALF
    forward, dq, dkv, bias = next(entry[1:] for entry in table if head_dim <= entry[0])
    if schedule.geometry == BLOCKS:
        forward, dq, dkv, bias = (
            tile._replace(rows=min(tile.rows, BIT_BLOCK), columns=min(tile.columns, BIT_BLOCK))
            for tile in (forward, dq, dkv, bias)
        )
    if has_bias or schedule.queries.at(64).closed:
        # Bias gathers fill the registers of a wider tile; one short step is better cut in two.
        forward = forward._replace(columns=min(forward.columns, 32))
    elif table is _HALF and head_dim <= 64 and not schedule.queries.at(128).masked:
        forward = _LARGE_WINDOWS
    closed = _NO_TILE
    largest = _CLOSED_SINGLE if dtype == torch.float32 else _CLOSED_HALF
    for rows in (64, 128):
        if groups == 1 and schedule.queries.at(rows).closed and rows * head_dim <= largest:
            closed = Tile(rows, rows, 16 if dtype == torch.float32 else rows // 16, 1)
            break
    return Config(forward, dq, dkv, closed, bias)


def for_precision(tile: Tile, head_dim: int, precision: str) -> Tile:
    """The tile that a launch uses, with the same rows: what IEEE products of fp32 need is known only then.

    They are unrolled into multiply-adds. Many per thread take seconds to compile, and those of a 64 x 64 tile spill.
    """
    if precision != "ieee":
        return tile
    return tile._replace(columns=min(tile.columns, 32), warps=8 if head_dim <= 128 else 16)
