"""Tile shapes of the kernels for long windows, as data; a shape class compiles once.

Nothing here depends on the number of windows but `companions`, which has one value for a single image and one for all
other numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .arguments import padded_head_dim


class Tile(NamedTuple):
    """One pass: rows and columns of its matrix tiles, windows that share an addend tile, warps, pipeline stages."""

    rows: int
    columns: int
    companions: int
    warps: int
    stages: int


class Config(NamedTuple):
    """The tiles of every pass."""

    forward: Tile
    dq: Tile
    dkv: Tile
    bias: Tile


# By largest padded head dimension.
_HALF = (
    (32, Config(Tile(128, 64, 2, 8, 2), Tile(128, 64, 2, 8, 2), Tile(128, 64, 1, 8, 2), Tile(128, 64, 1, 8, 3))),
    (64, Config(Tile(128, 64, 1, 8, 2), Tile(128, 64, 1, 8, 2), Tile(128, 64, 1, 8, 2), Tile(128, 64, 1, 8, 2))),
    (128, Config(Tile(128, 64, 1, 8, 2), Tile(64, 64, 1, 4, 1), Tile(64, 64, 1, 8, 1), Tile(64, 64, 1, 4, 1))),
    (256, Config(Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 8, 1), Tile(64, 32, 1, 8, 1), Tile(64, 32, 1, 8, 1))),
)
_SINGLE = (
    (64, Config(Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 4, 1), Tile(64, 32, 1, 4, 1), Tile(64, 32, 1, 4, 1))),
    (128, Config(Tile(64, 32, 1, 8, 1), Tile(32, 32, 1, 4, 1), Tile(32, 32, 1, 4, 1), Tile(32, 32, 1, 4, 1))),
    (256, Config(Tile(32, 32, 1, 8, 1), Tile(32, 32, 1, 8, 1), Tile(32, 32, 1, 8, 1), Tile(32, 32, 1, 8, 1))),
)


def choose_long(dtype: torch.dtype, head_dim: int, images: int, has_cosines: bool) -> Config:
    """The tiles of every pass; a pure function of dtype, head dimension, one image or more, and cosines or products."""
    table = _SINGLE if dtype == torch.float32 else _HALF
    config = next(entry[1] for entry in table if padded_head_dim(head_dim) <= entry[0])
    if images == 1:
        config = Config(*(tile._replace(companions=1) for tile in config))
    if has_cosines:
        # Their sums take the registers of half a tile.
        config = config._replace(dq=config.dq._replace(columns=32, companions=1))
    return config
