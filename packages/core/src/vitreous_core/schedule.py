"""`Schedule`: how kernels walk over a pattern, tile by tile, in the pattern's own geometry.

A block list speaks of aligned runs of tokens. A schedule does not: its tiles are runs of the sequence (patterns on
the sequence), rectangles of cells (patterns on the image) or blocks (predicates), and what a tile must visit is one
run, one rectangle or one list of blocks, with no alignment. A row of a matrix tile is at least 32 bytes long, so
gathering rows by token costs about what reading them in order does. So the visited pairs do not depend on the token
order, only their locality does.

There are two sides: rows are queries and columns keys (forward, gradient of queries), or the other way round
(gradients of keys and values). First and last visible cell never decrease along an axis in any geometric pattern;
therefore the queries that see a key are a run (a rectangle) too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

SEQUENCE, IMAGE, BLOCKS = 0, 1, 2

ROWS_PER_TILE = (32, 64, 128)
"""Rows of the matrix tiles that tables exist for."""

BIT_BLOCK = 64
"""Side of the blocks that a predicate is cut into."""

Axis = tuple[NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True, eq=False)
class Tiles:
    """One side's work, cut for matrix tiles of one height.

    Args:
        table: int32 `[T, 9]`: half-open ranges of the rows' own cells (y, then x) and of the cells to visit (y, then
            x), and a shift. On the sequence y is 0..1 and x the token. For blocks: the first row within its bit
            block, 0, the tokens, 0, 0, and a range of entries of `Side.bounds`.
            The visited rectangle is walked row by row, each row padded to `2 ** shift` columns: then telling
            y from x takes a shift and a mask, and x does not change from step to step.
        masked: whether some row of some tile sees less than its tile visits.
        closed: whether every tile visits exactly its own cells.
        column_multiple: a number that divides the columns of every tile, 1 if any has padding.
        row_multiple: a number that divides the rows of every tile.
    """

    table: Tensor
    masked: bool
    closed: bool
    column_multiple: int
    row_multiple: int


@dataclass(frozen=True, eq=False)
class Side:
    """Rows and columns of one role.

    Args:
        tiles: for each entry of `ROWS_PER_TILE`.
        bounds: int32 `[n, 2]`. Sequence: first visible token and one past the last, per row token. Image: the same
            per row of cells, then per column of cells. Blocks: column block and its index into `bits`.
        bits: int32 `[P, BIT_BLOCK, 2]` for blocks, else empty: visible columns of every row of a block, lowest bit
            first.
    """

    tiles: tuple[Tiles, ...]
    bounds: Tensor
    bits: Tensor

    def at(self, rows: int) -> Tiles:
        """The tiles of a height out of `ROWS_PER_TILE`."""
        return self.tiles[ROWS_PER_TILE.index(rows)]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Both sides of a pattern.

    Args:
        geometry: `SEQUENCE`, `IMAGE` or `BLOCKS`.
        queries: rows are queries, columns keys.
        keys: rows are keys, columns queries.
        height, width: the grid in residue-major cells (see `layout.BoxRule`).
        position: int32 `[L]`, token of every residue-major cell; empty when each cell is its token.
    """

    geometry: int
    queries: Side
    keys: Side
    height: int
    width: int
    position: Tensor

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with every tensor on `device`."""

        def move(side: Side) -> Side:
            tiles = tuple(replace(tiles, table=tiles.table.to(device)) for tiles in side.tiles)
            return Side(tiles, side.bounds.to(device), side.bits.to(device))

        return replace(
            self,
            queries=move(self.queries),
            keys=move(self.keys),
            position=self.position.to(device),
        )


def sequence_schedule(start: NDArray[np.int32], stop: NDArray[np.int32]) -> Schedule:
    """Schedule of intervals: token `i` sees `start[i] <= j < stop[i]`, both never decreasing."""
    sides = []
    for axis in ((start, stop), _transposed(start, stop)):
        tiles = tuple(_sequence_tiles(axis, rows) for rows in ROWS_PER_TILE)
        sides.append(Side(tiles, _tensor(np.stack(axis, axis=1)), _empty()))
    return Schedule(SEQUENCE, sides[0], sides[1], height=1, width=len(start), position=_empty())


def image_schedule(rows: Axis, columns: Axis, position: NDArray[np.int32] | None) -> Schedule:
    """Schedule of boxes that are products of a rule for rows and a rule for columns.

    Args:
        rows, columns: first visible cell and one past the last along the axis, per residue-major cell; neither ever
            decreases.
        position: int32 `[height, width]`, token of every residue-major cell; None when it is the cell's own index.
    """
    sides = []
    for y, x in ((rows, columns), (_transposed(*rows), _transposed(*columns))):
        tiles = tuple(_image_tiles(y, x, block) for block in ROWS_PER_TILE)
        bounds = np.concatenate((np.stack(y, axis=1), np.stack(x, axis=1)))
        sides.append(Side(tiles, _tensor(bounds), _empty()))
    table = _empty() if position is None else _tensor(position.ravel())
    return Schedule(IMAGE, sides[0], sides[1], height=len(rows[0]), width=len(columns[0]), position=table)


def block_schedule(rows: Callable[[int, int], NDArray[np.bool_]], length: int) -> Schedule:
    """Schedule of any predicate.

    Args:
        rows: `rows(low, high)` is the mask of those queries, bool `[high - low, length]`.
        length: tokens.
    """
    blocks = -(-length // BIT_BLOCK)
    pairs, bits, transposed_bits = [], [], []
    for block in range(blocks):
        low, high = block * BIT_BLOCK, min((block + 1) * BIT_BLOCK, length)
        padded = np.zeros((BIT_BLOCK, blocks * BIT_BLOCK), dtype=np.bool_)
        padded[: high - low, :length] = rows(low, high)
        tiles = padded.reshape(BIT_BLOCK, blocks, BIT_BLOCK).swapaxes(0, 1)
        listed = np.flatnonzero(tiles.any((1, 2)))
        pairs.append(np.stack((np.full_like(listed, block), listed), axis=1))
        bits.append(_packed(tiles[listed]))
        transposed_bits.append(_packed(tiles[listed].swapaxes(1, 2)))
    pair = np.concatenate(pairs)
    sides = [
        _block_side(pair, np.concatenate(bits), length),
        _block_side(pair[:, ::-1], np.concatenate(transposed_bits), length),
    ]
    return Schedule(BLOCKS, sides[0], sides[1], height=1, width=length, position=_empty())


def _block_side(pair: NDArray[np.int64], bits: NDArray[np.int32], length: int) -> Side:
    blocks = -(-length // BIT_BLOCK)
    entries = np.lexsort((pair[:, 1], pair[:, 0]))
    first = np.searchsorted(pair[entries, 0], np.arange(blocks + 1))
    all_tiles = []
    for rows in ROWS_PER_TILE:
        # A matrix tile never spans two bit blocks: what one block visits the other need not.
        start = np.arange(0, length, min(rows, BIT_BLOCK))
        stop = np.minimum(start + min(rows, BIT_BLOCK), length)
        block, zero = start // BIT_BLOCK, np.zeros_like(start)
        table = np.stack(
            (start % BIT_BLOCK, zero, start, stop, zero, zero, first[block], first[block + 1], zero), axis=1
        )
        all_tiles.append(Tiles(_tensor(table), masked=True, closed=False, column_multiple=1, row_multiple=1))
    bounds = np.stack((pair[entries, 1], entries), axis=1)
    # An empty mask still needs something to point at.
    bits = bits if len(bits) else np.zeros((1, BIT_BLOCK, BIT_BLOCK // 32), dtype=np.int32)
    bounds = bounds if len(bounds) else np.zeros((1, 2), dtype=np.int32)
    return Side(tuple(all_tiles), _tensor(bounds), _tensor(bits))


def _packed(tiles: NDArray[np.bool_]) -> NDArray[np.int32]:
    tiles = np.ascontiguousarray(tiles)
    return np.packbits(tiles, axis=-1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def _sequence_tiles(axis: Axis, rows: int) -> Tiles:
    cuts = _cut_axis(*axis, rows)
    table = np.zeros((len(cuts), 9), dtype=np.int32)
    table[:, (1, 5)] = 1
    table[:, 2:4], table[:, 6:8] = cuts[:, :2], cuts[:, 2:4]
    return Tiles(
        _tensor(table),
        masked=not cuts[:, 4].all(),
        closed=bool(cuts[:, 5].all()),
        column_multiple=int(np.gcd.reduce(cuts[:, 3] - cuts[:, 2])),
        row_multiple=int(np.gcd.reduce(cuts[:, 1] - cuts[:, 0])),
    )


def _image_tiles(y: Axis, x: Axis, rows: int) -> Tiles:
    best, least = None, np.inf
    for tall in _tile_heights(y, x, rows):
        down, across = _cut_axis(*y, tall), _cut_axis(*x, rows // tall)
        visited = (down[:, 3] - down[:, 2])[:, None] << _shifts(across)
        # Matrix tiles of 32 columns, plus what starting a tile costs, in columns; the squarer of equals.
        cost = (-(-visited // 32) * 32 + 64).sum() + 1e-3 * abs(tall - rows // tall)
        if cost < least:
            best, least = (down, across), cost
    assert best is not None
    down, across = best
    shift = _shifts(across)
    table = np.empty((len(down), len(across), 9), dtype=np.int32)
    table[..., 0:2], table[..., 2:4] = down[:, None, :2], across[None, :, :2]
    table[..., 4:6], table[..., 6:8] = down[:, None, 2:4], across[None, :, 2:4]
    table[..., 8] = shift
    visited = (down[:, 3] - down[:, 2])[:, None] << shift
    # Heavy tiles first: at the border a key is seen by more queries, and the last wave should be short.
    table = table.reshape(-1, 9)[np.argsort(-visited, axis=None, kind="stable")]
    is_padded = (across[:, 3] - across[:, 2] != 1 << shift).any()
    return Tiles(
        _tensor(table),
        masked=not (down[:, 4].all() and across[:, 4].all()),
        closed=bool(down[:, 5].all() and across[:, 5].all()),
        column_multiple=1 if is_padded else int(np.gcd.reduce(visited.ravel())),
        row_multiple=int(np.gcd.reduce(np.outer(down[:, 1] - down[:, 0], across[:, 1] - across[:, 0]).ravel())),
    )


def _shifts(cuts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Exponents of the powers of two that hold what each cut visits."""
    return np.frexp(cuts[:, 3] - cuts[:, 2] - 1)[1]


