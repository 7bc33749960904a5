"""Gradient of the bias, deterministic: partial tiles in registers, then sums in a fixed order. No atomics.

Tiles whose rows and columns have the same codes relative to each other (see `primitives.bias_code`) touch the same
table entries in the same places: one *class*. A program adds the score gradients of many tiles of a class and of
many images in registers and writes one fp32 partial tile. Then each table entry sums its slots of all partial tiles
in the order of a list that is built once per pattern and bias geometry. Classes are found by comparing codes, so any
pattern under any order works; windows and neighbourhoods have few.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....schedule import BIT_BLOCK, IMAGE
from ....schedule import BLOCKS as BLOCKS_GEOMETRY
from ..contracts import CELL_BIAS, DENSE_BIAS, DISTANCE_BIAS, Facts, Tables
from .arguments import dot_precision, dropout_numbers, padded_head_dim
from .configs import Tile
from .primitives import (
    LOG2E,
    add_bias,
    bias_code,
    column_cells,
    count_columns,
    dropout_keep,
    load_tile,
    reciprocal,
    row_bounds,
    row_cells,
    row_pointers,
    visible_pairs,
)

_PROGRAMS = 1024
"""Programs wanted per launch; enough for several waves on the largest GPUs."""

_LARGEST_WORKSPACE = 2**27
"""Floats of partial tiles; above it heads take turns."""

_CACHED_PLANS = 32


@triton.jit
def _bsa_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, partial_ptr, bias_ptr, cell_ptr, seed_ptr,
    items_ptr, members_ptr, tiles_ptr, bounds_ptr, bits_ptr, position_ptr,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_gb, stride_gh, stride_gl, stride_gd,
    stride_bh, bias_centre, image_width, code_width,
    first_head, launch_heads, batch, splits, heads, group, item_count, length, height, width,
    scale_log2, threshold, keep_scale,
    GEOMETRY: tl.constexpr, MASKED: tl.constexpr, HAS_POSITION: tl.constexpr,
    BIAS: tl.constexpr, HAS_CELLS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of `dS = P * (dP - delta)` over one item's tiles and one split of the images, one column block.

    Grid: items x heads x splits. A table's partial goes to its own slot; a dense bias is written where it belongs
    (each pair belongs to one item, and there is one split).
    """
    pid = tl.program_id(0)
    item = pid % item_count
    head = first_head + pid // item_count % launch_heads
    split = pid // (item_count * launch_heads)
    first_member, past_member = tl.load(items_ptr + 3 * item), tl.load(items_ptr + 3 * item + 1)
    start = tl.load(items_ptr + 3 * item + 2)
    first_image = (split.to(tl.int64) * batch // splits).to(tl.int32)
    past_image = ((split + 1).to(tl.int64) * batch // splits).to(tl.int32)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    wide_head, kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(first_member, past_member):
        tile = load_tile(tiles_ptr, tl.load(members_ptr + index))
        row_y, row_x, query_token, is_row = row_cells(tile, position_ptr, width, GEOMETRY, HAS_POSITION, BLOCK_M)
        bounds = row_bounds(bounds_ptr, row_y, row_x, height, GEOMETRY)
        column_y, column_x, key_token = column_cells(
            tile, start, count_columns(tile, GEOMETRY), reciprocal(tile, GEOMETRY), position_ptr, bounds_ptr,
            width, length, GEOMETRY, HAS_POSITION, BLOCK_N,
        )  # fmt: skip
        visible = visible_pairs(bounds, row_y, column_y, column_x, bits_ptr, GEOMETRY, MASKED)
        visible = visible & is_row[:, None]
        query_code, key_code = query_token, key_token
        if BIAS < 3:
            query_code = bias_code(cell_ptr, query_token, image_width, code_width, BIAS, HAS_CELLS)
            key_code = bias_code(cell_ptr, key_token, image_width, code_width, BIAS, HAS_CELLS)
        bias = add_bias(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), bias_ptr, head, query_code[:, None], key_code[None, :],
            query_token[:, None], key_token[None, :], visible, bias_centre, stride_bh, length, BIAS,
        )  # fmt: skip
        q_rows = row_pointers(q_ptr + wide_head * stride_qh, query_token, stride_ql, stride_qd, offs_d)
        g_rows = row_pointers(dout_ptr + wide_head * stride_gh, query_token, stride_gl, stride_gd, offs_d)
        k_rows = row_pointers(k_ptr + kv_head * stride_kh, key_token, stride_kl, stride_kd, offs_d)
        v_rows = row_pointers(v_ptr + kv_head * stride_vh, key_token, stride_vl, stride_vd, offs_d)
        for image in range(first_image, past_image):
            wide_image = tl.cast(image, tl.int64)
            q = tl.load(q_rows + wide_image * stride_qb, mask=mask_d, other=0.0)
            k = tl.load(k_rows + wide_image * stride_kb, mask=mask_d, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias
            row_offset = (wide_image * heads + wide_head) * length + query_token
            lse = tl.load(lse_ptr + row_offset)
            weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
            dout = tl.load(g_rows + wide_image * stride_gb, mask=mask_d, other=0.0)
            v = tl.load(v_rows + wide_image * stride_vb, mask=mask_d, other=0.0)
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, image * heads + head, query_token[:, None], key_token[None, :], threshold)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            delta = tl.load(delta_ptr + row_offset)
            total += weights * (dweights - delta[:, None])
        if BIAS == 3:
            offset = wide_head * length * length + query_token.to(tl.int64)[:, None] * length + key_token[None, :]
            tl.store(partial_ptr + offset, total, mask=visible)
    if BIAS < 3:
        offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partial_ptr + pid.to(tl.int64) * BLOCK_M * BLOCK_N + offs, total)


