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

    Every further function and every call with a literal argument is compiled by itself, and shifts need none of the
    checks of a floor division: the cold start is what this body has few calls and no divisions for.
    """
    order = np.empty(height * width, dtype=np.int32)
    stack = np.empty((_STACK, 5), dtype=np.int64)  # corner, along, length, across, breadth
    shapes = np.zeros((_SLOTS, 4), dtype=np.int64)  # along, length, across, breadth; length 0 is a free slot
    finished = np.empty((_SLOTS, 2), dtype=np.int64)  # corner, first position in the order
    remembered = 0
    stack[0, 0] = 0
    if width >= height:
        stack[0, 1], stack[0, 2], stack[0, 3], stack[0, 4] = 1, width, width, height
    else:
        stack[0, 1], stack[0, 2], stack[0, 3], stack[0, 4] = width, height, 1, width
    top = 0
    k = 0
    while top >= 0:
        corner, along, length = stack[top, 0], stack[top, 1], stack[top, 2]
        across, breadth = stack[top, 3], stack[top, 4]
        top -= 1
        area = length * breadth
        if breadth == 1 or length == 1:
            step = along if breadth == 1 else across
            for i in range(area):
                order[k + i] = corner + i * step
            k += area
            continue
        if area >= _SMALLEST_COPY:
            # An open-addressed table: the shape's slot, or the free one where it belongs.
            slot = (along * 31 + across * 7 + length * 131 + breadth * 8191) & (_SLOTS - 1)
            while shapes[slot, 1] != 0 and not (
                shapes[slot, 0] == along
                and shapes[slot, 1] == length
                and shapes[slot, 2] == across
                and shapes[slot, 3] == breadth
            ):
                slot = (slot + 1) & (_SLOTS - 1)
            if shapes[slot, 1] != 0:
                # An enclosing rectangle is larger than this one, so whatever has this shape is finished. Slices tell
                # the compiler that indices need no wrap-around, so the loop becomes vector code.
                source, shift = finished[slot, 1], np.int32(corner - finished[slot, 0])
                walked, copied = order[source : source + area], order[k : k + area]
                for i in range(area):
                    copied[i] = walked[i] + shift
                k += area
                continue
            if remembered < _REMEMBERED:
                shapes[slot, 0], shapes[slot, 1], shapes[slot, 2], shapes[slot, 3] = along, length, across, breadth
                finished[slot, 0], finished[slot, 1] = corner, k
                remembered += 1
        # Half of a vector is the floor of half its *signed* length: a negative odd one has the longer first half.
        half_major = (length + (along < 0)) >> 1
        half_minor = (breadth + (across < 0)) >> 1
        if 2 * length > 3 * breadth:
            if half_major & 1 and length > 2:
                # Lengthening goes along the vector, away from zero, whatever its sign.
                half_major += 1
            _push(stack, top + 1, corner + half_major * along, along, length - half_major, across, breadth)
            _push(stack, top + 2, corner, along, half_major, across, breadth)
            top += 2
        else:
            if half_minor & 1 and breadth > 2:
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
