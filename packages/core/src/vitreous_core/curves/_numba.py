"""Numba walks over a grid. Compiled once and cached on disk."""

from __future__ import annotations

import numpy as np
from numba import njit

# Pending rectangles of the depth-first walk: each level leaves at most two behind, and a level at least halves
# one side, so 2 * 2 * 31 entries are never exceeded for int32 areas.
_STACK = 160

# Slots of the memory of finished rectangles, a power of two. Halving meets few different shapes: 64 at 1024 x 1024,
# 529 at the worst of 3000 random sizes up to 2^15. Should more than `_REMEMBERED` come, they are walked, not copied.
_SLOTS = 1024
_REMEMBERED = 768
# Below this area walking beats looking up.
_SMALLEST_COPY = 8


@njit(cache=True)
def hilbert_order(height: int, width: int) -> np.ndarray:
    """See `curves.hilbert_order`; the recursion of `_reference` with an explicit stack and a memory.

    Vectors are kept as the index step of one cell (its sign is the vector's direction) and a length. Two rectangles
    with equal steps and lengths are walked alike, so the second is a copy of the first's stretch of the order with
    the distance of the corners added: most of a large image is copied, in long runs.
    """
    order = np.empty(height * width, dtype=np.int32)
    stack = np.empty((_STACK, 5), dtype=np.int64)  # corner, along, length, across, breadth
    shapes = np.zeros((_SLOTS, 4), dtype=np.int64)  # along, length, across, breadth; length 0 is a free slot
    finished = np.empty((_SLOTS, 2), dtype=np.int64)  # corner, first position in the order
    remembered = 0
    if width >= height:
        _push(stack, 0, 0, 1, width, width, height)
    else:
        _push(stack, 0, 0, width, height, 1, width)
    top = 0
    k = 0
    while top >= 0:
        corner, along, length, across, breadth = (
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3], stack[top, 4],
        )  # fmt: skip
        top -= 1
        if breadth == 1 or length == 1:
            count, step = (length, along) if breadth == 1 else (breadth, across)
            for i in range(count):
                order[k + i] = corner + i * step
            k += count
            continue
        if length * breadth >= _SMALLEST_COPY:
            slot = _slot(shapes, along, length, across, breadth)
            if shapes[slot, 1] != 0:
                # An enclosing rectangle is larger than this one, so whatever has this shape is finished.
                area = length * breadth
                _copy_shifted(order, finished[slot, 1], k, area, np.int32(corner - finished[slot, 0]))
                k += area
                continue
            if remembered < _REMEMBERED:
                shapes[slot, 0], shapes[slot, 1], shapes[slot, 2], shapes[slot, 3] = along, length, across, breadth
                finished[slot, 0], finished[slot, 1] = corner, k
                remembered += 1
        half_major = _half(length, along)
        half_minor = _half(breadth, across)
        if 2 * length > 3 * breadth:
            if half_major % 2 == 1 and length > 2:
                # Lengthening goes along the vector, away from zero, whatever its sign.
                half_major += 1
            _push(stack, top + 1, corner + half_major * along, along, length - half_major, across, breadth)
            _push(stack, top + 2, corner, along, half_major, across, breadth)
            top += 2
        else:
            if half_minor % 2 == 1 and breadth > 2:
                half_minor += 1
            last = corner + (length - 1) * along + (half_minor - 1) * across
            _push(stack, top + 1, last, -across, half_minor, -along, length - half_major)
            _push(stack, top + 2, corner + half_minor * across, along, length, across, breadth - half_minor)
            _push(stack, top + 3, corner, across, half_minor, along, half_major)
            top += 3
    return order


@njit(cache=True)
def _push(stack, top, corner, along, length, across, breadth):  # type: ignore[no-untyped-def]
    stack[top, 0] = corner
    stack[top, 1] = along
    stack[top, 2] = length
    stack[top, 3] = across
    stack[top, 4] = breadth


@njit(cache=True)
def _copy_shifted(order, source, target, count, shift):  # type: ignore[no-untyped-def]
    # Slices tell the compiler that indices need no wrap-around, so the loop becomes vector code.
    walked, copied = order[source : source + count], order[target : target + count]
    for i in range(count):
        copied[i] = walked[i] + shift


@njit(cache=True)
def _half(length, step):  # type: ignore[no-untyped-def]
    """Half of a vector by floor division of the *signed* length: a negative odd vector has the longer first half."""
    return length // 2 if step > 0 else (length + 1) // 2


@njit(cache=True)
def _slot(shapes, along, length, across, breadth):  # type: ignore[no-untyped-def]
    """Where a shape is kept in the open-addressed table, or the free slot where it belongs."""
    slot = (along * 31 + across * 7 + length * 131 + breadth * 8191) & (_SLOTS - 1)
    while shapes[slot, 1] != 0 and not (
        shapes[slot, 0] == along
        and shapes[slot, 1] == length
        and shapes[slot, 2] == across
        and shapes[slot, 3] == breadth
    ):
        slot = (slot + 1) & (_SLOTS - 1)
    return slot


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
