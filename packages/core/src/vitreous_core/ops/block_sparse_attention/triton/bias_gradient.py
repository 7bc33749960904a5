"""Gradient of the bias, deterministic: partial tiles in registers, then sums in a fixed order. No atomics.

Tiles whose rows and columns have the same codes relative to each other (see `primitives.bias_code`) touch the same
table entries in the same places: one *class*. A program adds the score gradients of many tiles of a class and of
many images in registers and writes one fp32 partial tile; partial tiles of one place are folded into one; then each
table entry sums its slots in the order of a list that is built once per pattern and bias geometry. Classes are found
by comparing codes, so any pattern under any order works; windows and neighbourhoods have few.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....kernel_launch import Launch
from ....schedule import BIT_BLOCK, IMAGE
from ....schedule import BLOCKS as BLOCKS_GEOMETRY
from ..contracts import CELL_BIAS, DENSE_BIAS, DISTANCE_BIAS, Facts, Tables
from .arguments import BiasArguments, Signature, cache, dropout_numbers, mask_level
from .configs import Tile
from .primitives import (
    DENSE,
    LOG2E,
    bias_code,
    column_cells,
    dropout_keep,
    initial_scores,
    load_tile,
    raw_scores,
    row_bounds,
    row_cells,
    row_pointers,
    visible_pairs,
)

_MOST_PROGRAMS, _FEWEST_PROGRAMS = 1024, 264
"""Bounds of the programs wanted per launch: some waves on the largest GPUs, and two per multiprocessor."""

_STEPS_PER_PROGRAM = 16
"""Matrix tiles that should be summed into a partial tile, if that leaves enough programs."""

_LARGEST_WORKSPACE = 2**27
"""Floats of partial tiles; above it heads take turns."""


@triton.jit
def _bsa_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, partial_ptr, bias_ptr, code_ptr, seed_ptr,
    items_ptr, members_ptr, tiles_ptr, bounds_ptr, bits_ptr, position_ptr,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_gb, stride_gh, stride_gl, stride_gd,
    stride_bh, bias_centre, bias_scale, code_width,
    first_head, launch_heads, batch, splits, heads, group, item_count, length, height, width,
    scale_log2, threshold, keep_scale,
    GEOMETRY: tl.constexpr, MASK: tl.constexpr, HAS_POSITION: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of `dS = P * (dP - delta)` over one item's tiles and one split of the images, one column block.

    Grid: items x heads x splits. A table's partial goes to its own slot; a dense bias is written where it belongs
    (each pair belongs to one item, and there is one split).
    """
    pid = tl.program_id(0)
    item = pid % item_count
    launch_head = pid // item_count % launch_heads
    split = pid // (item_count * launch_heads)
    head = first_head + launch_head
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
            tile, start, position_ptr, bounds_ptr, width, length, GEOMETRY, HAS_POSITION, BLOCK_N
        )
        # Repeated rows would count twice.
        visible = visible_pairs(tile, bounds, row_y, column_y, column_x, bits_ptr, GEOMETRY, MASK)
        visible = visible & is_row[:, None]
        query_code = bias_code(code_ptr, row_y, row_x, query_token, code_width, BIAS)
        key_code = bias_code(code_ptr, column_y, column_x, key_token, code_width, BIAS)
        initial = initial_scores(
            bias_ptr, head, query_code[:, None], key_code[None, :], query_token[:, None], key_token[None, :],
            visible, bias_centre, stride_bh, length, bias_scale, BIAS, 2,
        )  # fmt: skip
        q_rows = row_pointers(q_ptr + wide_head * stride_qh, query_token, stride_ql, stride_qd, offs_d)
        g_rows = row_pointers(dout_ptr + wide_head * stride_gh, query_token, stride_gl, stride_gd, offs_d)
        k_rows = row_pointers(k_ptr + kv_head * stride_kh, key_token, stride_kl, stride_kd, offs_d)
        v_rows = row_pointers(v_ptr + kv_head * stride_vh, key_token, stride_vl, stride_vd, offs_d)
        for image in range(first_image, past_image):
            wide_image = tl.cast(image, tl.int64)
            q = tl.load(q_rows + wide_image * stride_qb, mask=mask_d, other=0.0)
            k = tl.load(k_rows + wide_image * stride_kb, mask=mask_d, other=0.0)
            dout = tl.load(g_rows + wide_image * stride_gb, mask=mask_d, other=0.0)
            v = tl.load(v_rows + wide_image * stride_vb, mask=mask_d, other=0.0)
            row_offset = (wide_image * heads + wide_head) * length + query_token
            lse, delta = tl.load(lse_ptr + row_offset), tl.load(delta_ptr + row_offset)
            scores = raw_scores(q, k, initial, visible, BIAS, 2, PRECISION)
            weights = tl.exp2(scores * scale_log2 - lse[:, None])
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, image * heads + head, query_token[:, None], key_token[None, :], threshold)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            total += weights * (dweights - delta[:, None])
        if BIAS == DENSE:
            offset = wide_head * length * length + query_token.to(tl.int64)[:, None] * length + key_token[None, :]
            tl.store(partial_ptr + offset, total, mask=visible)
    if BIAS != DENSE:
        offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        slot = ((item * splits + split) * launch_heads + launch_head).to(tl.int64)
        tl.store(partial_ptr + slot * (BLOCK_M * BLOCK_N) + offs, total)


