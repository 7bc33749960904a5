"""Putting tokens on a curve and back, as gathers in both directions.

A reordering is a table of which tokens go where. Its gradient is the gather by the inverse table, never a scatter:
deterministic, and as fast as the way there. Tables are built once per size and device and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from vitreous_core import indexing
from vitreous_core.curves import inverse_order

OrderName = Literal["hilbert", "row_major", "morton", "window", "tile"]
Tile = int | tuple[int, int] | None

_CACHED_SIZES = 64

# Of the 2x2 cells that patch merging joins, (row, column) in the order of the official weights: down, then right.
_MERGED = ((0, 0), (1, 0), (0, 1), (1, 1))


@dataclass(frozen=True)
class Curve:
    """A token order for maps of any size.

    Args:
        order: `"hilbert"`, `"row_major"`, `"morton"`, `"window"` (square windows one after the other) or `"tile"`.
        tile: side for `"window"`, cut to the map; `(rows, columns)` for `"tile"`; None for the others.

    Raises:
        ValueError: for an unknown order, or a tile where none belongs or none where one does.
    """

    order: OrderName
    tile: Tile = None

    def __post_init__(self) -> None:
        indexing.build_order(self.order, 1, 1, self.tile_on(1, 1))

    def tile_on(self, height: int, width: int) -> Tile:
        """The tile on a map of this size."""
        if self.order == "window" and isinstance(self.tile, int):
            return min(self.tile, height, width)
        return self.tile

    def tables(self, height: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Gather indices int64 `[L]` from image to curve order, and back."""
        return indexing.order_tables(self.order, height, width, device, self.tile_on(height, width))

    def put_on(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens `[B, L, ...]` from image order to the curve."""
        if self.order == "row_major":
            return tokens
        order, position = self.tables(height, width, tokens.device)
        return permute_tokens(tokens, order, position)

    def take_off(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens `[B, L, ...]` from the curve to image order."""
        if self.order == "row_major":
            return tokens
        order, position = self.tables(height, width, tokens.device)
        return permute_tokens(tokens, position, order)

    def merge(self, tokens: Tensor, height: int, width: int, target: Curve) -> Tensor:
        """The four cells of each 2x2 square side by side, squares in the order of another curve.

        Odd sides are padded with zeros at the bottom and right.

        Args:
            tokens: `[B, height * width, C]` on this curve.
            height, width: sides of the map.
            target: the curve through the `ceil(height / 2) x ceil(width / 2)` squares.

        Returns:
            `[B, ceil(height / 2) * ceil(width / 2), 4 * C]`: cells (0, 0), (1, 0), (0, 1), (1, 1) of each square.
        """
        squares = -(-height // 2), -(-width // 2)
        tiles = self.tile_on(height, width), target.tile_on(*squares)
        table, inverse = _merge_tables(self.order, tiles[0], target.order, tiles[1], height, width, str(tokens.device))
        if height % 2 or width % 2:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        return permute_tokens(tokens, table, inverse).unflatten(1, (-1, 4)).flatten(2)


def permute_tokens(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`tokens[:, order]`, whose gradient is the gather by `inverse` instead of a scatter.

    Args:
        tokens: `[B, L, ...]`.
        order: int64 `[L]`, a permutation.
        inverse: int64 `[L]`, its inverse. With the two swapped, tokens go back.
    """
    if not (torch.is_grad_enabled() and tokens.requires_grad):
        # As in the backward pass: binding the arguments of a function with a `setup_context` takes longer than this.
        return tokens.index_select(1, order)
    return _Permutation.apply(tokens, order, inverse)


class _Permutation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return tokens.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute_tokens(grad, inverse, order), None, None


class Gather(NamedTuple):
    """A gather in which a token may occur several times or not at all.

    Args:
        table: int64 `[N]`, the token of each slot.
        slots: int64 `[L, R]`, the slots of each token; `N` stands for none.
    """

    table: Tensor
    slots: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """`tokens[:, table]` for tokens `[B, L, ...]`; the gradient sums each token's slots, without a scatter."""
        return _Gather.apply(tokens, self.table, self.slots)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(tokens: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        return tokens.index_select(1, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        none = (0, 0) * (grad.ndim - 2)
        padded = F.pad(grad, (*none, 0, 1))
        return padded.index_select(1, slots.flatten()).unflatten(1, slots.shape).sum(2), None, None


def slots_of(table: NDArray[np.int64], is_real: NDArray[np.bool_], tokens: int) -> NDArray[np.int64]:
    """`Gather.slots` of a table.

    Args:
        table: `[N]`, the token of each slot.
        is_real: `[N]`, False for padding, whose gradient nobody may see.
        tokens: `L`.
    """
    slot = np.flatnonzero(is_real)
    slot = slot[np.argsort(table[slot], kind="stable")]
    count = np.bincount(table[slot], minlength=tokens)
    slots = np.full((tokens, max(int(count.max(initial=0)), 1)), len(table), dtype=np.int64)
    slots[np.arange(slots.shape[1]) < count[:, None]] = slot
    return slots


def constants(build: Callable[[], tuple[NDArray[np.generic], ...]], device: str) -> tuple[Tensor, ...]:
    """Arrays as tensors on a device that outlive inference mode and tracing."""
    with torch.inference_mode(False), unset_fake_temporarily():
        return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in build())


@torch.compiler.assume_constant_result
def _merge_tables(
    kind: str, tile: Tile, target_kind: str, target_tile: Tile, height: int, width: int, device: str
) -> tuple[Tensor, Tensor]:
    return _cached_merge_tables(kind, tile, target_kind, target_tile, height, width, device)


@lru_cache(_CACHED_SIZES)
def _cached_merge_tables(
    kind: str, tile: Tile, target_kind: str, target_tile: Tile, height: int, width: int, device: str
) -> tuple[Tensor, Tensor]:
    def build() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows, columns = -(-height // 2), -(-width // 2)
        square = indexing.build_order(target_kind, rows, columns, target_tile).astype(np.int64)
        down, right = (np.array(offset) for offset in zip(*_MERGED, strict=True))
        y, x = 2 * (square // columns)[:, None] + down, 2 * (square % columns)[:, None] + right
        position = inverse_order(indexing.build_order(kind, height, width, tile)).astype(np.int64)
        # Cells of padding are the token after the last.
        position = np.append(position, height * width)
        cell = np.where((y < height) & (x < width), y * width + x, height * width)
        table = position[cell].ravel()
        inverse = np.empty(height * width + (len(table) > height * width), dtype=np.int64)
        inverse[table] = np.arange(len(table))
        return table, inverse

    table, inverse = constants(build, device)
    return table, inverse
