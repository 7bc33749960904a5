"""The shares of empty, partial and full blocks: what was counted on dense masks, to the printed digit."""

from __future__ import annotations

import numpy as np
import pytest

from vitreous_hilbert_attn import block_statistics as statistics
from vitreous_hilbert_attn import report
from vitreous_hilbert_attn.block_statistics import Arrangement, Shares


def counted() -> list[tuple[Arrangement, int, int, Shares]]:
    cells = []
    for table, arrange in (
        (statistics.WINDOW_COUNTS, statistics.windows),
        (statistics.KERNEL_COUNTS, statistics.kernels),
        (statistics.RUN_COUNTS, statistics.runs),
    ):
        for (*block, side, size), shares in statistics.parse_counts(table):
            for arrangement, expected in zip(arrange(size), shares, strict=True):
                if expected is not None:
                    cells.append((arrangement, side, block[0] if block else statistics.BLOCK, expected))
    return cells


def test_every_setting_has_the_counted_shares() -> None:
    cells = counted()
    assert len(cells) == 126
    wrong = [
        (arrangement, side, block, ours, expected)
        for arrangement, side, block, expected in cells
        if not statistics.agrees(ours := arrangement.shares(side, block), expected)
    ]
    assert wrong == []


@pytest.mark.parametrize("arrangement", [*statistics.windows(7), *statistics.kernels(5)], ids=lambda a: a.title)
def test_shares_are_those_of_the_dense_mask(arrangement: Arrangement) -> None:
    side, block = 20, 32
    order = statistics.build_order(arrangement.order, side, side, arrangement.tile)
    mask = arrangement.pattern.dense(side, side, order)
    blocks = -(-len(mask) // block)
    padded = np.zeros((blocks * block, blocks * block), dtype=bool)
    padded[: len(mask), : len(mask)] = mask
    tiles = padded.reshape(blocks, block, blocks, block)
    some, every = tiles.any((1, 3)), tiles.all((1, 3))
    expected = [100 * (~some).mean(), 100 * (some & ~every).mean(), 100 * every.mean()]
    np.testing.assert_allclose(arrangement.shares(side, block), expected, atol=1e-9)


def test_a_wrong_digit_is_seen() -> None:
    assert statistics.agrees((93.75, 6.25, 0.0), (93.8, 6.2, 0.0))
    assert not statistics.agrees((93.75, 6.25, 0.0), (93.9, 6.2, 0.0))


@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (12, 5)])
def test_what_a_band_keeps_is_counted_on_the_masks(side: int, kernel: int) -> None:
    order = statistics.build_order("hilbert", side, side)
    square = statistics.Neighborhood2d(kernel).dense(side, side, order)
    band = statistics.Neighborhood1d(kernel**2).dense(side, side)
    row, column = np.divmod(order, side)
    touching = np.abs(row[:, None] - row) + np.abs(column[:, None] - column) == 1
    kept = statistics.kept_by_band(side, kernel)
    assert kept.pairs == pytest.approx(100 * (square & band).sum() / square.sum())
    assert kept.adjacent == pytest.approx(100 * (touching & band).sum() / touching.sum())


def test_windows_on_the_curve_are_squares_on_powers_of_two_only() -> None:
    assert statistics.window_boxes(64, 8) == (100.0, 1.0)
    squares, area = statistics.window_boxes(56, 7)
    assert squares == 0
    assert area == pytest.approx(1.49, abs=0.005)  # an independent count


def test_the_page_says_so() -> None:
    (page,) = report.pages().values()
    assert "126 of 126 cells" in page
    for name in report.figures():
        assert f"hilbert_attn-{name}.png" in page