@triton.jit
def _bsa_bias_sum_kernel(
    partial_ptr, slot_ptr, first_ptr, entry_ptr, out_ptr, first_head, launch_heads, splits, slots, entries,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one table entry of one head: the sum of its slots. Grid: entries that occur x heads."""
    row, head = tl.program_id(0), tl.program_id(1)
    first, past = tl.load(first_ptr + row), tl.load(first_ptr + row + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, past, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        slot = tl.load(slot_ptr + offs, mask=offs < past, other=0).to(tl.int64)
        for split in range(splits):
            base = partial_ptr + (split * launch_heads + head).to(tl.int64) * slots
            total += tl.load(base + slot, mask=offs < past, other=0.0)
    tl.store(out_ptr + (first_head + head) * entries + tl.load(entry_ptr + row), tl.sum(total, 0))


def launch_bias_gradient(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, bias: Tensor,
    base2: Tensor, stride_bh: int, cells: Tensor | None, seed: Tensor | None, tables: Tables, facts: Facts,
    tile: Tile, scale: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Gradient of the bias in its own shape and dtype; see the module's text."""
    batch, heads, length, head_dim = query.shape
    is_dense = facts.bias == DENSE_BIAS
    entries = base2.shape[-1]
    plan = _plan(tables, facts, cells, length, entries, heads, tile)
    items, slots = len(plan.items), len(plan.items) * tile.rows * tile.columns
    splits = 1 if is_dense else max(1, min(batch, _PROGRAMS // max(items * heads, 1)))
    turn = heads if is_dense else max(1, min(heads, _LARGEST_WORKSPACE // max(splits * slots, 1)))
    gradient = torch.zeros(base2.shape, dtype=torch.float32, device=query.device)
    for first_head in range(0, heads if items else 0, turn):
        launched = min(turn, heads - first_head)
        partial = gradient if is_dense else torch.empty(splits * launched * slots, device=query.device)
        _bsa_bwd_bias_kernel[(items * launched * splits,)](
            query, key, value, dout, lse, delta, partial, base2, cells, seed,
            plan.items, plan.members, tables.bias_tiles, tables.query_bounds, tables.query_bits, tables.position,
            *query.stride(), *key.stride(), *value.stride(), *dout.stride(),
            stride_bh, facts.centre, facts.image_width, facts.code_width,
            first_head, launched, batch, splits, heads, heads // key.shape[1], items, length, facts.height,
            facts.width, scale * LOG2E.value, *dropout_numbers(dropout_p),
            GEOMETRY=facts.geometry, MASKED=bool(facts.bias_masked), HAS_POSITION=len(tables.position) > 0,
            BIAS=facts.bias, HAS_CELLS=cells is not None, DROPOUT=dropout_p > 0, HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
            PRECISION=dot_precision(query.dtype), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if not is_dense:
            _bsa_bias_sum_kernel[(len(plan.entries), launched)](
                partial, plan.slots, plan.first, plan.entries, gradient, first_head, launched, splits, slots,
                entries, BLOCK=256, num_warps=4,
            )  # fmt: skip
    if facts.bias == CELL_BIAS:
        gradient = gradient.t()
    return gradient.to(bias.dtype).contiguous()


def _plan(
    tables: Tables, facts: Facts, cells: Tensor | None, length: int, entries: int, heads: int, tile: Tile
) -> BiasPlan:
    def build() -> BiasPlan:
        return build_plan(
            tables.bias_tiles, tables.query_bounds, tables.position, cells, geometry=facts.geometry,
            width=facts.width, length=length, bias=facts.bias, image_width=facts.image_width,
            code_width=facts.code_width, centre=facts.centre, table_size=entries, heads=heads, rows=tile.rows,
            columns=tile.columns,
        )  # fmt: skip

    tensors = (tables.bias_tiles, tables.query_bounds, tables.position, *(() if cells is None else (cells,)))
    return plans.get(tensors, (*facts, length, entries, heads, *tile), build)


class BiasPlan(NamedTuple):
    """Items of the partial sums, and for a table the slots of each entry that occurs.

    Args:
        members: int32, tiles by class.
        items: int32 `[I, 3]`, a range of members and the first column.
        slots: int32, slots `item * M * N + m * N + n` by table entry.
        first: int32 `[E + 1]`, where each entry's slots begin.
        entries: int32 `[E]`, the table entries that occur.
    """

    members: Tensor
    items: Tensor
    slots: Tensor
    first: Tensor
    entries: Tensor


class _PlanCache:
    """A bounded cache keyed by tensors' storage; an entry keeps its tensors alive, so no address is ever reused."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple, tuple[BiasPlan, tuple[Tensor, ...]]] = OrderedDict()

    def get(self, tensors: tuple[Tensor, ...], numbers: tuple[int, ...], build) -> BiasPlan:
        key = (*((t.data_ptr(), t._version, tuple(t.shape), t.stride(), t.device) for t in tensors), numbers)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key][0]
        plan = build()
        self._plans[key] = (plan, tensors)
        while len(self._plans) > _CACHED_PLANS:
            self._plans.popitem(last=False)
        return plan

    def clear(self) -> None:
        self._plans.clear()


plans = _PlanCache()


def build_plan(
    table: Tensor, bounds: Tensor, position: Tensor, cells: Tensor | None, *, geometry: int, width: int,
    length: int, bias: int, image_width: int, code_width: int, centre: int, table_size: int, heads: int,
    rows: int, columns: int,
) -> BiasPlan:  # fmt: skip
    """Find the classes, cut the work and list the slots of each table entry. Synchronises; runs once per pattern."""
    row_token, is_row, column_token, is_column = _tokens(table, bounds, position, geometry, width, length, rows)
    column_blocks = (is_column.sum(1) + columns - 1) // columns  # [T]
    if bias == DENSE_BIAS:
        tile = torch.repeat_interleave(torch.arange(len(table), device=table.device), column_blocks)
        block = torch.arange(len(tile), device=table.device) - (column_blocks.cumsum(0) - column_blocks)[tile]
        items = torch.stack((tile, tile + 1, block * columns), 1).int()
        none = torch.empty(0, dtype=torch.int32, device=table.device)
        return BiasPlan(torch.arange(len(table), device=table.device).int(), items, none, none, none)

    def code(token: Tensor) -> Tensor:
        if bias == DISTANCE_BIAS:
            return -token
        cell = token if cells is None else cells.long()[token]
        return cell + cell // image_width * (code_width - image_width)

    row_code, column_code = code(row_token), code(column_token)
    # Codes relative to the tile's first row; padding gets a code no real cell can have.
    origin, padding = row_code[:, :1], 2**40
    signature = torch.cat(
        (torch.where(is_row, row_code - origin, padding), torch.where(is_column, column_code - origin, padding)), 1
    )
    _, tile_class = torch.unique(signature, dim=0, return_inverse=True)
    members = torch.argsort(tile_class, stable=True)
    sizes = torch.bincount(tile_class).tolist()
    blocks = column_blocks[members].tolist()

    pairs = int(column_blocks.sum())
    chunk = max(pairs * heads // (2 * _PROGRAMS), 1)
    items, first = [], 0
    for size in sizes:
        for block in range(blocks[first]):
            for start in range(first, first + size, chunk):
                items.append((start, min(start + chunk, first + size), block * columns))
        first += size
    items = torch.tensor(items, dtype=torch.int32, device=table.device).reshape(-1, 3)

    tile = members[items[:, 0].long()]
    offs = items[:, 2].long()[:, None] + torch.arange(columns, device=table.device)
    is_column = torch.nn.functional.pad(is_column, (0, columns))
    column_code = torch.nn.functional.pad(column_code, (0, columns))
    entry = row_code[tile][:, :, None] - column_code[tile].gather(1, offs)[:, None, :] + centre
    is_slot = is_row[tile][:, :, None] & is_column[tile].gather(1, offs)[:, None, :]
    is_slot &= (entry >= 0) & (entry < table_size)
    slots = torch.nonzero(is_slot.flatten())[:, 0]
    entry, by_entry = torch.sort(entry.flatten()[slots], stable=True)
    entries, counts = torch.unique_consecutive(entry, return_counts=True)
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return BiasPlan(members.int(), items, slots[by_entry].int(), first.int(), entries.int())


def _tokens(
    table: Tensor, bounds: Tensor, position: Tensor, geometry: int, width: int, length: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of every tile's rows `[T, rows]` and columns `[T, C]`, and which of them are real."""
    y0, y1, x0, x1, column_y0, column_y1, column_x0, column_x1 = table.long().unsqueeze(-1).unbind(1)
    offs = torch.arange(rows, device=table.device)
    if geometry == BLOCKS_GEOMETRY:
        is_row = offs < x1 - x0
        row_token = torch.minimum(x0 + offs, x1 - 1)
        most = int((column_x1 - column_x0).max()) * BIT_BLOCK
        offs = torch.arange(most, device=table.device)
        entry = (column_x0 + offs // BIT_BLOCK).clamp(max=len(bounds) - 1)
        column_token = bounds.long()[entry, 0] * BIT_BLOCK + offs % BIT_BLOCK
        is_column = (offs < (column_x1 - column_x0) * BIT_BLOCK) & (column_token < length)
        return row_token, is_row, column_token.clamp(max=length - 1), is_column

    def cells(y0: Tensor, y1: Tensor, x0: Tensor, x1: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
        count = (y1 - y0) * (x1 - x0)
        inside = torch.minimum(offs, count - 1)
        cell = x0 + inside
        if geometry == IMAGE:
            cell = (y0 + inside // (x1 - x0)) * width + x0 + inside % (x1 - x0)
        return (position.long()[cell] if len(position) else cell), offs < count

    row_token, is_row = cells(y0, y1, x0, x1, offs)
    most = int(((column_y1 - column_y0) * (column_x1 - column_x0)).max())
    offs = torch.arange(most, device=table.device)
    column_token, is_column = cells(column_y0, column_y1, column_x0, column_x1, offs)
    return row_token, is_row, column_token, is_column
