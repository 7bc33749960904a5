"""Backward kernels. Each recomputes the weights from `lse`; none uses atomics, so reruns agree bitwise.

`_bsa_bwd_dq_kernel` walks over query tiles and also leaves `delta = rowsum(dout * out)` for the others;
`_bsa_bwd_dkv_kernel` walks over key tiles; `_bsa_bwd_closed_kernel` does both at once where each tile sees exactly
itself (windows that fit a tile).
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....kernel_launch import Launch, LaunchSequence, device_of
from ..contracts import Inputs, Tables, read_numbers
from .arguments import (
    BiasArguments,
    Signature,
    bias_arguments,
    bias_pointer,
    coded_tensors,
    dropout_numbers,
    mask_level,
    plans,
    signature,
)
from .bias_gradient import plan_bias_gradient
from .launches import compile_new
from .primitives import (
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
def _bsa_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, bias_ptr, code_ptr, seed_ptr,
    tiles_ptr, bounds_ptr, bits_ptr, position_ptr,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_ob, stride_oh, stride_ol, stride_od,
    stride_gb, stride_gh, stride_gl, stride_gd,
    stride_dqb, stride_dqh, stride_dql, stride_dqd,
    stride_bh, bias_centre, bias_scale, code_width,
    heads, group, tile_count, length, height, width, scale, scale_log2, threshold, keep_scale,
    GEOMETRY: tl.constexpr, MASK: tl.constexpr, HAS_POSITION: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq = scale (P * (dP - delta)) k` with `dP = dout v^T`. Grid: tiles x images x heads."""
    pid = tl.program_id(0)
    tile = load_tile(tiles_ptr, pid % tile_count)
    batch_head = pid // tile_count
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    wide_head, kv_head = head.to(tl.int64), (head // group).to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    row_y, row_x, query_token, is_row = row_cells(tile, position_ptr, width, GEOMETRY, HAS_POSITION, BLOCK_M)
    bounds = row_bounds(bounds_ptr, row_y, row_x, height, GEOMETRY)
    q_base = q_ptr + batch * stride_qb + wide_head * stride_qh
    o_base = out_ptr + batch * stride_ob + wide_head * stride_oh
    g_base = dout_ptr + batch * stride_gb + wide_head * stride_gh
    q = tl.load(row_pointers(q_base, query_token, stride_ql, stride_qd, offs_d), mask=mask_d, other=0.0)
    out = tl.load(row_pointers(o_base, query_token, stride_ol, stride_od, offs_d), mask=mask_d, other=0.0)
    dout = tl.load(row_pointers(g_base, query_token, stride_gl, stride_gd, offs_d), mask=mask_d, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row_offset = batch_head.to(tl.int64) * length + query_token
    tl.store(delta_ptr + row_offset, delta, mask=is_row)
    lse = tl.load(lse_ptr + row_offset)
    query_code = bias_code(code_ptr, row_y, row_x, query_token, code_width, BIAS)

    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, count_columns(tile, GEOMETRY), BLOCK_N):
        column_y, column_x, key_token = column_cells(
            tile, start, position_ptr, bounds_ptr, width, length, GEOMETRY, HAS_POSITION, BLOCK_N
        )
        k = tl.load(row_pointers(k_base, key_token, stride_kl, stride_kd, offs_d), mask=mask_d, other=0.0)
        v = tl.load(row_pointers(v_base, key_token, stride_vl, stride_vd, offs_d), mask=mask_d, other=0.0)
        visible = visible_pairs(tile, bounds, row_y, column_y, column_x, bits_ptr, GEOMETRY, MASK)
        initial = 0.0
        if BIAS > 0:
            key_code = bias_code(code_ptr, column_y, column_x, key_token, code_width, BIAS)
            initial = initial_scores(
                bias_ptr, head, query_code[:, None], key_code[None, :], query_token[:, None], key_token[None, :],
                visible, bias_centre, stride_bh, length, bias_scale, BIAS, MASK,
            )  # fmt: skip
        scores = raw_scores(q, k, initial, visible, BIAS, MASK, PRECISION)
        weights = tl.exp2(scores * scale_log2 - lse[:, None])
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, batch_head, query_token[:, None], key_token[None, :], threshold)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(operand(dscores, k, PRECISION), k, dq, input_precision=PRECISION)

    base = dq_ptr + batch * stride_dqb + wide_head * stride_dqh
    pointers = row_pointers(base, query_token, stride_dql, stride_dqd, offs_d)
    tl.store(pointers, (dq * scale).to(dq_ptr.dtype.element_ty), mask=is_row[:, None] & mask_d)


