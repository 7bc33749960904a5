"""Pictures say what the data says."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vitreous_core import pictures
from vitreous_core.curves import hilbert_order, row_major_order
from vitreous_core.patterns import Neighborhood2d, Window2d


def test_a_mask_shows_what_is_seen_and_what_is_read_for_it() -> None:
    order = row_major_order(8, 8)
    layout = Window2d(4).layout(8, 8, order, query_block=16, key_block=16)
    figure = pictures.draw_masks([pictures.Masked("windows", layout, order)])
    above, below = figure.axes
    (image,), (mask,) = above.images, below.images
    # The middle cell's block holds rows 4 and 5; its windows reach down to row 7; every block it reads is seen.
    np.testing.assert_array_equal(np.asarray(image.get_array())[:, 0], [0, 0, 0, 0, 3, 3, 2, 2])
    colours = np.asarray(mask.get_array())
    expected = np.where(layout.to_dense().numpy()[..., None], to_rgb(pictures.BLUE), to_rgb(pictures.LIGHT_BLUE))
    np.testing.assert_allclose(colours[:32, :32], expected[:32, :32])  # the four blocks of the upper windows
    np.testing.assert_allclose(colours[:32, 32:], np.broadcast_to(to_rgb(pictures.PAPER), (32, 32, 3)))
    assert below.get_xlabel() == "50.0 % empty, 50.0 % partial, 0.0 % full"


def test_cells_of_a_large_mask_are_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_MOST_MASK_CELLS", 5)
    order = hilbert_order(4, 8)
    layout = Neighborhood2d(3).layout(4, 8, order, query_block=32, key_block=32)
    mask = pictures.draw_masks([pictures.Masked("all read", layout, order)]).axes[1].images[0]
    shade = np.asarray(mask.get_array())
    assert shade.shape == (5, 5, 3)  # groups of seven tokens, the last of four
    seen = layout.to_dense().numpy()[28:, :7].mean()
    light, dark = (np.array(to_rgb(color)) for color in (pictures.LIGHT_BLUE, pictures.BLUE))
    np.testing.assert_allclose(shade[4, 0], light * (1 - seen) + dark * seen)


def test_shares_stand_at_their_value() -> None:
    figure = pictures.draw_shares({"a": {"x": 10.0, "y": 20.0}, "b": {"y": 30.0}}, label="%")
    x, y = figure.axes[0].collections
    np.testing.assert_array_equal(np.asarray(x.get_offsets()), [[10, 0]])
    np.testing.assert_array_equal(np.asarray(y.get_offsets()), [[20, 0], [30, 1]])
