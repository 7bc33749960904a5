"""Which windows of the packed image the short kernels take, and their tiles, as data.

Nothing here depends on the batch or the image's size, so a shape class compiles once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .arguments import padded_head_dim

CHUNK = 64
_LARGEST_TENSOR = 32 * 1024


class Tile(NamedTuple):
    """How one pass cuts a window's score matrix, and how it runs.

    Args:
        rows: that a program owns: queries, or keys in the pass over keys.
        chunks, last: the columns come in chunks of `CHUNK`, the last one of `last`: 144 tokens are 64 + 64 + 16.
        warps, stages: of Triton.
        programs: per multiprocessor, as many as run at once.
        registers: most that a thread may use; None leaves it to the compiler.
    """

    rows: int
    chunks: int
    last: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None

    def strips(self, tokens: int) -> int:
        """Programs that share a window."""
        return -(-tokens // self.rows)

    def options(self) -> dict[str, int | None]:
        """As keyword arguments of a launch."""
        return {
            "ROWS": self.rows, "CHUNKS": self.chunks, "LAST": self.last, "STAGES": self.stages,
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers,
        }  # fmt: skip


class Config(NamedTuple):
    """Tiles of the passes. Without a pass over `keys`, a window is one tile and `queries` computes every gradient."""

    forward: Tile
    queries: Tile
    keys: Tile | None


def fits_on_chip(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether these kernels take windows of N tokens: 32 KiB at most for the keys of one head, padded."""
    return tokens <= 256 and _power(tokens) * padded_head_dim(head_dim) * itemsize <= _LARGEST_TENSOR


@lru_cache
def choose(tokens: int, head_dim: int, dtype: torch.dtype) -> Config:
    """The tiles of every pass; a pure function of the shape class."""
    chunks = -(-tokens // CHUNK)
    last = max(16, _power(tokens - CHUNK * (chunks - 1)))
    rows = last if chunks == 1 else CHUNK
    wide = dtype == torch.float32 or head_dim > 64
    stages = 1 if wide else 3
    warps = 4 if rows == CHUNK else 1
    if chunks == 1:
        return Config(
            Tile(rows, chunks, last, warps, stages, 4, 128 if warps == 4 and not wide else None),
            Tile(rows, chunks, last, warps, stages, 2),
            None,
        )
    return Config(
        Tile(rows, chunks, last, warps, stages, 2),
        Tile(rows, chunks, last, warps, stages, 2),
        Tile(rows, chunks, last, warps, stages, 2),
    )


@lru_cache(maxsize=1024)
def deal(zones: tuple[int, ...], owners: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Deal out the windows of a batch: most windows of a part, all of one zone, and the number of parts.

    Args:
        zones: windows of each zone, see `image_addressing`.
        owners: programs per part.
        programs: of each multiprocessor at once; parts fill the GPU once where windows suffice.
        device: of the tensors.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    most = max(multiprocessors * programs // owners, sum(size > 0 for size in zones))
    load = -(-sum(zones) // most)
    while sum(-(-size // load) for size in zones) > most:
        load += 1
    return load, sum(-(-size // load) for size in zones)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
