"""Attention patterns: who may look at whom. Each can become dense (the slow truth) or a `BlockLayout` (fast).

1-D patterns speak of token positions, whatever the order is. 2-D patterns speak of image cells: under any token
order they keep their exact meaning, and only their block sparsity changes.

Definitions: arXiv 2511.05832 for the patterns on a curve (HWA, HSWA, HSA, HNA); NATTEN's clamped neighbourhoods,
dilation and even kernels for `Neighborhood2d`; Swin's shifted windows for `Window2d`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _block_lists, schedule
from ._block_lists import Lists
from .curves import Order, check_order, inverse_order
from .layout import _EMPTY, _FULL, BitRule, BlockLayout, BoxRule, IntervalRule

Pair = int | tuple[int, int]

DEFAULT_BLOCK = 64
"""Tokens per block of a layout when the caller names none."""


class Pattern(ABC):
    """What all patterns can do."""

    def dense(self, height: int, width: int, order: Order | None = None) -> NDArray[np.bool_]:
        """The mask in token order: entry (i, j) tells whether token `i` sees token `j`.

        Args:
            height, width: sides of the image, at least 1.
            order: token order as `vitreous_core.curves` makes them; None is row-major.

        Returns:
            bool `[L, L]`, `L = height * width`.

        Raises:
            TypeError, ValueError: when a side or the order is malformed.
        """
        return self._dense(height, width, _checked_order(height, width, order))

    def layout(
        self,
        height: int,
        width: int,
        order: Order | None = None,
        *,
        query_block: int = DEFAULT_BLOCK,
        key_block: int = DEFAULT_BLOCK,
    ) -> BlockLayout:
        """Block lists on the CPU, built from geometry, never from an `L x L` array.

        Args:
            height, width, order: as in `dense`.
            query_block, key_block: tokens per block, at least 1. FlexAttention and the Triton kernels want
                powers of two from 16 up.

        Raises:
            TypeError, ValueError: when an argument is malformed.
        """
        for name, block in (("query_block", query_block), ("key_block", key_block)):
            if isinstance(block, bool) or not isinstance(block, int) or block < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {block!r}")
        return self._layout(height, width, _checked_order(height, width, order), query_block, key_block)

    @abstractmethod
    def _dense(self, height: int, width: int, order: Order) -> NDArray[np.bool_]: ...

    @abstractmethod
    def _layout(self, height: int, width: int, order: Order, query_block: int, key_block: int) -> BlockLayout: ...


class _IntervalPattern(Pattern):
    """A pattern on token positions in which each query sees one run of keys."""

    @abstractmethod
    def bounds(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First visible key and one past the last, per query."""

    def _dense(self, height: int, width: int, order: Order) -> NDArray[np.bool_]:
        start, stop = self.bounds(height * width)
        key = np.arange(height * width)
        return (key >= start[:, None]) & (key < stop[:, None])

    def _layout(self, height: int, width: int, order: Order, query_block: int, key_block: int) -> BlockLayout:
        length = height * width
        start, stop = (bound.astype(np.int32) for bound in self.bounds(length))
        token = np.arange(length)
        token_reach = int(np.maximum(token - start, stop - 1 - token).max(initial=0))
        return _assemble(
            (height, width),
            (query_block, key_block),
            _block_lists.interval_lists(start, stop, query_block, key_block),
            IntervalRule(torch.from_numpy(start), torch.from_numpy(stop)),
            schedule.sequence_schedule(start, stop),
            # Under an unknown order close tokens may lie anywhere in the image.
            reach=(height - 1, width - 1),
            token_reach=token_reach,
        )


