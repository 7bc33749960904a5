"""Token orders and layouts as device tensors: built once on the host, kept in bounded caches.

Modules ask for tables on every call, with the size of the image at hand; a hit costs a dictionary lookup. Tables
are built outside inference mode and outside the fake tensors of tracing, so that one first needed during evaluation
or export still serves training. Under `torch.compile` a call is evaluated while tracing and its tables become
constants of the graph.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import curves
from .layout import BitRule, BlockLayout, BoxRule, IntervalRule
from .patterns import DEFAULT_BLOCK, Pattern
from .schedule import Schedule, Side, Tiles

ORDERS = ("row_major", "hilbert", "morton", "window", "tile")
_CACHED_SIZES = 64
_PARTED: dict[str, Any] = {
    part.__name__: part for part in (BlockLayout, IntervalRule, BoxRule, BitRule, Schedule, Side, Tiles)
}


def build_order(kind: str, height: int, width: int, tile: int | tuple[int, int] | None = None) -> curves.Order:
    """A token order by name.

    Args:
        kind: one of `ORDERS`.
        height, width: sides of the image.
        tile: side of a window for `"window"`; (rows, columns) for `"tile"`; None for the others.

    Raises:
        ValueError: for an unknown name, or a tile where none belongs or none where one does.
    """
    match kind, tile:
        case "row_major", None:
            return curves.row_major_order(height, width)
        case "hilbert", None:
            return curves.hilbert_order(height, width)
        case "morton", None:
            return curves.morton_order(height, width)
        case "window", int():
            return curves.window_order(height, width, tile)
        case "tile", (int(), int()):
            return curves.tile_order(height, width, tile)
    raise ValueError(
        f"order must be one of {ORDERS}, with a side for 'window', (rows, columns) for 'tile' and nothing "
        f"for the others; got {kind!r} with {tile!r}"
    )


@torch.compiler.assume_constant_result
def order_tables(
    kind: str, height: int, width: int, device: torch.device | str, tile: int | tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Gather indices to the order and back.

    Args:
        kind, height, width, tile: as `build_order`.
        device: where the tables go.

    Returns:
        `order` (image to sequence: `tokens[:, order]`) and `position` (sequence to image), int64 `[L]` each.
    """
    return _order_tables(kind, height, width, tile, _indexed(device))


def layout_for(
    pattern: Pattern,
    kind: str,
    height: int,
    width: int,
    device: torch.device | str,
    *,
    tile: int | tuple[int, int] | None = None,
    query_block: int = DEFAULT_BLOCK,
    key_block: int = DEFAULT_BLOCK,
) -> BlockLayout:
    """The layout of a pattern under a named order, on a device."""
    key = (pattern, kind, height, width, tile, _indexed(device), query_block, key_block)
    if not torch.compiler.is_compiling():
        return _layout(*key)
    # Dynamo takes tensors and numbers for constants but cannot see into an object that came as one, nor build for
    # the call a pattern that was made while tracing.
    values = tuple(getattr(pattern, field.name) for field in fields(pattern))  # type: ignore[arg-type]  # all patterns are dataclasses
    return _rebuilt(_layout_parts(type(pattern), values, *key[1:]))


def clear_caches() -> None:
    """Forget every table, for instance to free device memory after training at many sizes."""
    _order_tables.cache_clear()
    _layout.cache_clear()


@lru_cache(_CACHED_SIZES)
def _order_tables(
    kind: str, height: int, width: int, tile: int | tuple[int, int] | None, device: str
) -> tuple[Tensor, Tensor]:
    order = build_order(kind, height, width, tile)
    with torch.inference_mode(False), unset_fake_temporarily():
        tables = (order, curves.inverse_order(order))
        gather, scatter = (torch.from_numpy(table).to(device=device, dtype=torch.int64) for table in tables)
    return gather, scatter


@lru_cache(_CACHED_SIZES)
def _layout(
    pattern: Pattern, kind: str, height: int, width: int, tile: int | tuple[int, int] | None, device: str,
    query_block: int, key_block: int,
) -> BlockLayout:  # fmt: skip
    order = build_order(kind, height, width, tile)
    with torch.inference_mode(False), unset_fake_temporarily():
        layout = pattern.layout(height, width, order, query_block=query_block, key_block=key_block)
        return layout.to(device)


@torch.compiler.assume_constant_result
def _layout_parts(kind: type[Pattern], values: tuple[Any, ...], *key: Any) -> Any:
    return _parts(_layout(kind(*values), *key))


def _parts(value: Any) -> Any:
    """Dataclasses and tuples as nested tuples of a type's name and what it is made of; all else as it is."""
    if type(value).__name__ in _PARTED:
        return type(value).__name__, tuple(_parts(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple):
        return "tuple", tuple(_parts(item) for item in value)
    return value


def _rebuilt(parts: Any) -> Any:
    """What `_parts` took apart."""
    if not isinstance(parts, tuple):
        return parts
    name, values = parts
    rebuilt = [_rebuilt(value) for value in values]
    return tuple(rebuilt) if name == "tuple" else _PARTED[name](*rebuilt)


def _indexed(device: torch.device | str) -> str:
    """The device's name with its index spelled out: "cuda" means another device on another current device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return str(device)