def _tile_heights(y: Axis, x: Axis, rows: int) -> list[int]:
    """Heights worth trying: powers of two and what fits the components (windows) of either axis."""
    tall, wide = (int(np.diff(_component_starts(*axis), append=len(axis[0])).max()) for axis in (y, x))
    heights = {2**k for k in range(rows.bit_length())}
    heights |= {tall, rows // min(wide, rows), tall * max(rows // (tall * wide), 1)}
    return sorted(height for height in heights if 1 <= height <= rows)


def _component_starts(start: NDArray[np.int32], stop: NDArray[np.int32]) -> NDArray[np.int64]:
    """First cells of the runs that see nothing of each other: windows, residues of a dilation."""
    # Cell c starts a run when nothing before c reaches c and nothing from c on reaches before c.
    cell = np.arange(1, len(start))
    return np.concatenate(([0], cell[(stop[:-1] <= cell) & (start[1:] >= cell)]))


def _cut_axis(start: NDArray[np.int32], stop: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """Cut an axis into runs of at most `size` cells that visit little.

    Components longer than `size` are cut evenly. Others are put together while they fit, but only where two of the
    longest do: joining a lone short window to its neighbour would make every tile mask.

    Returns:
        int32 `[n, 6]`: the run, the cells it visits, whether every cell of the run sees all of these, and whether
        they are the run itself.
    """
    return _cut(start, stop, _component_starts(start, stop), size)


@njit(cache=True)
def _cut(start, stop, component_starts, size):  # type: ignore[no-untyped-def]
    length = len(start)
    cuts = np.empty((length, 6), dtype=np.int32)
    longest = length - component_starts[-1]
    for index in range(1, len(component_starts)):
        longest = max(longest, component_starts[index] - component_starts[index - 1])
    used = 0
    index = 0
    while index < len(component_starts):
        first = component_starts[index]
        index += 1
        last = component_starts[index] if index < len(component_starts) else length
        while 2 * longest <= size and index < len(component_starts):
            longer = component_starts[index + 1] if index + 1 < len(component_starts) else length
            if longer - first > size:
                break
            last = longer
            index += 1
        parts = (last - first + size - 1) // size
        for part in range(parts):
            low = first + (last - first) * part // parts
            high = first + (last - first) * (part + 1) // parts
            cuts[used, 0], cuts[used, 1] = low, high
            cuts[used, 2], cuts[used, 3] = start[low], stop[high - 1]
            cuts[used, 4] = start[low] == start[high - 1] and stop[low] == stop[high - 1]
            cuts[used, 5] = start[low] == low and stop[high - 1] == high
            used += 1
    return cuts[:used]


def _transposed(start: NDArray[np.int32], stop: NDArray[np.int32]) -> Axis:
    """First row that sees each column, and one past the last."""
    assert all((np.diff(bound) >= 0).all() for bound in (start, stop)), "bounds must never decrease"
    cell = np.arange(len(start))
    first, last = np.searchsorted(stop, cell, side="right"), np.searchsorted(start, cell, side="right")
    return first.astype(np.int32), last.astype(np.int32)


def _tensor(array: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.int32)
