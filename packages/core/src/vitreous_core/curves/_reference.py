"""The generalised Hilbert curve, slow and obvious: the recursion that the Numba walk is checked against."""

from __future__ import annotations

from collections.abc import Iterator

Cell = tuple[int, int]
Vector = tuple[int, int]


def walk(height: int, width: int) -> Iterator[Cell]:
    """Cells (x, y) of a `height x width` grid in curve order."""
    if width >= height:
        yield from _rectangle((0, 0), (width, 0), (0, height))
    else:
        yield from _rectangle((0, 0), (0, height), (width, 0))


def _rectangle(corner: Cell, major: Vector, minor: Vector) -> Iterator[Cell]:
    """Cover the rectangle spanned by two axis-parallel vectors, from `corner` to the end of `major`."""
    length, breadth = abs(sum(major)), abs(sum(minor))
    along, across = _unit(major), _unit(minor)

    if breadth == 1 or length == 1:
        count, step = (length, along) if breadth == 1 else (breadth, across)
        for i in range(count):
            yield (corner[0] + i * step[0], corner[1] + i * step[1])
        return

    half_major, half_minor = _half(major), _half(minor)
    if 2 * length > 3 * breadth:
        # A long rectangle is cut in two across its length; an even first half keeps the path 4-connected.
        if abs(sum(half_major)) % 2 and length > 2:
            half_major = _add(half_major, along)
        yield from _rectangle(corner, half_major, minor)
        yield from _rectangle(_add(corner, half_major), _sub(major, half_major), minor)
        return

    # Otherwise: up one half-width column, along the top, down the other column.
    if abs(sum(half_minor)) % 2 and breadth > 2:
        half_minor = _add(half_minor, across)
    yield from _rectangle(corner, half_minor, half_major)
    yield from _rectangle(_add(corner, half_minor), major, _sub(minor, half_minor))
    last = _add(_add(corner, _sub(major, along)), _sub(half_minor, across))
    yield from _rectangle(last, _neg(half_minor), _neg(_sub(major, half_major)))


def _unit(v: Vector) -> Vector:
    return ((v[0] > 0) - (v[0] < 0), (v[1] > 0) - (v[1] < 0))


def _half(v: Vector) -> Vector:
    return (v[0] // 2, v[1] // 2)


def _add(u: Vector, v: Vector) -> Vector:
    return (u[0] + v[0], u[1] + v[1])


def _sub(u: Vector, v: Vector) -> Vector:
    return (u[0] - v[0], u[1] - v[1])


def _neg(v: Vector) -> Vector:
    return (-v[0], -v[1])
