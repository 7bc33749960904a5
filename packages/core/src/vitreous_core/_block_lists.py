"""Numba builders of block lists from intervals and boxes, in time linear in what is visible along the border."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Lists = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]


def interval_lists(start: NDArray[np.int32], stop: NDArray[np.int32], query_block: int, key_block: int) -> Lists:
    """Counts, indices and partial flags of the blocks that intervals touch."""
    return _pad(*_interval_lists(start, stop, query_block, key_block))


def box_lists(bounds: NDArray[np.int32], block_of_cell: NDArray[np.int32], query_block: int, key_block: int) -> Lists:
    """Counts, indices and partial flags of the blocks that boxes touch.

    Args:
        bounds: int32 `[L, 4]`, the half-open box (y_start, y_stop, x_start, x_stop) of each query.
        block_of_cell: int32 `[height, width]`, the key block each cell's token falls in.
        query_block, key_block: tokens per block.
    """
    return _pad(*_box_lists(bounds, block_of_cell, query_block, key_block))


def transpose_lists(lists: Lists, key_blocks: int) -> Lists:
    """The same blocks listed per key block."""
    return _pad(*_transpose(*lists, key_blocks))


def _pad(counts: NDArray[np.int32], flat: NDArray[np.int32], flags: NDArray[np.bool_]) -> Lists:
    slots = np.arange(max(int(counts.max(initial=0)), 1), dtype=np.int32) < counts[:, None]
    indices = np.zeros(slots.shape, dtype=np.int32)
    partial = np.zeros(slots.shape, dtype=np.bool_)
    indices[slots], partial[slots] = flat, flags
    return counts, indices, partial


@njit(cache=True)
def _append(flat, flags, used, index, flag):  # type: ignore[no-untyped-def]
    """Append to a growing pair of arrays; returns them, since growing makes new ones."""
    if used == len(flat):
        flat = np.concatenate((flat, np.empty_like(flat)))
        flags = np.concatenate((flags, np.empty_like(flags)))
    flat[used] = index
    flags[used] = flag
    return flat, flags


@njit(cache=True)
def _interval_lists(start, stop, query_block, key_block):  # type: ignore[no-untyped-def]
    length = len(start)
    query_blocks = (length + query_block - 1) // query_block
    key_blocks = (length + key_block - 1) // key_block
    counts = np.zeros(query_blocks, dtype=np.int32)
    flat = np.empty(4 * query_blocks + 16, dtype=np.int32)
    flags = np.empty(len(flat), dtype=np.bool_)
    used = 0
    # Difference arrays over key blocks: queries that touch a block, queries that see all of it.
    touch = np.zeros(key_blocks + 1, dtype=np.int32)
    cover = np.zeros(key_blocks + 1, dtype=np.int32)
    for block in range(query_blocks):
        low, high = key_blocks, 0
        for query in range(block * query_block, min((block + 1) * query_block, length)):
            if stop[query] <= start[query]:
                continue
            first, last = start[query] // key_block, (stop[query] - 1) // key_block
            touch[first] += 1
            touch[last + 1] -= 1
            # A block that reaches past the end is never full: stop <= length keeps it out of this range.
            inner_first, inner_stop = (start[query] + key_block - 1) // key_block, stop[query] // key_block
            if inner_first < inner_stop:
                cover[inner_first] += 1
                cover[inner_stop] -= 1
            low, high = min(low, first), max(high, last + 1)
        touching, covering = 0, 0
        for index in range(low, high):
            touching += touch[index]
            covering += cover[index]
            if touching > 0:
                flat, flags = _append(flat, flags, used, index, covering < query_block)
                used += 1
                counts[block] += 1
        for index in range(low, min(high, key_blocks) + 1):
            touch[index] = 0
            cover[index] = 0
    return counts, flat[:used], flags[:used]


@njit(cache=True)
def _box_lists(bounds, block_of_cell, query_block, key_block):  # type: ignore[no-untyped-def]
    length = len(bounds)
    height, width = block_of_cell.shape
    query_blocks = (length + query_block - 1) // query_block
    key_blocks = (length + key_block - 1) // key_block
    counts = np.zeros(query_blocks, dtype=np.int32)
    flat = np.empty(8 * query_blocks + 16, dtype=np.int32)
    flags = np.empty(len(flat), dtype=np.bool_)
    used = 0
    # One difference array per image row, scanned only where this query block wrote.
    diff = np.zeros((height, width + 1), dtype=np.int32)
    row_low = np.full(height, width, dtype=np.int32)
    row_high = np.zeros(height, dtype=np.int32)
    rows = np.empty(height, dtype=np.int32)
    covered_cells = np.zeros(key_blocks, dtype=np.int32)
    is_touched = np.zeros(key_blocks, dtype=np.bool_)
    touched = np.empty(key_blocks, dtype=np.int32)
    for block in range(query_blocks):
        row_count, touched_count = 0, 0
        for query in range(block * query_block, min((block + 1) * query_block, length)):
            y_start, y_stop, x_start, x_stop = (
                bounds[query, 0], bounds[query, 1], bounds[query, 2], bounds[query, 3],
            )  # fmt: skip
            if x_stop <= x_start:
                continue
            for y in range(y_start, y_stop):
                if row_high[y] == 0:
                    rows[row_count] = y
                    row_count += 1
                diff[y, x_start] += 1
                diff[y, x_stop] -= 1
                row_low[y] = min(row_low[y], x_start)
                row_high[y] = max(row_high[y], x_stop)
        for i in range(row_count):
            y = rows[i]
            cover = 0
            for x in range(row_low[y], row_high[y]):
                cover += diff[y, x]
                diff[y, x] = 0
                if cover > 0:
                    index = block_of_cell[y, x]
                    if not is_touched[index]:
                        is_touched[index] = True
                        touched[touched_count] = index
                        touched_count += 1
                    if cover == query_block:
                        covered_cells[index] += 1
            diff[y, row_high[y]] = 0
            row_low[y] = width
            row_high[y] = 0
        touched[:touched_count].sort()
        for i in range(touched_count):
            index = touched[i]
            flat, flags = _append(flat, flags, used, index, covered_cells[index] < key_block)
            used += 1
            covered_cells[index] = 0
            is_touched[index] = False
        counts[block] = touched_count
    return counts, flat[:used], flags[:used]


@njit(cache=True)
def _transpose(counts, indices, partial, key_blocks):  # type: ignore[no-untyped-def]
    transposed = np.zeros(key_blocks, dtype=np.int32)
    total = 0
    for block in range(len(counts)):
        for slot in range(counts[block]):
            transposed[indices[block, slot]] += 1
            total += 1
    offset = np.zeros(key_blocks, dtype=np.int64)
    for index in range(1, key_blocks):
        offset[index] = offset[index - 1] + transposed[index - 1]
    flat = np.empty(total, dtype=np.int32)
    flags = np.empty(total, dtype=np.bool_)
    for block in range(len(counts)):
        for slot in range(counts[block]):
            index = indices[block, slot]
            flat[offset[index]] = block
            flags[offset[index]] = partial[block, slot]
            offset[index] += 1
    return transposed, flat, flags
