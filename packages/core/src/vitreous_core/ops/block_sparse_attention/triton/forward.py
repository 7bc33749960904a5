"""Forward kernel: online softmax over the columns that each tile of queries visits."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....kernel_launch import Launch, LaunchSequence, device_of
from ..contracts import Inputs, Tables
from .arguments import (
    Signature,
    bias_arguments,
    bias_pointer,
    coded_tensors,
    dropout_numbers,
    mask_level,
    plans,
    scaled_table,
    signature,
)
from .primitives import (
    HIDDEN,
    LOG2E,
    bias_code,
    column_cells,
    count_columns,
    dropout_keep,
    initial_scores,
    load_tile,
    operand,
    raw_scores,
    row_bounds,
    row_cells,
    row_pointers,
    visible_pairs,
)


@triton.jit
def _bsa_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, code_ptr, seed_ptr,
    tiles_ptr, bounds_ptr, bits_ptr, position_ptr,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_ob, stride_oh, stride_ol, stride_od,
    stride_bh, bias_centre, bias_scale, code_width,
    heads, group, tile_count, length, height, width, scale, threshold, keep_scale,
    GEOMETRY: tl.constexpr, MASK: tl.constexpr, HAS_POSITION: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`out = softmax(scale q k^T + bias) v` and `lse = log2 sum exp2(scale raw)`, +inf for a row that sees nothing.

    `raw = q k^T + bias / scale`, and `scale`, positive, carries log2(e).
    Grid: tiles x images x heads; a program owns the queries of one tile of one head.
    """
    pid = tl.program_id(0)
    tile = load_tile(tiles_ptr, pid % tile_count)
    batch_head = pid // tile_count
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    kv_head = (head // group).to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    row_y, row_x, query_token, is_row = row_cells(tile, position_ptr, width, GEOMETRY, HAS_POSITION, BLOCK_M)
    bounds = row_bounds(bounds_ptr, row_y, row_x, height, GEOMETRY)
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(row_pointers(q_base, query_token, stride_ql, stride_qd, offs_d), mask=mask_d, other=0.0)
    query_code = bias_code(code_ptr, row_y, row_x, query_token, code_width, BIAS)

    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], HIDDEN, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    shift = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, count_columns(tile, GEOMETRY), BLOCK_N):
        column_y, column_x, key_token = column_cells(
            tile, start, position_ptr, bounds_ptr, width, length, GEOMETRY, HAS_POSITION, BLOCK_N
        )
        visible = visible_pairs(tile, bounds, row_y, column_y, column_x, bits_ptr, GEOMETRY, MASK)
        initial = 0.0
        if BIAS > 0:
            key_code = bias_code(code_ptr, column_y, column_x, key_token, code_width, BIAS)
            initial = initial_scores(
                bias_ptr, head, query_code[:, None], key_code[None, :], query_token[:, None], key_token[None, :],
                visible, bias_centre, stride_bh, length, bias_scale, BIAS, MASK,
            )  # fmt: skip
        k = tl.load(row_pointers(k_base, key_token, stride_kl, stride_kd, offs_d), mask=mask_d, other=0.0)
        scores = raw_scores(q, k, initial, visible, BIAS, MASK, PRECISION)  # [BLOCK_M, BLOCK_N]

        seen_before, old_shift = row_max > 0.5 * HIDDEN, shift
        row_max = tl.maximum(row_max, tl.max(scores, 1))
        # Zero for a row that has seen nothing: then its weights are exp2(HIDDEN * scale) = 0. Everything refers to
        # this one rounded number; a fused multiply-add of the maximum would differ from it in the last digit.
        shift = tl.where(row_max > 0.5 * HIDDEN, row_max * scale, 0.0)
        decay = tl.where(seen_before, tl.exp2(old_shift - shift), 0.0)
        weights = tl.exp2(scores * scale - shift[:, None])
        row_sum = row_sum * decay + tl.sum(weights, 1)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, batch_head, query_token[:, None], key_token[None, :], threshold)
            weights = tl.where(keep, weights * keep_scale, 0.0)
        v = tl.load(row_pointers(v_base, key_token, stride_vl, stride_vd, offs_d), mask=mask_d, other=0.0)
        acc = tl.dot(operand(weights, v, PRECISION), v, acc * decay[:, None], input_precision=PRECISION)

    sees = row_max > 0.5 * HIDDEN
    row_sum = tl.where(sees, row_sum, 1.0)
    lse = tl.where(sees, shift + tl.log2(row_sum), float("inf"))
    o_base = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    pointers = row_pointers(o_base, query_token, stride_ol, stride_od, offs_d)
    out = acc / row_sum[:, None]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & mask_d)
    tl.store(lse_ptr + batch_head.to(tl.int64) * length + query_token, lse, mask=is_row)


_BUFFERS = ("query", "key", "value", "out", "lse", "bias", "seed", "tiles", "bounds", "bits", "position")
"""What the kernel is given at each call."""


def _plan(of: Signature, out: Tensor, cells: Tensor | None, tables: Tables) -> LaunchSequence:
    batch, heads, length, _ = of.shape
    facts, bias, tile, (tiles,) = of.facts, bias_arguments(of, cells, tables), of.config.forward, of.tiles
    numbers = (
        *chain(*of.head_strides, of.as_heads(out.stride())), *bias.numbers, heads, of.group, tiles, length,
        facts.height, facts.width, of.scale * LOG2E.value, *dropout_numbers(of.dropout_p),
    )  # fmt: skip
    mask = mask_level(facts.forward_steps, tile.columns)
    constants = of.constants(tile, bias, MASK=mask, BLOCK_N=tile.columns)
    pointers = (
        "query", "key", "value", "out", "lse", "bias", "codes", "seed", "tiles", "bounds", "bits", "position",
    )  # fmt: skip
    launch = Launch(_bsa_fwd_kernel, (tiles * batch * heads,), pointers, numbers, constants)
    starts = of.starts(("query", "key", "value"), of.strides[0])
    places = {name: (index, starts.get(name, 0)) for index, name in enumerate(_BUFFERS)}
    return LaunchSequence([launch], places, {"codes": bias.codes})


def launch_forward(
    inputs: Inputs, bias: Tensor | None, cells: Tensor | None, seed: Tensor | None, tables: Sequence[Tensor], walk: str,
    bias_numbers: Sequence[int], scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate and launch; see `contracts.block_sparse_attention_forward`."""
    query, key, value, packed_heads = inputs
    tables, kind, device = Tables(*tables), bias_numbers[0], query.device
    if packed_heads:
        batch, length, channels = query.shape
        out = torch.empty(batch, length, channels // 3, dtype=query.dtype, device=device)
        lse = torch.empty(batch, packed_heads, length, dtype=torch.float32, device=device)
    else:
        out = torch.empty_like(query)
        lse = torch.empty(*query.shape[:3], dtype=torch.float32, device=device)
    table = scaled_table(bias, kind, scale, query)
    if not query.numel():
        return out, lse, table
    of = signature(
        inputs, (), bias, seed, (tables.forward_tiles,), tables, walk, tuple(bias_numbers), scale, dropout_p
    )  # fmt: skip
    launches = plans.get(coded_tensors(cells, tables, kind), of, lambda: _plan(of, out, cells, tables))
    with device_of(query):
        launches.run((
            query, key, value, out, lse, bias_pointer(bias, table, kind), seed, tables.forward_tiles,
            tables.query_bounds, tables.query_bits, tables.position,
        ))  # fmt: skip
    return out, lse, table
