"""Numba walks over a grid. Compiled once and cached on disk."""

from __future__ import annotations

import numpy as np
from numba import njit

# Pending rectangles of the depth-first walk: each level leaves at most two behind, and a level at least halves
# one side, so 2 * 2 * 31 entries are never exceeded for int32 areas.
_STACK = 160


@njit(cache=True)
def hilbert_order(height: int, width: int) -> np.ndarray:
    """See `curves.hilbert_order`; the recursion of `_reference` with an explicit stack.

    Points and vectors are kept as flat index steps plus signed lengths: one number per vector says where it
    leads in the image and one how long it is.
    """
    order = np.empty(height * width, dtype=np.int32)
    # corner, along (index step of one cell), length, across, breadth, and the signs of both vectors
    stack = np.empty((_STACK, 7), dtype=np.int64)
    top = 0
    if width >= height:
        _push(stack, 0, 0, 1, width, width, height, 1, 1)
    else:
        _push(stack, 0, 0, width, height, 1, width, 1, 1)
    k = 0
    while top >= 0:
        corner, along, length, across, breadth = (
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3], stack[top, 4],
        )  # fmt: skip
        sign_major, sign_minor = stack[top, 5], stack[top, 6]
        top -= 1
        if breadth == 1 or length == 1:
            count, step = (length, along) if breadth == 1 else (breadth, across)
            for i in range(count):
                order[k + i] = corner + i * step
            k += count
            continue
        # Halves are floor divisions of the *signed* lengths: a negative odd vector has the longer first half.
        half_major = _half(length, sign_major)
        half_minor = _half(breadth, sign_minor)
        if 2 * length > 3 * breadth:
            if half_major % 2 == 1 and length > 2:
                # Lengthening goes along the vector, away from zero, whatever its sign.
                half_major += 1
            _push(stack, top + 1, corner + half_major * along, along, length - half_major,
                  across, breadth, sign_major, sign_minor)  # fmt: skip
            _push(stack, top + 2, corner, along, half_major, across, breadth, sign_major, sign_minor)
            top += 2
        else:
            if half_minor % 2 == 1 and breadth > 2:
                half_minor += 1
            last = corner + (length - 1) * along + (half_minor - 1) * across
            _push(stack, top + 1, last, -across, half_minor, -along, length - half_major,
                  -sign_minor, -sign_major)  # fmt: skip
            _push(stack, top + 2, corner + half_minor * across, along, length, across,
                  breadth - half_minor, sign_major, sign_minor)  # fmt: skip
            _push(stack, top + 3, corner, across, half_minor, along, half_major, sign_minor, sign_major)
            top += 3
    return order


@njit(cache=True, inline="always")
def _push(stack, top, corner, along, length, across, breadth, sign_major, sign_minor):  # type: ignore[no-untyped-def]
    stack[top, 0] = corner
    stack[top, 1] = along
    stack[top, 2] = length
    stack[top, 3] = across
    stack[top, 4] = breadth
    stack[top, 5] = sign_major
    stack[top, 6] = sign_minor


@njit(cache=True, inline="always")
def _half(length, sign):  # type: ignore[no-untyped-def]
    return length // 2 if sign > 0 else (length + 1) // 2


@njit(cache=True)
def morton_order(height: int, width: int) -> np.ndarray:
    """See `curves.morton_order`: a depth-first walk over quadrants that skips those outside the rectangle."""
    order = np.empty(height * width, dtype=np.int32)
    side = 1
    while side < max(height, width):
        side *= 2
    stack = np.empty((_STACK, 3), dtype=np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, 0, side
    top = 0
    k = 0
    while top >= 0:
        y, x, side = stack[top, 0], stack[top, 1], stack[top, 2]
        top -= 1
        if y >= height or x >= width:
            continue
        if side == 1:
            order[k] = y * width + x
            k += 1
            continue
        half = side // 2
        for quadrant in range(3, -1, -1):
            top += 1
            stack[top, 0] = y + half * (quadrant // 2)
            stack[top, 1] = x + half * (quadrant % 2)
            stack[top, 2] = half
    return order


@njit(cache=True)
def is_permutation(order: np.ndarray) -> bool:
    """Whether `order` holds every number below its length exactly once."""
    seen = np.zeros(len(order), dtype=np.bool_)
    for index in order:
        if index < 0 or index >= len(order) or seen[index]:
            return False
        seen[index] = True
    return True
