"""Patterns against their definitions, pair by pair, and their layouts against the patterns."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vitreous_core.curves import hilbert_order, inverse_order
from vitreous_core.patterns import (
    Neighborhood1d,
    Neighborhood2d,
    Pattern,
    Slide1d,
    Slide2d,
    Window1d,
    Window2d,
    from_mask,
)
from vitreous_core.testing.strategies import orders, patterns


def sees(pattern: Pattern, height: int, width: int, q: tuple[int, int, int], k: tuple[int, int, int]) -> bool:
    """The definition, for tokens given as (position, y, x)."""
    (i, yq, xq), (j, yk, xk) = q, k
    length = height * width

    def clamped(own: int, other: int, count: int, kernel: int) -> bool:
        start = min(max(own - kernel // 2, 0), max(count - kernel, 0))
        return start <= other < start + kernel

    match pattern:
        case Window1d(size, shift):
            return (i + shift) // size == (j + shift) // size
        case Slide1d(kernel):
            return abs(i - j) <= kernel // 2
        case Neighborhood1d(kernel):
            return clamped(i, j, length, kernel)
        case Window2d(window, shift):
            return all((a - shift) // window == (b - shift) // window for a, b in ((yq, yk), (xq, xk)))
        case Slide2d(kernel, dilation):
            return all(
                (a - b) % dilation == 0 and abs(a - b) // dilation <= kernel // 2 for a, b in ((yq, yk), (xq, xk))
            )
        case Neighborhood2d(kernel, dilation):
            return all(
                a % dilation == b % dilation
                and clamped(a // dilation, b // dilation, len(range(a % dilation, n, dilation)), kernel)
                for a, b, n in ((yq, yk, height), (xq, xk, width))
            )
    raise AssertionError(pattern)


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(1, 9), st.integers(1, 9), orders, st.sampled_from([1, 3, 16]))
def test_dense_and_layout_are_the_definition(pattern, height, width, make_order, block):
    order = make_order(height, width)
    cells = range(height * width) if order is None else order.tolist()
    tokens = [(i, *divmod(cell, width)) for i, cell in enumerate(cells)]
    expected = np.array([[sees(pattern, height, width, q, k) for k in tokens] for q in tokens])
    assert (pattern.dense(height, width, order) == expected).all()

    layout = pattern.layout(height, width, order, query_block=block, key_block=2 * block)
    layout.validate()
    assert (layout.to_dense().numpy() == expected).all()
    assert layout.density == pytest.approx(expected.mean())
    query, key = np.nonzero(expected)
    position = np.array(tokens)
    apart = np.abs(position[query] - position[key]).max(axis=0)
    assert apart[0] <= layout.token_reach
    assert apart[1] <= layout.reach[0]
    assert apart[2] <= layout.reach[1]


@settings(max_examples=40, deadline=None)
@given(patterns, st.integers(1, 8), st.integers(1, 8))
def test_two_dimensional_patterns_do_not_depend_on_the_order(pattern, height, width):
    order = hilbert_order(height, width)
    position = inverse_order(order)
    if type(pattern).__name__.endswith("2d"):
        expected = pattern.dense(height, width)
        assert (pattern.dense(height, width, order)[np.ix_(position, position)] == expected).all()
    else:
        assert (pattern.dense(height, width, order) == pattern.dense(height, width)).all()


def test_sides_may_differ_per_axis():
    dense = Window2d((2, 3), (1, 0)).dense(4, 6)
    row, column = np.divmod(np.arange(24), 6)
    expected = ((row[:, None] - 1) // 2 == (row - 1) // 2) & (column[:, None] // 3 == column // 3)
    assert (dense == expected).all()
    assert Neighborhood2d((3, 5)).dense(7, 9).sum(1).tolist() == [15] * 63


def test_from_mask_takes_any_predicate_and_checks_it():
    pattern = from_mask(lambda q, k: (q * 3 + k) % 4 == 0, 130)
    token = np.arange(130)
    expected = (token[:, None] * 3 + token) % 4 == 0
    assert (pattern.dense(10, 13) == expected).all()
    layout = pattern.layout(13, 10, query_block=32, key_block=16)
    layout.validate()
    assert (layout.to_dense().numpy() == expected).all()
    empty = from_mask(lambda q, k: torch.zeros(1, 1, dtype=torch.bool), 20).layout(4, 5)
    assert not empty.to_dense().any()
    with pytest.raises(TypeError, match="boolean"):
        from_mask(lambda q, k: q + k, 20).layout(4, 5)
    with pytest.raises(ValueError, match="length 130"):
        pattern.layout(10, 10)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: Window1d(0), ValueError, "size must be at least 1"),
        (lambda: Window1d(4, 4), ValueError, r"shift must lie in 0\.\.3"),
        (lambda: Slide1d(4), ValueError, "kernel must be odd"),
        (lambda: Neighborhood1d(2.5), TypeError, "kernel must be an integer"),
        (lambda: Window2d(3, 3), ValueError, "shift must lie"),
        (lambda: Window2d((3, 3, 3)), ValueError, "window must be one number"),
        (lambda: Slide2d(8), ValueError, "Use 9"),
        (lambda: Neighborhood2d(3, 0), ValueError, "dilation must be at least 1"),
        (lambda: Window1d(4).layout(4, 4, query_block=0), ValueError, "query_block"),
        (lambda: Window1d(4).layout(4, 0), ValueError, "width must be at least 1"),
        (lambda: Window1d(4).layout(2, 2, np.array([0, 1, 1, 3])), ValueError, "permutation"),
        (lambda: Window1d(4).layout(2, 2, np.arange(5)), ValueError, r"shape \(4,\)"),
        (lambda: Window1d(4).layout(2, 2, np.zeros(4)), TypeError, "integer array"),
    ],
)
def test_bad_arguments_are_named(build, error, match):
    with pytest.raises(error, match=match):
        build()
