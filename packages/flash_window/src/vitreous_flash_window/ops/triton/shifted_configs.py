"""Which windows of the packed image the short kernels take, and their tiles, as data.

Nothing here depends on the batch or the image's size, so a shape class compiles once.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from .arguments import padded_head_dim

LARGEST_TILE = 64
"""Windows of so many tokens are one tile of scores."""

_LARGEST_TENSOR = 32 * 1024


class Tile(NamedTuple):
    """How one pass cuts a window's score matrix, and how it runs.

    Args:
        rows: that a program owns: queries, or keys in the pass over keys.
        chunk: columns are visited in chunks of this many.
        warps, stages: of Triton.
        programs: per multiprocessor, as many as run at once.
        registers: most of a thread, where the last of those programs would not fit without a limit.
        cost_of_a_wave: in windows: reading the bias, filling the pipeline, writing the partial bias gradient.
    """

    rows: int
    chunk: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None
    cost_of_a_wave: int = 2

    def strips(self, tokens: int) -> int:
        """Programs that share a window."""
        return -(-tokens // self.rows)

    def options(self, tokens: int) -> dict[str, Any]:
        """As keyword arguments of a launch. The last chunk is as narrow as it can be: 144 = 64 + 64 + 16."""
        chunks = -(-tokens // self.chunk)
        return {
            "ROWS": self.rows, "CHUNKS": chunks, "CHUNK": self.chunk, "STAGES": self.stages,
            "LAST": _power(tokens - self.chunk * (chunks - 1)),
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers,
        }  # fmt: skip


class Config(NamedTuple):
    """Tiles of the passes. Without a pass over `keys`, a window is one tile and `queries` computes every gradient.

    Without a pass over tiles of the `bias` gradient, that over queries sums it.
    """

    forward: Tile
    queries: Tile
    keys: Tile | None
    bias: Tile | None


@cache  # asked for at every call
def fits_on_chip(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether these kernels take windows of N tokens: 32 KiB at most for the keys of one head, padded."""
    return tokens <= 256 and _power(tokens) * padded_head_dim(head_dim) * itemsize <= _LARGEST_TENSOR


# Measured on an H100 80GB HBM3, torch 2.11, Triton 3.6: stages, and programs per multiprocessor. Fewer stages where a
# multiprocessor's shared memory would not hold them.
_FORWARD, _BACKWARD = (4, 2), (3, 2)
# The same where a window is several chunks, and the width of a chunk. Timed for 144 tokens, half precision and 32
# channels; for the bias gradient and for cosines chosen by registers.
_FORWARD_CHUNKS, _QUERIES_CHUNKS, _KEYS_CHUNKS, _KEYS_NARROW = (3, 2, 64), (3, 2, 32), (3, 2, 64), (3, 2, 32)
_BIAS, _BIAS_SLIM, _BIAS_REGISTERS = (3, 2, 64), (3, 3, 64), 168
_SHARED_MEMORY = 227 * 1024

LARGEST_WAVES = 4
"""Waves that windows of several chunks may be dealt in; smaller windows fill the GPU once."""

_FORWARD_WAVE = 4
"""`Tile.cost_of_a_wave` of the forward pass, whose windows take less time: it lost by three waves that saved 6 windows
of 42, and won by two that saved 10 of 32."""

_LARGEST_WITH_BIAS = 144
"""N up to which the pass over queries has registers for the bias gradient beside the bias; cosines leave it none."""


@lru_cache
def choose(tokens: int, head_dim: int, dtype: torch.dtype, precision: str, cosine: bool) -> Config:
    """The tiles of every pass; a pure function of the shape class."""
    rows = min(_power(tokens), LARGEST_TILE)
    # Products in full fp32 are no matrix instructions: more threads share their registers.
    warps = 8 if precision == "ieee" else max(rows * padded_head_dim(head_dim) // (64 * 128), 1) * rows // 16
    row_bytes = padded_head_dim(head_dim) * dtype.itemsize

    def tile(own: int, walked: int, stages: int, programs: int, chunk: int, width: int = tokens) -> Tile:
        """`own` tensors of the program's rows and `walked` ones of `width` more are loaded ahead."""
        programs *= max(4 // warps, 1)
        stage = (own * rows + walked * max(width, rows)) * row_bytes
        room = _SHARED_MEMORY // programs - 2 * rows * chunk * dtype.itemsize
        while programs > 1 and room < stage:
            programs -= 1
            room = _SHARED_MEMORY // programs - 2 * rows * chunk * dtype.itemsize
        return Tile(rows, chunk, warps, max(min(stages, room // stage), 1), programs)

    if tokens <= LARGEST_TILE:
        return Config(tile(1, 2, *_FORWARD, rows), tile(2, 2, *_BACKWARD, rows), None, None)
    # Half precision and at most 32 channels: registers suffice for wide chunks of keys, and for a third program.
    slim = row_bytes <= 64
    bias = None
    if cosine or tokens > _LARGEST_WITH_BIAS:
        bias = tile(2, 2, *(_BIAS_SLIM if slim else _BIAS), rows)
        bias = bias._replace(registers=_BIAS_REGISTERS if slim else None)
    return Config(
        tile(1, 2, *_FORWARD_CHUNKS)._replace(cost_of_a_wave=_FORWARD_WAVE),
        tile(3, 2, *_QUERIES_CHUNKS),
        tile(2, 2, *(_KEYS_CHUNKS if slim and not cosine else _KEYS_NARROW)),
        bias,
    )


@lru_cache(maxsize=1024)
def deal(
    zones: tuple[int, ...], owners: int, programs: int, waves: int, cost_of_a_wave: int, device: torch.device
) -> tuple[int, int]:
    """Deal out the windows of a batch: most windows of a part, all of one zone, and the number of parts.

    Args:
        zones: windows of each zone, see `image_addressing`.
        owners: programs per part.
        programs: of each multiprocessor at once; parts fill the GPU as often as `waves` where windows suffice.
        waves: at most so many, where small parts leave less of the GPU idle than large ones.
        cost_of_a_wave: in windows.
        device: of the tensors.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    slots = multiprocessors * programs

    def fill(waves: int) -> tuple[int, int]:
        most = max(waves * slots // owners, sum(size > 0 for size in zones))
        load = -(-sum(zones) // most)
        while sum(-(-size // load) for size in zones) > most:
            load += load // 256 + 1
        return load, sum(-(-size // load) for size in zones)

    def cost(dealt: tuple[int, int]) -> int:
        load, parts = dealt
        return -(-parts * owners // slots) * (load + cost_of_a_wave)

    return min((fill(wave) for wave in range(1, waves + 1)), key=cost)


def _power(number: int) -> int:
    """The power of two that holds a number; matrix tiles are 16 wide at least."""
    return max(16, 1 << (number - 1).bit_length())
