"""Local attention on an image in plain torch: exact, differentiable, and never an `L x L` array.

The counterpart of `sequence_attention` for patterns that speak of image cells. The image is cut into small rectangles
of queries; each visits the one rectangle of keys that its queries see, in the tiling that the kernels walk
(`vitreous_core.schedule`). Tokens may lie in any order: tables say which token every cell is. Keys that several
rectangles visit are gathered several times; their gradient is a gather too, so two runs agree bitwise.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitreous_core import indexing
from vitreous_core.patterns import Pattern
from vitreous_core.schedule import Schedule

from .reorder import Curve, Gather, constants, slots_of
from .sequence_attention import TokenBias, attend

_QUERIES = 64  # at most, per rectangle: the tiling that visits few keys in vain and is still worth a call
_CACHED_SIZES = 16


class Tiling(NamedTuple):
    """A pattern on a map, cut into `T` rectangles of at most `N` queries and `K` keys.

    Args:
        queries, keys: gathers to `[T * N]` and `[T * K]` slots; padding repeats a token.
        outputs: gather from the `T * N` slots to the tokens.
        visible: bool `[T, N, K]`.
    """

    queries: Gather
    keys: Gather
    outputs: Gather
    visible: Tensor


def image_attention(
    query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, *, scale: float, bias: TokenBias | None
) -> Tensor:
    """Attention over the visible pairs of a tiling.

    Args:
        query, key, value: `[B, H, L, D]` in the token order of the tiling, any strides.
        tiling: from `tiling_of`.
        scale: factor on the scores.
        bias: added to the scores.

    Returns:
        `[B, H, L, D]`, dtype of `value`.
    """
    tiles, rows, columns = tiling.visible.shape

    def cut(tokens: Tensor, gather: Gather, size: int) -> Tensor:
        return gather(tokens.transpose(1, 2)).unflatten(1, (tiles, size)).permute(0, 3, 1, 2, 4)  # [B, H, T, size, D]

    added = None
    if bias is not None:
        added = bias(tiling.queries.table.view(tiles, rows, 1), tiling.keys.table.view(tiles, 1, columns))
    k, v = cut(key, tiling.keys, columns), cut(value, tiling.keys, columns)
    out = attend(cut(query, tiling.queries, rows), k.mT, v, scale, added, tiling.visible)
    return tiling.outputs(out.flatten(2, 3).transpose(1, 2)).transpose(1, 2)


def tiling_of(pattern: Pattern, curve: Curve, height: int, width: int, device: torch.device | str) -> Tiling:
    """The tiling of a pattern on the image, for tokens on a curve; built once per size and device, and kept."""
    # Dynamo cannot take for a constant what it has itself made while tracing, such as a pattern.
    values = tuple(getattr(pattern, field.name) for field in fields(pattern))  # type: ignore[arg-type]  # a dataclass
    tile = curve.tile_on(height, width)
    tables = _tables(type(pattern), values, curve.order, tile, height, width, str(torch.device(device)))
    *gathers, visible = tables
    queries, keys, outputs = (Gather(*gathers[first : first + 2]) for first in (0, 2, 4))
    return Tiling(queries, keys, outputs, visible)


@torch.compiler.assume_constant_result
def _tables(kind: type[Pattern], values: tuple[Any, ...], *key: Any) -> tuple[Tensor, ...]:
    return _cached_tables(kind(*values), *key)


@lru_cache(_CACHED_SIZES)
def _cached_tables(
    pattern: Pattern, order: str, tile: int | tuple[int, int] | None, height: int, width: int, device: str
) -> tuple[Tensor, ...]:
    layout = indexing.layout_for(pattern, order, height, width, "cpu", tile=tile)

    def build() -> tuple[NDArray[np.generic], ...]:
        table = layout.schedule.queries.at(_QUERIES).table.numpy().astype(np.int64)
        query, is_query = _cells(layout.schedule, table[:, 0:4])
        key, is_key = _cells(layout.schedule, table[:, 4:8])
        rule = layout.rule.allows(torch.from_numpy(query)[:, :, None], torch.from_numpy(key)[:, None, :]).numpy()
        slot_of_token = np.empty(layout.length, dtype=np.int64)
        slot_of_token[query[is_query]] = np.flatnonzero(is_query)
        outputs = np.full((query.size, 1), layout.length, dtype=np.int64)
        outputs[slot_of_token, 0] = np.arange(layout.length)
        gathers = []
        for tokens, is_real in ((query, is_query), (key, is_key)):
            gathers += [tokens.ravel(), slots_of(tokens.ravel(), is_real.ravel(), layout.length)]
        # A padding query sees what its copy sees; its output is dropped.
        return *gathers, slot_of_token, outputs, rule & is_key[:, None, :]

    return constants(build, device)


def _cells(schedule: Schedule, rectangle: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens of the cells in rectangles `[T, 4]` (half-open rows, then columns), and which are no padding: `[T, N]`."""
    top, bottom, left, right = rectangle.T[:, :, None]
    columns = right - left
    index = np.arange(int(((bottom - top) * columns).max()))
    is_real = index < (bottom - top) * columns
    index = np.minimum(index, (bottom - top) * columns - 1)
    cell = (top + index // columns) * schedule.width + left + index % columns
    position = schedule.position.numpy()
    return position.astype(np.int64)[cell] if len(position) else cell, is_real
