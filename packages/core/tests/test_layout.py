"""`BlockLayout` and the schedule that kernels walk over."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vitreous_core.curves import hilbert_order
from vitreous_core.layout import BlockLayout
from vitreous_core.patterns import Neighborhood2d, Slide1d, Window1d, Window2d, from_mask
from vitreous_core.schedule import BIT_BLOCK, BLOCKS, IMAGE, ROWS_PER_TILE, Schedule
from vitreous_core.testing.strategies import patterns


def walk(schedule: Schedule, side: str, rows: int, length: int) -> torch.Tensor:
    """The mask that walking over a side's tiles gives, row tokens first, in numpy-like slow motion."""
    seen = torch.zeros(length, length, dtype=torch.int64)
    one, position = getattr(schedule, side), schedule.position
    bounds = one.bounds
    for y0, y1, x0, x1, cy0, cy1, cx0, cx1, shift in one.at(rows).table.tolist():
        if schedule.geometry == BLOCKS:
            assert x1 - x0 <= rows
            for entry in range(cx0, cx1):
                block, bits = bounds[entry].tolist()
                for row in range(x0, x1):
                    for column in range(block * BIT_BLOCK, min((block + 1) * BIT_BLOCK, length)):
                        inner = column % BIT_BLOCK
                        word = int(one.bits[bits, y0 + row - x0, inner // 32])
                        seen[row, column] += (word >> inner % 32) & 1
            continue
        assert 0 < (y1 - y0) * (x1 - x0) <= rows
        for y in range(y0, y1):
            for x in range(x0, x1):
                if schedule.geometry != IMAGE:
                    start, stop = bounds[x].tolist()
                    assert cx0 <= start
                    assert stop <= cx1
                    seen[x, start:stop] += 1
                    continue
                assert cx1 - cx0 <= 1 << shift
                (ys, ye), (xs, xe) = bounds[y].tolist(), bounds[schedule.height + x].tolist()
                assert cy0 <= ys <= ye <= cy1
                assert cx0 <= xs <= xe <= cx1
                cells = (torch.arange(ys, ye)[:, None] * schedule.width + torch.arange(xs, xe)).flatten()
                cell = torch.tensor(y * schedule.width + x)
                if len(position):
                    cell, cells = position.long()[cell], position.long()[cells]
                seen[cell, cells] += 1
    return seen


@settings(max_examples=40, deadline=None)
@given(patterns, st.integers(1, 10), st.integers(1, 14), st.booleans(), st.sampled_from(ROWS_PER_TILE))
def test_schedule_visits_every_visible_pair_once(pattern, height, width, reorder, rows):
    order = hilbert_order(height, width) if reorder else None
    schedule = pattern.layout(height, width, order).schedule
    expected = torch.from_numpy(pattern.dense(height, width, order)).long()
    assert torch.equal(walk(schedule, "queries", rows, height * width), expected)
    assert torch.equal(walk(schedule, "keys", rows, height * width), expected.T)


def test_schedule_of_a_predicate_visits_every_visible_pair_once():
    pattern = from_mask(lambda q, k: ((q + 2 * k) % 7 == 0) & (q != 70), 150)
    schedule, expected = pattern.layout(10, 15).schedule, torch.from_numpy(pattern.dense(10, 15)).long()
    for rows in ROWS_PER_TILE:
        assert torch.equal(walk(schedule, "queries", rows, 150), expected)
        assert torch.equal(walk(schedule, "keys", rows, 150), expected.T)


def test_tiles_know_what_needs_no_mask():
    windows = Window2d(8).layout(16, 32).schedule.queries
    assert (windows.at(64).masked, windows.at(64).closed, windows.at(64).column_multiple) == (False, True, 64)
    assert (windows.at(128).masked, windows.at(128).closed) == (True, True)
    ragged = Window1d(49).layout(10, 10).schedule.queries.at(64)
    assert (ragged.masked, ragged.closed, ragged.column_multiple) == (False, True, 1)
    halves = Window1d(256).layout(32, 16).schedule.queries.at(128)
    assert (halves.masked, halves.closed, len(halves.table)) == (False, False, 4)
    slide = Slide1d(9).layout(16, 16).schedule.queries.at(64)
    assert (slide.masked, slide.closed) == (True, False)


def test_tile_of_a_neighbourhood_visits_the_halo_of_its_own_shape():
    # 17 x 17 at 128 x 128: tiles of 64 queries need at most 4 x 16 cells plus 16 around, in any token order.
    for order in (None, hilbert_order(128, 128)):
        table = Neighborhood2d(17).layout(128, 128, order).schedule.queries.at(64).table.long()
        visited = (table[:, 5] - table[:, 4]) << table[:, 8]
        assert int(visited.max()) == 20 * 32


def tensors_of(value):
    """Every tensor inside nested dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    for item in value if isinstance(value, tuple) else ():
        yield from tensors_of(item)
    for field in fields(value) if is_dataclass(value) else ():
        yield from tensors_of(getattr(value, field.name))


def test_layout_ratios_add_up_and_moving_keeps_everything():
    layout = Neighborhood2d(5).layout(12, 12, hilbert_order(12, 12), query_block=16, key_block=32)
    empty, partial, full = layout.block_ratios
    assert empty + partial + full == pytest.approx(1)
    assert partial > 0
    assert layout.to("cpu") is layout
    tensors = list(tensors_of(layout.to("meta")))
    assert len(tensors) > 20
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_flex_mask_has_the_lists_of_both_directions():
    layout = Window2d(4, 2).layout(14, 14, query_block=16, key_block=32)
    mask = layout.to_flex()
    for counts, indices, own, full in (
        (mask.kv_num_blocks, mask.kv_indices, layout.partial, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, layout.partial, True),
        (mask.q_num_blocks, mask.q_indices, layout.key_partial, False),
    ):
        source, count = (layout.indices, layout.counts) if own is layout.partial else (
            layout.key_indices, layout.key_counts)  # fmt: skip
        for block in range(len(count)):
            kept = [int(source[block, slot]) for slot in range(int(count[block])) if bool(own[block, slot]) != full]
            assert indices[0, 0, block, : int(counts[0, 0, block])].tolist() == kept
    assert mask.kv_indices.shape[-1] == len(layout.key_counts)


def test_malformed_lists_are_refused():
    layout = Window1d(8).layout(8, 8, query_block=16, key_block=16)
    with pytest.raises(ValueError, match="entries"):
        replace(layout, counts=layout.counts[:-1])
    with pytest.raises(ValueError, match="one shape"):
        replace(layout, partial=layout.partial[:, :0])
    wrong: BlockLayout = replace(layout, indices=layout.indices + 100)
    with pytest.raises(ValueError, match="indices must lie"):
        wrong.validate()
    wrong = replace(layout, partial=~layout.partial)
    with pytest.raises(ValueError, match="same blocks"):
        wrong.validate()


def test_no_dense_array_is_built(monkeypatch):
    """The largest image of the marks, where an `L x L` array would take 4 GiB."""
    made = []
    real = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, *a, **k: made.append(np.prod(shape)) or real(shape, *a, **k))
    layout = Neighborhood2d(33).layout(256, 256, hilbert_order(256, 256))
    largest = max(
        [tensor.numel() for tensor in (layout.indices, layout.key_indices, layout.schedule.queries.bounds)] + made
    )
    assert largest < 64 * layout.length
