"""Token orders of an image: which cell of a `height x width` grid comes k-th.

An order is an int32 array `[height * width]`; entry `k` is the row-major index `y * width + x` of the k-th visited
cell. It is the gather index from image order to token order, and `inverse_order` of it is the way back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _numba

Order = NDArray[np.int32]

_LARGEST_AREA = 2**31 - 1


def hilbert_order(height: int, width: int) -> Order:
    """Generalised Hilbert order of any rectangle.

    Starts at cell (0, 0) and, where the parities allow, ends at the far end of the longer side. Consecutive cells
    are 4-neighbours, except for exactly one diagonal step when the longer side is odd and the shorter even and
    above 2. On a square of side 2^k it is the classic Hilbert curve. A square is walked x-major.

    Paper: arXiv 2511.05832, section on Hilbert reordering; the construction is the recursive halving of Cerveny's
    generalised curve. `vitreous_core.curves._reference` spells it out.

    Args:
        height: rows, at least 1.
        width: columns, at least 1.

    Returns:
        int32 `[height * width]`.

    Raises:
        TypeError: when a side is no integer.
        ValueError: when a side is below 1 or the area does not fit int32.

    Examples:
        >>> hilbert_order(2, 2).tolist()
        [0, 2, 3, 1]
    """
    height, width = _check_sides(height, width)
    return _numba.hilbert_order(height, width)


def morton_order(height: int, width: int) -> Order:
    """Z-order: cells sorted by the interleaved bits of (y, x), x lowest; cells outside the rectangle are skipped.

    Args, Returns and Raises: as `hilbert_order`.
    """
    height, width = _check_sides(height, width)
    return _numba.morton_order(height, width)


def row_major_order(height: int, width: int) -> Order:
    """The identity order. Args, Returns and Raises: as `hilbert_order`."""
    height, width = _check_sides(height, width)
    return np.arange(height * width, dtype=np.int32)


def window_order(height: int, width: int, window: int) -> Order:
    """Window-partition order: square windows in row-major order, tokens row-major inside each window.

    Windows at the right and bottom border are cut where `window` does not divide a side.

    Args:
        height, width: sides of the image, at least 1.
        window: side of a window, at least 1; larger than the image means one window.

    Returns and Raises: as `hilbert_order`.
    """
    return tile_order(height, width, (window, window))


def tile_order(height: int, width: int, tile: tuple[int, int]) -> Order:
    """Tiles of `(rows, columns)` in row-major order, tokens row-major inside each tile; border tiles are cut.

    Args:
        height, width: sides of the image, at least 1.
        tile: rows and columns of a tile, each at least 1; larger than the image means all of it.

    Returns and Raises: as `hilbert_order`.
    """
    height, width = _check_sides(height, width)
    rows, columns = tile
    rows, columns = min(_check_side("tile rows", rows), height), min(_check_side("tile columns", columns), width)
    # Pad to whole tiles, put the tiles in line, drop the padding.
    tiles_down, tiles_across = -(-height // rows), -(-width // columns)
    cells = np.full((tiles_down * rows, tiles_across * columns), -1, dtype=np.int32)
    cells[:height, :width] = np.arange(height * width, dtype=np.int32).reshape(height, width)
    line = cells.reshape(tiles_down, rows, tiles_across, columns).swapaxes(1, 2).ravel()
    return line[line >= 0]


def inverse_order(order: Order) -> Order:
    """Position of every cell: `inverse[order[k]] = k`.

    Args:
        order: an order as the functions above return it.

    Returns:
        int32 `[height * width]`.

    Raises:
        TypeError: when `order` is no integer array.
        ValueError: when it is no permutation of `0 .. len(order) - 1`.
    """
    order = check_order(order, np.size(order))
    inverse = np.empty(len(order), dtype=np.int32)
    inverse[order] = np.arange(len(order), dtype=np.int32)
    return inverse


def check_order(order: object, length: int) -> Order:
    """`order` as int32, after checking that it is a permutation of `0 .. length - 1`.

    Raises:
        TypeError: when it is no integer array.
        ValueError: when its shape or content is wrong.
    """
    array = np.asarray(order)
    if array.dtype.kind not in "iu":
        raise TypeError(f"order must be an integer array; got dtype {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"order must have shape ({length},), one entry per token (height * width); got {array.shape}")
    if not _numba.is_permutation(array.astype(np.int64)):
        raise ValueError(
            f"order must be a permutation of 0..{length - 1}; got repeated or out-of-range entries. "
            "Build it with vitreous_core.curves"
        )
    return array.astype(np.int32, copy=False)


def _check_sides(height: int, width: int) -> tuple[int, int]:
    height, width = _check_side("height", height), _check_side("width", width)
    if height * width > _LARGEST_AREA:
        raise ValueError(f"height * width must be below 2^31 (orders are int32); got {height} x {width}")
    return height, width


def _check_side(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return int(value)