@dataclass(frozen=True)
class Window1d(_IntervalPattern):
    """Windows along the sequence: `floor((i + shift) / size) == floor((j + shift) / size)` (HWA; HSWA shifted).

    A last group shorter than `size` simply is short. arXiv 2511.05832 shifts by `size // 2`.

    Args:
        size: tokens per window, at least 1.
        shift: how far the window borders move towards the start, `0 <= shift < size`.
    """

    size: int
    shift: int = 0

    def __post_init__(self) -> None:
        _check_positive("size", self.size)
        _check_shift(self.shift, self.size)

    def bounds(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start = (np.arange(length) + self.shift) // self.size * self.size - self.shift
        return np.maximum(start, 0), np.minimum(start + self.size, length)


@dataclass(frozen=True)
class Slide1d(_IntervalPattern):
    """A band along the sequence: `|i - j| <= kernel // 2`, fewer keys at the ends (HSA).

    Args:
        kernel: keys per query, odd.
    """

    kernel: int

    def __post_init__(self) -> None:
        _check_odd("kernel", self.kernel)

    def bounds(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        token = np.arange(length)
        radius = self.kernel // 2
        return np.maximum(token - radius, 0), np.minimum(token + radius + 1, length)


@dataclass(frozen=True)
class Neighborhood1d(_IntervalPattern):
    """Exactly `kernel` keys per query, clamped into the sequence: start `clamp(i - kernel // 2, 0, L - kernel)` (HNA).

    A kernel longer than the sequence sees all of it. Even kernels are allowed.

    Args:
        kernel: keys per query, at least 1.
    """

    kernel: int

    def __post_init__(self) -> None:
        _check_positive("kernel", self.kernel)

    def bounds(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _clamped(np.arange(length), length, self.kernel)


class _BoxPattern(Pattern):
    """A pattern on the image that is a product of a rule for rows and a rule for columns."""

    @abstractmethod
    def axis_bounds(self, cells: int, axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First visible cell and one past the last along one axis, in residue-major cells, per residue-major cell."""

    def dilations(self) -> tuple[int, int]:
        """Steps between visible rows and between visible columns."""
        return 1, 1

    def _dense(self, height: int, width: int, order: Order) -> NDArray[np.bool_]:
        row, column = np.divmod(order.astype(np.int64), width)
        allowed = np.ones((height * width, height * width), dtype=np.bool_)
        for axis, (cells, cell) in enumerate(((height, row), (width, column))):
            major = _residue_major(cells, self.dilations()[axis])
            start, stop = self.axis_bounds(cells, axis)
            key = major[cell]
            allowed &= (key >= start[key][:, None]) & (key < stop[key][:, None])
        return allowed

    def _layout(self, height: int, width: int, order: Order, query_block: int, key_block: int) -> BlockLayout:
        position = inverse_order(order)
        coordinates, bounds, reach = [], [], []
        cells_of, axes = [], []
        for axis, (cells, cell) in enumerate(zip((height, width), np.divmod(order, np.int32(width)), strict=True)):
            major = _residue_major(cells, self.dilations()[axis])
            start, stop = (bound.astype(np.int32) for bound in self.axis_bounds(cells, axis))
            axes.append((start, stop))
            image_cell = np.argsort(major)
            cells_of.append(image_cell)
            coordinates.append(major[cell].astype(np.int32))
            bounds += [start[coordinates[-1]], stop[coordinates[-1]]]
            ends = np.stack((image_cell[start], image_cell[np.maximum(stop - 1, start)]))
            reach.append(int(np.abs(ends - image_cell).max()))
        token = position.reshape(height, width)[cells_of[0][:, None], cells_of[1]]
        is_own = bool((token.ravel() == np.arange(height * width)).all())
        lists = _block_lists.box_lists(np.stack(bounds, axis=1), token // np.int32(key_block), query_block, key_block)
        tensors = [torch.from_numpy(array) for array in (*coordinates, *bounds)]
        return _assemble(
            (height, width), (query_block, key_block), lists, BoxRule(*tensors),
            schedule.image_schedule(axes[0], axes[1], None if is_own else token),
            reach=(reach[0], reach[1]), token_reach=height * width - 1, step=self.dilations(),
        )  # fmt: skip


@dataclass(frozen=True)
class Window2d(_BoxPattern):
    """Square windows on the image (WSA); with a shift the windows of Swin after its cyclic roll and region mask.

    Rows see each other iff `floor((y - shift) / window)` agree, columns likewise: the rolled windows whose parts the
    region mask keeps apart are exactly these. A window larger than the image is one window.

    Args:
        window: side, or (rows, columns), at least 1.
        shift: how far the window borders move away from the origin, `0 <= shift < window`; or (rows, columns).
    """

    window: Pair
    shift: Pair = 0

    def __post_init__(self) -> None:
        for window, shift in zip(_pair("window", self.window), _pair("shift", self.shift), strict=True):
            _check_positive("window", window)
            _check_shift(shift, window)

    def axis_bounds(self, cells: int, axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        window, shift = _pair("window", self.window)[axis], _pair("shift", self.shift)[axis]
        start = (np.arange(cells) - shift) // window * window + shift
        return np.maximum(start, 0), np.minimum(start + window, cells)


@dataclass(frozen=True)
class _Kernel2d(_BoxPattern):
    kernel: Pair
    dilation: Pair = 1

    def __post_init__(self) -> None:
        for kernel, dilation in zip(_pair("kernel", self.kernel), _pair("dilation", self.dilation), strict=True):
            _check_positive("kernel", kernel)
            _check_positive("dilation", dilation)

    def dilations(self) -> tuple[int, int]:
        return _pair("dilation", self.dilation)

    def axis_bounds(self, cells: int, axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts, stops, first = [], [], 0
        for count in _residue_counts(cells, self.dilations()[axis]):
            start, stop = self._group_bounds(count, _pair("kernel", self.kernel)[axis])
            starts.append(first + start)
            stops.append(first + stop)
            first += count
        return np.concatenate(starts), np.concatenate(stops)

    @abstractmethod
    def _group_bounds(self, count: int, kernel: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bounds along `count` cells of one residue."""


@dataclass(frozen=True)
class Slide2d(_Kernel2d):
    """The `kernel x kernel` cells centred on the query, fewer at the border (SA).

    Args:
        kernel: odd side, or (rows, columns).
        dilation: step between visible cells, at least 1; or (rows, columns).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for kernel in _pair("kernel", self.kernel):
            _check_odd("kernel", kernel)

    def _group_bounds(self, count: int, kernel: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        cell = np.arange(count)
        return np.maximum(cell - kernel // 2, 0), np.minimum(cell + kernel // 2 + 1, count)


@dataclass(frozen=True)
class Neighborhood2d(_Kernel2d):
    """NATTEN's neighbourhood: `kernel x kernel` cells, the window clamped into the image (NA2D).

    Per axis the window starts at `clamp(i - kernel // 2, 0, n - kernel)`, among the cells of the query's own residue
    when dilated. Even kernels are allowed; a kernel longer than the axis sees all of it.

    Args:
        kernel: side, or (rows, columns), at least 1.
        dilation: step between visible cells, at least 1; or (rows, columns).
    """

    def _group_bounds(self, count: int, kernel: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _clamped(np.arange(count), count, kernel)


Predicate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskPattern(Pattern):
    """A pattern given by a predicate on token positions; see `from_mask`."""

    predicate: Predicate
    length: int

    def _dense(self, height: int, width: int, order: Order) -> NDArray[np.bool_]:
        self._check_length(height, width)
        return np.concatenate([self._rows(low, min(low + 256, self.length)) for low in range(0, self.length, 256)])

    def _layout(self, height: int, width: int, order: Order, query_block: int, key_block: int) -> BlockLayout:
        self._check_length(height, width)
        shape = (-(-self.length // query_block), -(-self.length // key_block))
        block = np.full(shape, _EMPTY, dtype=np.int32)
        bits: list[NDArray[np.uint8]] = []
        token_reach = 0
        for i in range(shape[0]):
            rows = self._rows(i * query_block, min((i + 1) * query_block, self.length))
            query, key = np.nonzero(rows)
            token_reach = max(token_reach, int(np.abs(key - query - i * query_block).max(initial=0)))
            padded = np.zeros((query_block, shape[1] * key_block), dtype=np.bool_)
            padded[: len(rows), : self.length] = rows
            tiles = padded.reshape(query_block, shape[1], key_block).swapaxes(0, 1)
            some, every = tiles.any((1, 2)), tiles.all((1, 2))
            block[i, every] = _FULL
            partial = np.flatnonzero(some & ~every)
            block[i, partial] = len(bits) + np.arange(len(partial))
            bits.extend(np.packbits(tiles[partial], axis=-1, bitorder="little"))
        packed = np.stack(bits) if bits else np.zeros((1, query_block, -(-key_block // 8)), dtype=np.uint8)
        listed = block != _EMPTY
        columns = np.nonzero(listed)[1].astype(np.int32)
        lists = _block_lists._pad(listed.sum(1, dtype=np.int32), columns, block[listed] != _FULL)
        rule = BitRule(torch.from_numpy(packed), torch.from_numpy(block), query_block, key_block)
        reach = (height - 1, width - 1)
        walk = schedule.block_schedule(self._rows, self.length)
        return _assemble((height, width), (query_block, key_block), lists, rule, walk, reach, token_reach)

    def _rows(self, low: int, high: int) -> NDArray[np.bool_]:
        query, key = torch.arange(low, high)[:, None], torch.arange(self.length)[None, :]
        allowed = torch.as_tensor(self.predicate(query, key))
        if allowed.dtype != torch.bool:
            raise TypeError(f"fn must return a boolean tensor; got {allowed.dtype}. Compare, do not weigh")
        return allowed.expand(high - low, self.length).numpy()

    def _check_length(self, height: int, width: int) -> None:
        if height * width != self.length:
            raise ValueError(
                f"height * width must equal the length {self.length} given to from_mask; got {height} x {width}"
            )


def from_mask(fn: Predicate, length: int) -> MaskPattern:
    """A pattern from any boolean predicate; the one builder that looks at every pair of tokens.

    Args:
        fn: called with int64 CPU tensors of query positions `[n, 1]` and key positions `[1, length]` in token order;
            returns bool, broadcastable to `[n, length]`. True means visible.
        length: tokens; `dense` and `layout` then take any height and width with that product.

    Raises:
        TypeError: when `fn` returns anything but booleans.
        ValueError: when `length` is below 1.
    """
    _check_positive("length", length)
    return MaskPattern(fn, length)


def _assemble(
    grid: tuple[int, int], blocks: tuple[int, int], lists: Lists, rule: IntervalRule | BoxRule | BitRule,
    walk: schedule.Schedule, reach: tuple[int, int], token_reach: int, step: tuple[int, int] = (1, 1),
) -> BlockLayout:  # fmt: skip
    transposed = _block_lists.transpose_lists(lists, -(-grid[0] * grid[1] // blocks[1]))
    counts, indices, partial = map(torch.from_numpy, lists)
    key_counts, key_indices, key_partial = map(torch.from_numpy, transposed)
    return BlockLayout(
        *grid, *blocks, counts, indices, partial, key_counts, key_indices, key_partial, rule, walk, reach, token_reach,
        step,
    )  # fmt: skip


def _residue_counts(cells: int, dilation: int) -> list[int]:
    return [len(range(residue, cells, dilation)) for residue in range(min(dilation, cells))]


def _residue_major(cells: int, dilation: int) -> NDArray[np.int64]:
    """Residue-major coordinate of every cell of an axis."""
    first = np.cumsum([0, *_residue_counts(cells, dilation)])
    cell = np.arange(cells)
    return first[cell % dilation] + cell // dilation


def _clamped(cell: NDArray[np.int64], count: int, kernel: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    start = np.clip(cell - kernel // 2, 0, max(count - kernel, 0))
    return start, np.minimum(start + kernel, count)


def _checked_order(height: int, width: int, order: Order | None) -> Order:
    _check_positive("height", height)
    _check_positive("width", width)
    if order is None:
        return np.arange(height * width, dtype=np.int32)
    return check_order(order, height * width)


def _pair(name: str, value: Pair) -> tuple[int, int]:
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"{name} must be one number or (rows, columns); got {value!r}")
        return value
    return value, value


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _check_odd(name: str, value: int) -> None:
    _check_positive(name, value)
    if value % 2 == 0:
        raise ValueError(f"{name} must be odd, so that the query is its centre; got {value}. Use {value + 1}")


def _check_shift(shift: int, size: int) -> None:
    if isinstance(shift, bool) or not isinstance(shift, int | np.integer):
        raise TypeError(f"shift must be an integer; got {shift!r}")
    if not 0 <= shift < size:
        raise ValueError(f"shift must lie in 0..{size - 1} for windows of {size}; got {shift}")
