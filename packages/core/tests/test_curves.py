"""Token orders: exact agreement with the official curve and with the written-out recursion, and what must hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreous_core import curves
from vitreous_core.curves import _reference
from vitreous_core.testing.golden import golden_path

SIDE = st.integers(1, 150)
SIDES = st.tuples(SIDE, SIDE)


def reference_order(height: int, width: int) -> np.ndarray:
    return np.array([y * width + x for x, y in _reference.walk(height, width)], dtype=np.int32)


def hilbert_index(order: int, x: int, y: int) -> int:
    """Distance of a cell along the classic curve on a square of side 2^order, quadrant by quadrant."""
    distance, side = 0, 2**order // 2
    while side:
        right, up = int(bool(x & side)), int(bool(y & side))
        distance += side * side * ((3 * right) ^ up)
        if not up:
            if right:
                x, y = 2**order - 1 - x, 2**order - 1 - y
            x, y = y, x
        side //= 2
    return distance


def test_every_golden_curve() -> None:
    golden = np.load(golden_path(Path(__file__).parent, "gilbert_curves.npz"))
    assert len(golden.files) == 18
    for name in golden.files:
        height, width = (int(side[1:]) for side in name.split("_"))
        np.testing.assert_array_equal(curves.hilbert_order(height, width), golden[name], err_msg=name)


def test_hilbert_equals_the_written_out_recursion_up_to_40() -> None:
    for height in range(1, 41):
        for width in range(1, 41):
            expected = reference_order(height, width)
            np.testing.assert_array_equal(curves.hilbert_order(height, width), expected, err_msg=f"{height}x{width}")


@settings(deadline=None, max_examples=25)
@given(sides=st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_hilbert_equals_the_written_out_recursion_on_any_rectangle(sides: tuple[int, int]) -> None:
    np.testing.assert_array_equal(curves.hilbert_order(*sides), reference_order(*sides))


def test_hilbert_when_more_shapes_come_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiled walk has its capacity built in, so the Python function behind it runs with a smaller one.
    walk = curves._numba.hilbert_order.py_func
    monkeypatch.setattr(curves._numba, "_REMEMBERED", 3)
    for sides in ((23, 17), (16, 16), (9, 40)):
        np.testing.assert_array_equal(walk(*sides), reference_order(*sides))


@settings(deadline=None)
@given(sides=SIDES)
def test_hilbert_is_connected_but_for_one_known_diagonal(sides: tuple[int, int]) -> None:
    height, width = sides
    order = curves.hilbert_order(height, width)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(height * width))
    y, x = np.divmod(order, width)
    steps = np.stack((np.abs(np.diff(y)), np.abs(np.diff(x))))
    longer, shorter = max(sides), min(sides)
    diagonals = int(longer % 2 == 1 and shorter % 2 == 0 and shorter > 2)
    assert steps.max(initial=0) <= 1
    assert (steps.sum(0) == 2).sum() == diagonals
    assert (steps.sum(0) == 0).sum() == 0


@settings(deadline=None)
@given(sides=SIDES)
def test_hilbert_starts_at_the_origin_and_ends_across_the_longer_side(sides: tuple[int, int]) -> None:
    height, width = sides
    order = curves.hilbert_order(height, width)
    last = (order[-1] // width, order[-1] % width)
    assert order[0] == 0
    far_end = (0, width - 1) if width >= height else (height - 1, 0)
    if min(sides) == 2 and max(sides) % 2 == 1:
        edge = 0 if width >= height else 1
        assert last[edge] == far_end[edge]
    else:
        assert last == far_end


@settings(deadline=None)
@given(sides=SIDES)
def test_hilbert_of_a_tall_image_is_the_transpose_of_the_wide_one(sides: tuple[int, int]) -> None:
    short, long = sorted(sides)
    if short == long:
        return
    tall = curves.hilbert_order(long, short)
    y, x = np.divmod(tall, short)
    np.testing.assert_array_equal(x * long + y, curves.hilbert_order(short, long))


@pytest.mark.parametrize("exponent", range(9))
def test_hilbert_on_powers_of_two_is_the_classic_curve(exponent: int) -> None:
    side = 2**exponent
    y, x = np.divmod(curves.hilbert_order(side, side), side)
    cells = zip(x.tolist(), y.tolist(), strict=True)
    assert [hilbert_index(exponent, column, row) for column, row in cells] == list(range(side * side))


@settings(deadline=None)
@given(sides=SIDES)
def test_morton_sorts_by_interleaved_bits(sides: tuple[int, int]) -> None:
    height, width = sides
    y, x = np.divmod(np.arange(height * width), width)
    key = sum(((x >> bit & 1) << 2 * bit) | ((y >> bit & 1) << 2 * bit + 1) for bit in range(8))
    np.testing.assert_array_equal(curves.morton_order(height, width), np.argsort(key))


@settings(deadline=None)
@given(sides=SIDES, tile=st.tuples(st.integers(1, 160), st.integers(1, 160)))
def test_tiles_come_row_by_row_and_their_cells_too(sides: tuple[int, int], tile: tuple[int, int]) -> None:
    height, width = sides
    y, x = np.divmod(np.arange(height * width), width)
    expected = np.lexsort((x, y, x // tile[1], y // tile[0]))
    order = curves.tile_order(height, width, tile)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, expected)


def test_window_order_is_the_window_partition() -> None:
    image = np.arange(8 * 12).reshape(8, 12)
    windows = image.reshape(2, 4, 3, 4).transpose(0, 2, 1, 3).reshape(-1)
    np.testing.assert_array_equal(curves.window_order(8, 12, 4), windows)
    np.testing.assert_array_equal(curves.window_order(8, 12, 99), curves.row_major_order(8, 12))


def test_row_major_order_is_the_identity() -> None:
    np.testing.assert_array_equal(curves.row_major_order(3, 5), np.arange(15, dtype=np.int32))


@settings(deadline=None)
@given(data=st.data(), length=st.integers(1, 300))
def test_inverse_order_undoes_any_permutation(data: st.DataObject, length: int) -> None:
    order = np.array(data.draw(st.permutations(range(length))))
    inverse = curves.inverse_order(order)
    assert inverse.dtype == np.int32
    np.testing.assert_array_equal(inverse[order], np.arange(length))
    np.testing.assert_array_equal(curves.inverse_order(inverse), order)


@pytest.mark.parametrize("make", [curves.hilbert_order, curves.morton_order, curves.row_major_order])
def test_sides_that_are_no_sides(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"height must be at least 1; got 0"):
        make(0, 4)
    with pytest.raises(ValueError, match=r"width must be at least 1; got -2"):
        make(4, -2)
    with pytest.raises(TypeError, match=r"height must be an integer; got 4\.0"):
        make(4.0, 4)
    with pytest.raises(TypeError, match=r"width must be an integer; got True"):
        make(4, True)
    with pytest.raises(ValueError, match=r"height \* width must be below 2\^31"):
        make(2**16, 2**16)
    assert len(make(np.int64(2), np.int32(3))) == 6


def test_tiles_that_are_no_tiles() -> None:
    with pytest.raises(ValueError, match=r"tile columns must be at least 1; got 0"):
        curves.tile_order(4, 4, (2, 0))
    with pytest.raises(TypeError, match=r"tile rows must be an integer; got 2\.5"):
        curves.window_order(4, 4, 2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (np.array([0, 2, 2]), ValueError, r"permutation of 0\.\.2"),
        (np.array([1, 2, 3]), ValueError, r"permutation of 0\.\.2"),
        (np.array([-1, 0, 1]), ValueError, r"permutation of 0\.\.2"),
        (np.array([0.0, 1.0]), TypeError, r"integer array; got dtype float64"),
        (np.zeros((2, 2), dtype=np.int32), ValueError, r"shape \(4,\)"),
    ],
)
def test_orders_that_are_no_permutation(order: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        curves.inverse_order(order)