@triton.jit
def _bsa_bias_fold_kernel(
    partial_ptr, folded_ptr, first_ptr, splits, launch_heads, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of the partial tiles of one place and head. Grid: places x heads, parts of a tile."""
    place, head = tl.program_id(0) // launch_heads, tl.program_id(0) % launch_heads
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.load(first_ptr + place) * splits, tl.load(first_ptr + place + 1) * splits):
        total += tl.load(partial_ptr + (tl.cast(row, tl.int64) * launch_heads + head) * SLOTS + offs)
    tl.store(folded_ptr + tl.program_id(0).to(tl.int64) * SLOTS + offs, total)


@triton.jit
def _bsa_bias_sum_kernel(
    folded_ptr, slot_ptr, first_ptr, entry_ptr, out_ptr, first_head, launch_heads, stride_entry, stride_head,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one table entry of one head: the sum of its slots; and zeros up to the next entry that occurs.

    Grid: entries that occur x heads.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    first, past = tl.load(first_ptr + row), tl.load(first_ptr + row + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, past, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        slot = tl.load(slot_ptr + offs, mask=offs < past, other=0)
        place = (slot // SLOTS).to(tl.int64)
        pointers = folded_ptr + (place * launch_heads + head) * SLOTS + slot % SLOTS
        total += tl.load(pointers, mask=offs < past, other=0.0)
    gradient = tl.sum(total, 0)
    entry, next_entry = tl.load(entry_ptr + row), tl.load(entry_ptr + row + 1)
    base = out_ptr + (first_head + head) * stride_head
    for start in range(tl.where(row == 0, 0, entry), next_entry, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        values = tl.where(offs == entry, gradient, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(base + offs * stride_entry, values, mask=offs < next_entry)


class BiasGradient(NamedTuple):
    """The gradient of a bias, planned.

    Args:
        launches: in their order; heads may take turns, which follow each other on the stream and share work space.
        fixed: what the kernels walk over, by name.
        workspaces: floats by name.
        is_written: whether the kernels write all of the gradient; it must be zero before otherwise.
    """

    launches: list[Launch]
    fixed: dict[str, Tensor]
    workspaces: dict[str, int]
    is_written: bool


def plan_bias_gradient(of: Signature, arguments: BiasArguments, tables: Tables) -> BiasGradient:
    """See `BiasGradient`."""
    batch, heads, length, _ = of.shape
    facts, tile = of.facts, of.config.bias
    is_dense = facts.bias == DENSE_BIAS
    lists = _lists(tables, facts, arguments, of.entries, length, batch * heads, tile)
    items, places, slots = len(lists.items), max(len(lists.first_item) - 1, 0), tile.rows * tile.columns
    wanted = _programs(lists.steps * batch * heads)
    splits = 1 if is_dense else max(1, min(batch, wanted // max(items * heads, 1)))
    turn = heads if is_dense else max(1, min(heads, _LARGEST_WORKSPACE // max(splits * items * slots, 1)))
    is_folded = not is_dense and items * splits > places
    constants = of.constants(
        tile, arguments, MASK=mask_level(facts.bias_steps, tile.columns), BLOCK_N=tile.columns
    )  # fmt: skip
    stride_entry, stride_head = (heads, 1) if facts.bias == CELL_BIAS else (1, of.entries)
    query, key, value, _, dout = of.head_strides
    partial, folded = "dbias" if is_dense else "partial", "folded" if is_folded else "partial"
    pointers = (
        "query", "key", "value", "dout", "lse", "delta", partial, "bias", "codes", "seed",
        "items", "members", "bias_tiles", "query_bounds", "query_bits", "position",
    )  # fmt: skip
    launches = []
    for first_head in range(0, heads if items else 0, turn):
        launched = min(turn, heads - first_head)
        numbers = (
            *query, *key, *value, *dout, *arguments.numbers, first_head, launched, batch, splits, heads, of.group,
            items, length, facts.height, facts.width, of.scale * LOG2E.value, *dropout_numbers(of.dropout_p),
        )  # fmt: skip
        launches.append(Launch(_bsa_bwd_bias_kernel, (items * launched * splits,), pointers, numbers, constants))
        if is_folded:
            launches.append(Launch(
                _bsa_bias_fold_kernel, (places * launched, slots // 512),
                (partial, folded, "first_item"), (splits, launched),
                {"SLOTS": slots, "BLOCK": 512, "num_warps": 4, "num_stages": 1},
            ))  # fmt: skip
        if not is_dense:
            launches.append(Launch(
                _bsa_bias_sum_kernel, (len(lists.entries) - 1, launched),
                (folded, "slots", "first_slot", "entries", "dbias"),
                (first_head, launched, stride_entry, stride_head),
                {"SLOTS": slots, "BLOCK": 128, "num_warps": 1, "num_stages": 1},
            ))  # fmt: skip
    workspaces = {} if is_dense else {"partial": splits * turn * items * slots}
    if is_folded:
        workspaces["folded"] = places * turn * slots
    fixed = lists._asdict()
    del fixed["steps"]
    return BiasGradient(launches, fixed, workspaces, is_written=len(lists.entries) > 1)


class BiasLists(NamedTuple):
    """Items of the partial sums, and for a table the slots of each entry that occurs.

    A *place* is a class and a column block; its items, which follow each other, share its slots.

    Args:
        members: int32, tiles by class.
        items: int32 `[I, 3]`, a range of members and the first column.
        first_item: int32 `[P + 1]`, where each place's items begin.
        slots: int32, slots `place * M * N + m * N + n` by table entry.
        first_slot: int32 `[E + 1]`, where each entry's slots begin.
        entries: int32 `[E + 1]`, the table entries that occur, ascending, then the table's length.
        steps: matrix tiles per image and head.
    """

    members: Tensor
    items: Tensor
    first_item: Tensor
    slots: Tensor
    first_slot: Tensor
    entries: Tensor
    steps: int


def _programs(steps: int) -> int:
    return max(_FEWEST_PROGRAMS, min(_MOST_PROGRAMS, steps // _STEPS_PER_PROGRAM))


def _lists(
    tables: Tables, facts: Facts, of_bias: BiasArguments, entries: int, length: int, images: int, tile: Tile
) -> BiasLists:
    keyed = [tables.bias_tiles, tables.query_bounds, tables.position]
    if of_bias.codes is not None:
        keyed.append(of_bias.codes)
    numbers = ("lists", *facts, length, images, entries, *tile)
    return cache.get(
        tuple(keyed), numbers, lambda: _build_lists(tables, facts, of_bias, entries, length, images, tile)
    )  # fmt: skip


def _build_lists(
    tables: Tables, facts: Facts, of_bias: BiasArguments, table_length: int, length: int, images: int, tile: Tile
) -> BiasLists:
    """Find the classes, cut the work and list the slots of each table entry. Synchronises; runs once per pattern."""
    device, columns = tables.bias_tiles.device, tile.columns
    row_token, is_row, column_token, is_column = _tokens(tables, facts, length, tile.rows)
    visited = is_column.shape[1] - is_column.flip(1).int().argmax(1)  # one past the last real column
    column_blocks = (torch.where(is_column.any(1), visited, 0) + columns - 1) // columns  # [T]
    steps = int(column_blocks.sum())
    none = torch.empty(0, dtype=torch.int32, device=device)
    if facts.bias == DENSE_BIAS:
        every = torch.arange(len(row_token), device=device)
        owner = torch.repeat_interleave(every, column_blocks)
        block = torch.arange(steps, device=device) - (column_blocks.cumsum(0) - column_blocks)[owner]
        items = torch.stack((owner, owner + 1, block * columns), 1).int()
        return BiasLists(every.int(), items, none, none, none, none, steps)

    row_code, column_code = (_codes(token, facts, of_bias) for token in (row_token, column_token))
    # Codes relative to the tile's first row; padding gets a code no real cell can have.
    origin, padding = row_code[:, :1], 2**40
    signature = torch.cat(
        (torch.where(is_row, row_code - origin, padding), torch.where(is_column, column_code - origin, padding)), 1
    )
    _, tile_class = torch.unique(signature, dim=0, return_inverse=True)
    members = torch.argsort(tile_class, stable=True)
    sizes = torch.bincount(tile_class).tolist()
    blocks = column_blocks[members].tolist()

    chunk = max(steps * images // _programs(steps * images) // max(images, 1), 1)
    items, first_item, leaders, first = [], [0], [], 0
    for size in sizes:
        for block in range(blocks[first]):
            leaders.append((first, block * columns))
            for start in range(first, first + size, chunk):
                items.append((start, min(start + chunk, first + size), block * columns))
            first_item.append(len(items))
        first += size
    if not items:
        return BiasLists(members.int(), none.reshape(0, 3), none, none, none, none, steps)

    leaders = torch.tensor(leaders, device=device)
    leader = members[leaders[:, 0]]
    offs = leaders[:, 1:] + torch.arange(columns, device=device)
    pad = (0, columns)
    is_column = torch.nn.functional.pad(is_column, pad)[leader].gather(1, offs)
    column_code = torch.nn.functional.pad(column_code, pad)[leader].gather(1, offs)
    entry = row_code[leader][:, :, None] - column_code[:, None, :] + facts.centre
    is_slot = is_row[leader][:, :, None] & is_column[:, None, :]
    # Pairs beyond the table's reach are invisible.
    is_slot &= (entry >= 0) & (entry < table_length)
    slots = torch.nonzero(is_slot.flatten())[:, 0]
    entry, by_entry = torch.sort(entry.flatten()[slots], stable=True)
    entries, counts = torch.unique_consecutive(entry, return_counts=True)
    entries = torch.nn.functional.pad(entries, (0, 1), value=table_length)
    first_slot = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    as_table = torch.tensor(items, dtype=torch.int32, device=device)
    first_item = torch.tensor(first_item, dtype=torch.int32, device=device)
    return BiasLists(members.int(), as_table, first_item, slots[by_entry].int(), first_slot.int(), entries.int(), steps)


def _codes(token: Tensor, facts: Facts, of_bias: BiasArguments) -> Tensor:
    """`primitives.bias_code` of tokens, in 64 bits."""
    if facts.bias == DISTANCE_BIAS:
        return -token
    assert of_bias.codes is not None
    return of_bias.codes.long()[token]


def _tokens(tables: Tables, facts: Facts, length: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of every tile's rows `[T, rows]` and columns `[T, C]`, and which of them are real."""
    y0, y1, x0, x1, column_y0, column_y1, column_x0, column_x1, shift = tables.bias_tiles.long().unsqueeze(-1).unbind(1)
    offs = torch.arange(rows, device=y0.device)
    if facts.geometry == BLOCKS_GEOMETRY:
        is_row = offs < x1 - x0
        row_token = torch.minimum(x0 + offs, x1 - 1)
        offs = torch.arange(max(int((column_x1 - column_x0).max()), 1) * BIT_BLOCK, device=y0.device)
        entry = (column_x0 + offs // BIT_BLOCK).clamp(max=len(tables.query_bounds) - 1)
        column_token = tables.query_bounds.long()[entry, 0] * BIT_BLOCK + offs % BIT_BLOCK
        is_column = (offs < (column_x1 - column_x0) * BIT_BLOCK) & (column_token < length)
        return row_token, is_row, column_token.clamp(max=length - 1), is_column

    is_row = offs < (y1 - y0) * (x1 - x0)
    inside = torch.minimum(offs, (y1 - y0) * (x1 - x0) - 1)
    if facts.geometry != IMAGE:
        offs = torch.arange(int((column_x1 - column_x0).max()), device=y0.device)
        return x0 + inside, is_row, torch.minimum(column_x0 + offs, column_x1 - 1), offs < column_x1 - column_x0

    row_cell = (y0 + inside // (x1 - x0)) * facts.width + x0 + inside % (x1 - x0)
    offs = torch.arange(int(((column_y1 - column_y0) << shift).max()), device=y0.device)
    y, x = column_y0 + (offs >> shift), column_x0 + (offs & ((1 << shift) - 1))
    is_column = (y < column_y1) & (x < column_x1)
    column_cell = torch.minimum(y, column_y1 - 1) * facts.width + torch.minimum(x, column_x1 - 1)
    position = tables.position.long()
    if len(position):
        row_cell, column_cell = position[row_cell], position[column_cell]
    return row_cell, is_row, column_cell, is_column
