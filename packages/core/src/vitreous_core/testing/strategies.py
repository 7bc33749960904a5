"""Random patterns and orders for property tests; needs the package hypothesis."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st

from ..curves import Order, hilbert_order, morton_order, tile_order
from ..patterns import Neighborhood1d, Neighborhood2d, Pattern, Slide1d, Slide2d, Window1d, Window2d

patterns: st.SearchStrategy[Pattern] = st.one_of(
    st.integers(1, 40).flatmap(lambda n: st.builds(Window1d, st.just(n), st.integers(0, n - 1))),
    st.builds(Slide1d, st.integers(0, 20).map(lambda n: 2 * n + 1)),
    st.builds(Neighborhood1d, st.integers(1, 60)),
    st.integers(1, 9).flatmap(lambda n: st.builds(Window2d, st.just(n), st.integers(0, n - 1))),
    st.builds(Slide2d, st.integers(0, 4).map(lambda n: 2 * n + 1), st.integers(1, 3)),
    st.builds(Neighborhood2d, st.integers(1, 9), st.integers(1, 3)),
)

MakeOrder = Callable[[int, int], Order | None]

orders: st.SearchStrategy[MakeOrder] = st.sampled_from(
    [lambda height, width: None, hilbert_order, morton_order, lambda height, width: tile_order(height, width, (2, 3))]
)
