"""Block lists from intervals and boxes against the pairs themselves."""

from __future__ import annotations

import numpy as np
import pytest

from vitreous_core import _block_lists


def brute_lists(visible: np.ndarray, query_block: int, key_block: int) -> list[list[tuple[int, bool]]]:
    """Listed blocks and their partial flags of each query block; a block that reaches past the end is partial."""
    length = len(visible)
    lists = []
    for low in range(0, length, query_block):
        listed = []
        for start in range(0, length, key_block):
            tile = visible[low : low + query_block, start : start + key_block]
            if tile.any():
                listed.append((start // key_block, not (tile.all() and tile.shape == (query_block, key_block))))
        lists.append(listed)
    return lists


def as_pairs(lists: _block_lists.Lists) -> list[list[tuple[int, bool]]]:
    counts, indices, partial = lists
    return [
        list(zip(row[:count].tolist(), flags[:count].tolist(), strict=True))
        for count, row, flags in zip(counts, indices, partial, strict=True)
    ]


@pytest.mark.parametrize("blocks", [(4, 4), (8, 2), (3, 5), (64, 64)], ids=str)
@pytest.mark.parametrize("order_of", ["row_major", "scattered"])
def test_boxes_of_any_size_under_any_order(blocks: tuple[int, int], order_of: str) -> None:
    # Compact orders take the path for overlapping boxes, scattered ones that for single boxes.
    rng = np.random.default_rng(0)
    height, width = 9, 13
    length = height * width
    order = np.arange(length) if order_of == "row_major" else rng.permutation(length)
    for largest in (1, 3, 9):
        y_start, x_start = rng.integers(0, height, length), rng.integers(0, width, length)
        y_stop = np.minimum(y_start + rng.integers(0, largest + 1, length), height)
        x_stop = np.minimum(x_start + rng.integers(0, largest + 1, length), width)
        y, x = np.divmod(order, width)
        visible = (y >= y_start[:, None]) & (y < y_stop[:, None]) & (x >= x_start[:, None]) & (x < x_stop[:, None])
        bounds = np.stack((y_start, y_stop, x_start, x_stop), axis=1).astype(np.int32)
        block_of_cell = (np.argsort(order).reshape(height, width) // blocks[1]).astype(np.int32)
        lists = _block_lists.box_lists(bounds, block_of_cell, *blocks)
        assert as_pairs(lists) == brute_lists(visible, *blocks)


@pytest.mark.parametrize("blocks", [(4, 4), (8, 2), (3, 5), (64, 64)], ids=str)
def test_intervals_and_the_transposed_lists(blocks: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    length = 117
    for longest in (1, 8, 117):
        start = rng.integers(0, length, length).astype(np.int32)
        stop = np.minimum(start + rng.integers(0, longest + 1, length), length).astype(np.int32)
        key = np.arange(length)
        visible = (key >= start[:, None]) & (key < stop[:, None])
        lists = _block_lists.interval_lists(start, stop, *blocks)
        assert as_pairs(lists) == brute_lists(visible, *blocks)
        key_blocks = -(-length // blocks[1])
        transposed: list[list[tuple[int, bool]]] = [[] for _ in range(key_blocks)]
        for query, listed in enumerate(as_pairs(lists)):
            for index, partial in listed:
                transposed[index].append((query, partial))
        assert as_pairs(_block_lists.transpose_lists(lists, key_blocks)) == transposed


def test_a_full_block_needs_every_query_to_see_every_cell() -> None:
    # 4 x 4 image, key blocks of one row; all queries see rows 1 and 2 whole, one of them sees less of row 2.
    bounds = np.tile(np.array([1, 3, 0, 4], dtype=np.int32), (16, 1))
    bounds[5] = (1, 2, 0, 4)
    block_of_cell = np.repeat(np.arange(4, dtype=np.int32), 4).reshape(4, 4)
    lists = as_pairs(_block_lists.box_lists(bounds, block_of_cell, 4, 4))
    both_full = [(1, False), (2, False)]
    assert lists == [both_full, [(1, False), (2, True)], both_full, both_full]
