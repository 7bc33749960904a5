"""Numba builders of block lists from intervals and boxes, in time linear in what is visible along the border."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Lists = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]

# Marks per value from which sorting the values beats reading all marks in between (measured: 8 to 32 are alike).
_SPARSE_MARKS = 16


def interval_lists(start: NDArray[np.int32], stop: NDArray[np.int32], query_block: int, key_block: int) -> Lists:
    """Counts, indices and partial flags of the blocks that intervals touch."""
    return _pad(*_interval_lists(start, stop, query_block, key_block))


def box_lists(bounds: NDArray[np.int32], block_of_cell: NDArray[np.int32], query_block: int, key_block: int) -> Lists:
    """Counts, indices and partial flags of the blocks that boxes touch.

    Args:
        bounds: int32 `[L, 4]`, the half-open box (y_start, y_stop, x_start, x_stop) of each query; no stop below
            its start.
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
def _grown(flat, flags, wanted):  # type: ignore[no-untyped-def]
    """The pair of arrays, or a longer copy of it when `wanted` entries do not fit."""
    while len(flat) < wanted:
        flat = np.concatenate((flat, np.empty_like(flat)))
        flags = np.concatenate((flags, np.empty_like(flags)))
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
        flat, flags = _grown(flat, flags, used + max(high - low, 0))
        touching, covering = 0, 0
        for index in range(low, high):
            touching += touch[index]
            covering += cover[index]
            if touching > 0:
                flat[used], flags[used] = index, covering < query_block
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
    covered_cells = np.zeros(key_blocks, dtype=np.int32)
    is_touched = np.zeros(key_blocks, dtype=np.bool_)
    touched = np.empty(key_blocks, dtype=np.int32)
    for block in range(query_blocks):
        queries = bounds[block * query_block : min((block + 1) * query_block, length)]
        hull_area, box_area = _row_hulls(queries, row_low, row_high)
        touched_count = 0
        if box_area > hull_area:
            touched_count = _touch_union(queries, block_of_cell, diff, row_low, row_high, is_touched, touched)
        else:
            touched_count = _touch_each(queries, block_of_cell, is_touched, touched)
        if len(queries) == query_block:
            _cover_intersection(queries, block_of_cell, covered_cells)
        _sort_marked(touched, touched_count, is_touched)
        flat, flags = _grown(flat, flags, used + touched_count)
        for i in range(touched_count):
            index = touched[i]
            flat[used + i] = index
            flags[used + i] = covered_cells[index] < key_block
            covered_cells[index] = 0
            is_touched[index] = False
        used += touched_count
        counts[block] = touched_count
        row_low[:] = width
        row_high[:] = 0
    return counts, flat[:used], flags[:used]


@njit(cache=True)
def _row_hulls(boxes, row_low, row_high):  # type: ignore[no-untyped-def]
    """Widen each image row's bounds to what the boxes reach; returns the cells within them and those of all boxes."""
    box_area = 0
    for y_start, y_stop, x_start, x_stop in boxes:
        box_area += (y_stop - y_start) * max(x_stop - x_start, 0)
        for y in range(y_start, y_stop):
            row_low[y] = min(row_low[y], x_start)
            row_high[y] = max(row_high[y], x_stop)
    hull_area = 0
    for y in range(len(row_low)):
        hull_area += max(row_high[y] - row_low[y], 0)
    return hull_area, box_area


@njit(cache=True)
def _touch_union(boxes, block_of_cell, diff, row_low, row_high, is_touched, touched):  # type: ignore[no-untyped-def]
    """List the blocks of boxes that overlap, looking at each cell of their rows once; returns how many."""
    count = 0
    for y_start, y_stop, x_start, x_stop in boxes:
        for y in range(y_start, y_stop):
            diff[y, x_start] += 1
            diff[y, x_stop] -= 1
    for y in range(len(row_low)):
        if row_high[y] <= row_low[y]:
            continue
        if count == len(touched):
            # All blocks are listed: under a scattered order a tenth of the cells gets there.
            diff[y, row_low[y] : row_high[y] + 1] = 0
            continue
        cover = 0
        for x in range(row_low[y], row_high[y]):
            cover += diff[y, x]
            diff[y, x] = 0
            if cover > 0:
                count = _touch(block_of_cell[y, x], is_touched, touched, count)
        diff[y, row_high[y]] = 0
    return count


@njit(cache=True)
def _touch_each(boxes, block_of_cell, is_touched, touched):  # type: ignore[no-untyped-def]
    """List the blocks of boxes that lie scattered, box by box; returns how many."""
    count = 0
    for y_start, y_stop, x_start, x_stop in boxes:
        if count == len(touched):
            break
        for y in range(y_start, y_stop):
            for x in range(x_start, x_stop):
                count = _touch(block_of_cell[y, x], is_touched, touched, count)
    return count


@njit(cache=True)
def _touch(index, is_touched, touched, count):  # type: ignore[no-untyped-def]
    if is_touched[index]:
        return count
    is_touched[index] = True
    touched[count] = index
    return count + 1


@njit(cache=True)
def _cover_intersection(boxes, block_of_cell, covered_cells):  # type: ignore[no-untyped-def]
    """Count, per block, the cells that all boxes hold: a block is full when these are all of its cells."""
    y_low, y_high, x_low, x_high = boxes[0]
    for y_start, y_stop, x_start, x_stop in boxes:
        y_low, y_high = max(y_low, y_start), min(y_high, y_stop)
        x_low, x_high = max(x_low, x_start), min(x_high, x_stop)
    for y in range(y_low, y_high):
        for x in range(x_low, x_high):
            covered_cells[block_of_cell[y, x]] += 1


@njit(cache=True)
def _sort_marked(values, count, is_marked):  # type: ignore[no-untyped-def]
    """Sort the first `count` values in place; `is_marked` tells which numbers they are."""
    low, high = len(is_marked), 0
    for i in range(count):
        low, high = min(low, values[i]), max(high, values[i] + 1)
    # Under a scattered order a query block sees nearly every key block: reading the marks off is then far cheaper.
    if high - low > _SPARSE_MARKS * count:
        values[:count].sort()
        return
    slot = 0
    for value in range(low, high):
        if is_marked[value]:
            values[slot] = value
            slot += 1


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
