"""Tile shapes of the kernels for long windows, as data; a shape class compiles once.

Nothing here depends on the number of windows but `companions`, which has one value for a single image and one for all
other numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .arguments import padded_head_dim


class Tile(NamedTuple):
    """One pass.

    Args:
        rows, columns: of its matrix tiles.
        companions: windows that share a tile of the bias.
        warps, stages: of its programs, and of the software pipeline.
        registers: limit per thread, so that one more program fits a multiprocessor; 0: as the compiler likes.
    """

    rows: int
    columns: int
    companions: int
    warps: int
    stages: int
    registers: int = 0


class Config(NamedTuple):
    """The tiles of every pass."""

    forward: Tile
    dq: Tile
    dkv: Tile
    bias: Tile


# By largest padded head dimension. Small programs, of four warps and 64 rows, hide the latencies of each other better
# than large ones; then the traffic from the second-level cache bounds them, which companions reduce.
_HALF = (
    (
        32,
        Config(Tile(64, 64, 2, 4, 2), Tile(64, 32, 2, 4, 3), Tile(64, 32, 2, 4, 3, 168), Tile(64, 64, 1, 4, 3)),
    ),
    (64, Config(Tile(64, 64, 2, 4, 2), Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 4, 2), Tile(64, 64, 1, 4, 3))),
    (128, Config(Tile(64, 64, 1, 4, 2), Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 4, 1), Tile(64, 32, 1, 4, 2))),
    (256, Config(Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 8, 1), Tile(64, 32, 1, 8, 1), Tile(64, 32, 1, 8, 1))),
)
_TF32 = (
    (32, Config(Tile(64, 64, 1, 4, 2), Tile(64, 64, 1, 4, 2), Tile(64, 32, 1, 4, 2), Tile(64, 64, 1, 4, 2))),
    (64, Config(Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 4, 2))),
    (128, Config(Tile(64, 32, 1, 4, 2), Tile(64, 16, 1, 4, 1), Tile(64, 16, 1, 4, 1), Tile(64, 16, 1, 4, 1))),
    (256, Config(Tile(32, 32, 1, 8, 1), Tile(32, 32, 1, 8, 1), Tile(32, 32, 1, 8, 1), Tile(32, 32, 1, 8, 1))),
)
# Products without matrix units hold their operands in registers.
_IEEE = (
    (32, Config(Tile(64, 32, 1, 4, 2), Tile(64, 32, 1, 4, 1), Tile(64, 32, 1, 4, 1), Tile(64, 32, 1, 4, 1))),
    (64, Config(Tile(32, 32, 1, 4, 1), Tile(32, 16, 1, 4, 1), Tile(32, 32, 1, 4, 1), Tile(64, 32, 1, 8, 1))),
    (128, Config(Tile(32, 16, 1, 4, 1), Tile(32, 16, 1, 4, 1), Tile(32, 16, 1, 4, 1), Tile(32, 16, 1, 4, 1))),
    (256, Config(Tile(16, 32, 1, 4, 1), Tile(32, 16, 1, 8, 1), Tile(32, 16, 1, 8, 1), Tile(32, 16, 1, 4, 1))),
)


def choose_long(dtype: torch.dtype, precision: str, head_dim: int, images: int, has_cosines: bool) -> Config:
    """The tiles of every pass; a pure function.

    Args:
        dtype: of queries, keys and values.
        precision: `"ieee"` or `"tf32"`, of fp32 products.
        head_dim: D.
        images: only whether there is more than one counts.
        has_cosines: whether scores are cosines.
    """
    single = _IEEE if precision == "ieee" else _TF32
    table = single if dtype == torch.float32 else _HALF
    config = next(entry[1] for entry in table if padded_head_dim(head_dim) <= entry[0])
    if images == 1:
        config = Config(*(tile._replace(companions=1) for tile in config))
    if has_cosines:
        # Norms and sums take the registers of half a tile.
        config = config._replace(
            dq=config.dq._replace(columns=32, companions=1), dkv=config.dkv._replace(companions=1, registers=0)
        )
    return config