@triton.jit
def _bsa_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, code_ptr, seed_ptr,
    tiles_ptr, bounds_ptr, bits_ptr, position_ptr,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_gb, stride_gh, stride_gl, stride_gd,
    stride_dkb, stride_dkh, stride_dkl, stride_dkd,
    stride_dvb, stride_dvh, stride_dvl, stride_dvd,
    stride_bh, bias_centre, bias_scale, code_width,
    heads, tile_count, length, height, width, scale, scale_log2, threshold, keep_scale,
    GEOMETRY: tl.constexpr, MASK: tl.constexpr, HAS_POSITION: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`dv = P^T dout`, `dk = scale dS^T q`. Grid: key tiles x images x key heads; sums over a head's group."""
    pid = tl.program_id(0)
    tile = load_tile(tiles_ptr, pid % tile_count)
    kv_heads = heads // GROUP
    batch_kv = pid // tile_count
    batch, kv_head = (batch_kv // kv_heads).to(tl.int64), (batch_kv % kv_heads).to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    row_y, row_x, key_token, is_row = row_cells(tile, position_ptr, width, GEOMETRY, HAS_POSITION, BLOCK_M)
    bounds = row_bounds(bounds_ptr, row_y, row_x, height, GEOMETRY)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    k = tl.load(row_pointers(k_base, key_token, stride_kl, stride_kd, offs_d), mask=mask_d, other=0.0)
    v = tl.load(row_pointers(v_base, key_token, stride_vl, stride_vd, offs_d), mask=mask_d, other=0.0)
    key_code = bias_code(code_ptr, row_y, row_x, key_token, code_width, BIAS)

    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for member in range(GROUP):
        wide_head = kv_head * GROUP + member
        head = wide_head.to(tl.int32)
        q_base = q_ptr + batch * stride_qb + wide_head * stride_qh
        g_base = dout_ptr + batch * stride_gb + wide_head * stride_gh
        batch_head = (batch * heads + wide_head).to(tl.int32)
        row_base = (batch * heads + wide_head) * length
        for start in range(0, count_columns(tile, GEOMETRY), BLOCK_N):
            column_y, column_x, query_token = column_cells(
                tile, start, position_ptr, bounds_ptr, width, length, GEOMETRY, HAS_POSITION, BLOCK_N
            )
            q = tl.load(row_pointers(q_base, query_token, stride_ql, stride_qd, offs_d), mask=mask_d, other=0.0)
            dout = tl.load(row_pointers(g_base, query_token, stride_gl, stride_gd, offs_d), mask=mask_d, other=0.0)
            lse = tl.load(lse_ptr + row_base + query_token)
            delta = tl.load(delta_ptr + row_base + query_token)
            visible = visible_pairs(tile, bounds, row_y, column_y, column_x, bits_ptr, GEOMETRY, MASK)
            initial = 0.0
            if BIAS > 0:
                query_code = bias_code(code_ptr, column_y, column_x, query_token, code_width, BIAS)
                initial = initial_scores(
                    bias_ptr, head, query_code[None, :], key_code[:, None], query_token[None, :],
                    key_token[:, None], visible, bias_centre, stride_bh, length, bias_scale, BIAS, MASK,
                )  # fmt: skip
            scores = raw_scores(k, q, initial, visible, BIAS, MASK, PRECISION)  # [keys, queries]
            weights = tl.exp2(scores * scale_log2 - lse[None, :])
            dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept = weights
            if DROPOUT:
                keep = dropout_keep(seed_ptr, batch_head, query_token[None, :], key_token[:, None], threshold)
                kept = tl.where(keep, weights * keep_scale, 0.0)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            dv = tl.dot(operand(kept, dout, PRECISION), dout, dv, input_precision=PRECISION)
            dscores = weights * (dweights - delta[None, :])
            dk = tl.dot(operand(dscores, q, PRECISION), q, dk, input_precision=PRECISION)

    mask = is_row[:, None] & mask_d
    base = dk_ptr + batch * stride_dkb + kv_head * stride_dkh
    pointers = row_pointers(base, key_token, stride_dkl, stride_dkd, offs_d)
    tl.store(pointers, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    base = dv_ptr + batch * stride_dvb + kv_head * stride_dvh
    pointers = row_pointers(base, key_token, stride_dvl, stride_dvd, offs_d)
    tl.store(pointers, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bsa_bwd_closed_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, code_ptr,
    seed_ptr, tiles_ptr, bounds_ptr, position_ptr,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_gb, stride_gh, stride_gl, stride_gd,
    stride_dqb, stride_dqh, stride_dql, stride_dqd,
    stride_dkb, stride_dkh, stride_dkl, stride_dkd,
    stride_dvb, stride_dvh, stride_dvl, stride_dvd,
    stride_bh, bias_centre, bias_scale, code_width,
    heads, tile_count, length, height, width, scale, scale_log2, threshold, keep_scale,
    GEOMETRY: tl.constexpr, MASK: tl.constexpr, HAS_POSITION: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All of dq, dk, dv of a tile that sees exactly itself. Grid: tiles x images x heads (no groups)."""
    pid = tl.program_id(0)
    tile = load_tile(tiles_ptr, pid % tile_count)
    batch_head = pid // tile_count
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    wide_head = head.to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    row_y, row_x, token, is_row = row_cells(tile, position_ptr, width, GEOMETRY, HAS_POSITION, BLOCK_M)
    bounds = row_bounds(bounds_ptr, row_y, row_x, height, GEOMETRY)
    # The columns are the rows again; those of padding lie where no bounds reach.
    column_x = tl.where(is_row, row_x, tile[7])
    q_base = q_ptr + batch * stride_qb + wide_head * stride_qh
    k_base = k_ptr + batch * stride_kb + wide_head * stride_kh
    v_base = v_ptr + batch * stride_vb + wide_head * stride_vh
    g_base = dout_ptr + batch * stride_gb + wide_head * stride_gh
    mask = is_row[:, None] & mask_d
    # Padding rows are zero here, not repeated: as queries they must add nothing to dk and dv.
    q = tl.load(row_pointers(q_base, token, stride_ql, stride_qd, offs_d), mask=mask, other=0.0)
    k = tl.load(row_pointers(k_base, token, stride_kl, stride_kd, offs_d), mask=mask, other=0.0)
    v = tl.load(row_pointers(v_base, token, stride_vl, stride_vd, offs_d), mask=mask, other=0.0)
    dout = tl.load(row_pointers(g_base, token, stride_gl, stride_gd, offs_d), mask=mask, other=0.0)
    row_offset = batch_head.to(tl.int64) * length + token
    lse = tl.load(lse_ptr + row_offset)

    visible = visible_pairs(tile, bounds, row_y, row_y, column_x, bounds_ptr, GEOMETRY, MASK)
    initial = 0.0
    if BIAS > 0:
        code = bias_code(code_ptr, row_y, row_x, token, code_width, BIAS)
        initial = initial_scores(
            bias_ptr, head, code[:, None], code[None, :], token[:, None], token[None, :], visible, bias_centre,
            stride_bh, length, bias_scale, BIAS, MASK,
        )  # fmt: skip
    scores = raw_scores(q, k, initial, visible, BIAS, MASK, PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    kept = weights
    if DROPOUT:
        keep = dropout_keep(seed_ptr, batch_head, token[:, None], token[None, :], threshold)
        kept = tl.where(keep, weights * keep_scale, 0.0)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    dv = tl.dot(tl.trans(operand(kept, dout, PRECISION)), dout, input_precision=PRECISION)
    base = dv_ptr + batch * stride_dvb + wide_head * stride_dvh
    tl.store(row_pointers(base, token, stride_dvl, stride_dvd, offs_d), dv.to(dv_ptr.dtype.element_ty), mask=mask)
    # rowsum(P * dP) = rowsum(dout * out), without the rounding of `out` and without reading it.
    delta = tl.sum(weights * dweights, 1)
    tl.store(delta_ptr + row_offset, delta, mask=is_row)
    dscores = operand(weights * (dweights - delta[:, None]), k, PRECISION)
    dq = tl.dot(dscores, k, input_precision=PRECISION) * scale
    base = dq_ptr + batch * stride_dqb + wide_head * stride_dqh
    tl.store(row_pointers(base, token, stride_dql, stride_dqd, offs_d), dq.to(dq_ptr.dtype.element_ty), mask=mask)
    dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * scale
    base = dk_ptr + batch * stride_dkb + wide_head * stride_dkh
    tl.store(row_pointers(base, token, stride_dkl, stride_dkd, offs_d), dk.to(dk_ptr.dtype.element_ty), mask=mask)


_BUFFERS = (
    "query", "key", "value", "out", "dout", "lse", "work", "dq", "dk", "dv", "bias", "seed", "dbias", *Tables._fields,
)  # fmt: skip
"""What the kernels are given at each call; in the work space lies what only they read."""

_ALIGNED = 64
"""Floats: parts of the work space begin at multiples of it."""


class _Plan(NamedTuple):
    """A backward pass.

    Args:
        launches: of all its kernels, those of the bias gradient last.
        work_size: floats of the work space.
        is_zeroed: whether the gradient of the bias must be zero before.
    """

    launches: LaunchSequence
    work_size: int
    is_zeroed: bool


def _plan(of: Signature, gradients: Inputs, cells: Tensor | None, tables: Tables) -> _Plan:
    batch, heads, length, _ = of.shape
    arguments = bias_arguments(of, cells, tables)
    launches = (_closed if of.config.closed.rows else _by_sides)(of, gradients, arguments)
    fixed, workspaces, is_zeroed = {"codes": arguments.codes}, {"delta": batch * heads * length}, False
    if of.needs_bias:
        of_bias = plan_bias_gradient(of, arguments, tables)
        launches += of_bias.launches
        fixed |= of_bias.fixed
        workspaces |= of_bias.workspaces
        is_zeroed = not of_bias.is_written
    starts = of.starts(("query", "key", "value"), of.strides[0])
    starts |= of.starts(("dq", "dk", "dv"), gradients.query.stride())
    places = {name: (index, starts.get(name, 0)) for index, name in enumerate(_BUFFERS)}
    work_size = 0
    for name, size in workspaces.items():
        places[name] = _BUFFERS.index("work"), work_size
        work_size += -(-size // _ALIGNED) * _ALIGNED
    return _Plan(LaunchSequence(launches, places, fixed, compile_new), work_size, is_zeroed)


def _closed(of: Signature, gradients: Inputs, arguments: BiasArguments) -> list[Launch]:
    """One kernel for the gradients of query, key and value."""
    batch, heads, *_ = of.shape
    query, key, value, _, dout = of.head_strides
    own = [of.as_heads(gradient.stride()) for gradient in gradients[:3]]
    tile, (tiles,) = of.config.closed, of.tiles
    numbers = (*query, *key, *value, *dout, *chain(*own), *arguments.numbers, heads, tiles, *_last_numbers(of))
    pointers = (
        "query", "key", "value", "dout", "lse", "delta", "dq", "dk", "dv", "bias", "codes", "seed",
        "closed_tiles", "query_bounds", "position",
    )  # fmt: skip
    constants = of.constants(tile, arguments, MASK=mask_level(of.facts.closed_steps, tile.columns))
    return [Launch(_bsa_bwd_closed_kernel, (tiles * batch * heads,), pointers, numbers, constants)]


def _by_sides(of: Signature, gradients: Inputs, arguments: BiasArguments) -> list[Launch]:
    """A kernel that walks over queries and one that walks over keys."""
    batch, heads, *_ = of.shape
    query, key, value, out, dout = of.head_strides
    dq, dk, dv = (of.as_heads(gradient.stride()) for gradient in gradients[:3])
    by_query, by_key, (tiles, key_tiles) = of.config.dq, of.config.dkv, of.tiles
    mask, key_mask = mask_level(of.facts.dq_steps, by_query.columns), mask_level(of.facts.dkv_steps, by_key.columns)
    last = _last_numbers(of)
    return [Launch(
        _bsa_bwd_dq_kernel, (tiles * batch * heads,),
        (
            "query", "key", "value", "out", "dout", "lse", "delta", "dq", "bias", "codes", "seed",
            "dq_tiles", "query_bounds", "query_bits", "position",
        ),
        (*query, *key, *value, *out, *dout, *dq, *arguments.numbers, heads, of.group, tiles, *last),
        of.constants(by_query, arguments, MASK=mask, BLOCK_N=by_query.columns),
    ), Launch(
        _bsa_bwd_dkv_kernel, (key_tiles * batch * of.kv_heads,),
        (
            "query", "key", "value", "dout", "lse", "delta", "dk", "dv", "bias", "codes", "seed",
            "dkv_tiles", "key_bounds", "key_bits", "position",
        ),
        (*query, *key, *value, *dout, *dk, *dv, *arguments.numbers, heads, key_tiles, *last),
        of.constants(by_key, arguments, MASK=key_mask, BLOCK_N=by_key.columns, GROUP=of.group),
    )]  # fmt: skip


def _last_numbers(of: Signature) -> tuple[float, ...]:
    facts = of.facts
    return (
        of.shape[2], facts.height, facts.width, of.scale, of.scale * LOG2E.value, *dropout_numbers(of.dropout_p)
    )  # fmt: skip


def launch_backward(
    dout: Tensor, inputs: Inputs, gradients: Inputs, out: Tensor, lse: Tensor, table: Tensor, bias: Tensor | None,
    cells: Tensor | None, seed: Tensor | None, tables: Sequence[Tensor], walk: str, bias_numbers: Sequence[int],
    scale: float, dropout_p: float, needs_bias: bool,
) -> Tensor:  # fmt: skip
    """Fill `gradients`; that of the bias is returned, see `contracts.block_sparse_attention_backward`."""
    query, key, value, _ = inputs
    tables, bias_numbers = Tables(*tables), tuple(bias_numbers)
    kind = bias_numbers[0]
    if not query.numel():
        return torch.zeros_like(bias) if needs_bias else query.new_empty(0)
    _, config = read_numbers(walk, bias_numbers)
    tiles = (tables.closed_tiles,) if config.closed.rows else (tables.dq_tiles, tables.dkv_tiles)
    of = signature(
        inputs, (out, dout), bias, seed, tiles, tables, walk, bias_numbers, scale, dropout_p, needs_bias
    )  # fmt: skip
    keyed = coded_tensors(cells, tables, kind)
    if needs_bias:
        keyed += (tables.bias_tiles, tables.query_bounds, tables.position)
    plan = plans.get(keyed, of, lambda: _plan(of, gradients, cells, tables))

    work = torch.empty(plan.work_size, dtype=torch.float32, device=query.device)
    if needs_bias:
        new = torch.zeros_like if plan.is_zeroed else torch.empty_like
        dbias = new(bias, memory_format=torch.contiguous_format)
    else:
        dbias = torch.empty(0, dtype=query.dtype, device=query.device)
    buffers = (
        query, key, value, out, dout, lse, work, *gradients[:3], bias_pointer(bias, table, kind), seed, dbias, *tables
    )  # fmt: skip
    with device_of(query):
        plan.launches.run(buffers)
    return dbias
