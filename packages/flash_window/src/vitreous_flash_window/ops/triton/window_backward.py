"""Backward kernels of short windows. Weights are recomputed; no atomics, so reruns agree bitwise.

`_window_bwd_rows_kernel` walks like the forward kernel and keeps, beside the bias of its strip of queries, the bias
gradient on chip: one partial sum per program leaves it at the end. Where one tile holds all scores of a window, it
computes every gradient from query, key, value and dout alone. Else it computes those of queries and bias, and
`_window_bwd_keys_kernel` those of keys and values, strip of keys by strip of keys.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton's language cannot unpack one tuple into another

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import (
    addend_kind,
    addend_pointer,
    device_of,
    dot_precision,
    dropout_numbers,
    outer_strides,
    padded_head_dim,
    split_statistics,
    stride_alignment,
)
from .bias_gradient import fold_rows
from .configs import choose_keys, choose_rows, count_parts
from .tile_math import (
    FLOOR,
    LOG2E,
    add_mask_tiles,
    addend_tiles,
    channel_product,
    dropout_keep,
    full_stride,
    load_chunk,
    load_rows,
    mask_groups,
    operand,
    row_offsets,
    store_rows,
    walk,
)


@triton.jit(
    do_not_specialize=[
        "stride_qw", "stride_qh", "stride_qn", "stride_kw", "stride_kh", "stride_kn",
        "stride_vw", "stride_vh", "stride_vn", "stride_gw", "stride_gh", "stride_gn",
        "stride_ow", "stride_oh", "stride_on",
        "stride_dqw", "stride_dqh", "stride_dqn", "stride_dkw", "stride_dkh", "stride_dkn",
        "stride_dvw", "stride_dvh", "stride_dvn",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts",
    ]
)  # fmt: skip
def _window_bwd_rows_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, lse_ptr, inverse_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr, seed_ptr,
    partials_ptr, delta_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_gw, stride_gh, stride_gn, stride_gd,
    stride_ow, stride_oh, stride_on, stride_od,
    stride_dqw, stride_dqh, stride_dqn, stride_dqd,
    stride_dkw, stride_dkh, stride_dkn, stride_dkd,
    stride_dvw, stride_dvh, stride_dvn, stride_dvd,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, scale, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, NEEDS_BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`dS = P (dP - delta)`, `dq = scale dS k`, partial sums of dS; of one tile also dk and dv, else also delta.

    `delta = rowsum(P dP)`, or from the output, `rowsum(dout out)`. Grid: parts x heads x strips of queries, the last
    fastest.
    """
    stride_qn = full_stride(stride_qn, ALIGN)
    stride_gn = full_stride(stride_gn, ALIGN)
    stride_dqn = full_stride(stride_dqn, ALIGN)
    stride_dkn = full_stride(stride_dkn, ALIGN)
    stride_dvn = full_stride(stride_dvn, ALIGN)
    stride_on = full_stride(stride_on, ALIGN)
    stride_kn = full_stride(stride_kn, ALIGN)
    stride_vn = full_stride(stride_vn, ALIGN)
    FULL: tl.constexpr = FIRST + STRIPS * ROWS <= TOKENS
    WHOLE: tl.constexpr = TOKENS // COLUMNS if TAIL > 0 else (TOKENS + COLUMNS - 1) // COLUMNS
    CHUNKS: tl.constexpr = WHOLE + (TAIL > 0)
    pid = tl.program_id(0)
    strip, head = pid % STRIPS, (pid // STRIPS % heads).to(tl.int64)
    part = pid // STRIPS // heads

    offs_d = tl.arange(0, BLOCK_D)
    rows = FIRST + strip * ROWS + tl.arange(0, ROWS)
    is_row = rows < TOKENS
    q_offsets = row_offsets(rows, offs_d, stride_qn, stride_qd)
    g_offsets = row_offsets(rows, offs_d, stride_gn, stride_gd)
    dq_offsets = row_offsets(rows, offs_d, stride_dqn, stride_dqd)
    if ROWS >= TOKENS:
        dk_offsets = row_offsets(rows, offs_d, stride_dkn, stride_dkd)
        dv_offsets = row_offsets(rows, offs_d, stride_dvn, stride_dvd)
    else:
        o_offsets = row_offsets(rows, offs_d, stride_on, stride_od)
    sums = ()
    if NEEDS_BIAS:
        for c in tl.static_range(CHUNKS):
            sums = sums + (tl.zeros([ROWS, COLUMNS if c < WHOLE else TAIL], tl.float32),)
    first_group, last_group = mask_groups(part, parts, windows, mask_windows, MASK)
    for group in range(first_group, last_group):
        # Under a mask made anew for each of its windows, rather than kept beside the sum with the mask.
        bias = addend_tiles(
            bias_ptr, head * stride_bh, rows, stride_bq, stride_bk, TOKENS, COLUMNS, TAIL, WHOLE, CHUNKS, BIAS
        )
        addends = add_mask_tiles(
            bias, mask_ptr, group, rows, stride_mw, stride_mq, stride_mk, TOKENS, COLUMNS, TAIL, WHOLE, CHUNKS, MASK
        )
        begin, end, step = walk(group, part, parts, windows, mask_windows, MASK)
        for item in range(begin, end, step):
            window = tl.cast(item, tl.int64)
            window_head = window * heads + head
            q_base = q_ptr + (window * stride_qw + head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + head * stride_kh) * ALIGN
            v_base = v_ptr + (window * stride_vw + head * stride_vh) * ALIGN
            g_base = dout_ptr + (window * stride_gw + head * stride_gh) * ALIGN
            q = load_rows(q_base, q_offsets, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            dout = load_rows(g_base, g_offsets, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            if ROWS < TOKENS:
                o_base = out_ptr + (window * stride_ow + head * stride_oh) * ALIGN
                out = load_rows(o_base, o_offsets, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
                delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
                tl.store(delta_ptr + window_head * TOKENS + rows, delta, mask=is_row)
                # Rows past the end weigh nothing.
                lse = tl.load(lse_ptr + window_head * TOKENS + rows, mask=is_row, other=float("inf"))
                if inverse_ptr is not None:
                    inverse = tl.load(inverse_ptr + window_head * TOKENS + rows, mask=is_row, other=0.0)
            new_sums = ()
            for c in tl.static_range(CHUNKS):
                k = load_chunk(
                    k_base, c, offs_d, stride_kn, stride_kd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D
                )
                v = load_chunk(
                    v_base, c, offs_d, stride_vn, stride_vd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D
                )
                scores = channel_product(q, k, PRECISION) * scale_log2 + addends[c]
                dweights = channel_product(dout, v, PRECISION)
                if ROWS < TOKENS:
                    weights = tl.exp2(scores - lse[:, None])
                    if inverse_ptr is not None:
                        weights *= inverse[:, None]
                else:
                    largest = tl.maximum(tl.max(scores, 1), FLOOR)
                    weights = tl.exp2(scores - largest[:, None])
                    total = tl.sum(weights, 1)
                    weights *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
                kept = weights
                if DROPOUT:
                    key = c * COLUMNS + tl.arange(0, COLUMNS if c < WHOLE else TAIL)
                    keep = dropout_keep(seed_ptr, window_head, rows[:, None], key[None, :], threshold)
                    dweights = tl.where(keep, dweights * keep_scale, 0.0)
                    kept = tl.where(keep, weights * keep_scale, 0.0)
                if ROWS >= TOKENS:
                    delta = tl.sum(weights * dweights, 1)
                dscores = weights * (dweights - delta[:, None])
                if NEEDS_BIAS:
                    new_sums = new_sums + (sums[c] + dscores,)
                dscores = operand(dscores, k, PRECISION)
                if c == 0:
                    dq = tl.dot(dscores, k, input_precision=PRECISION)
                else:
                    dq = tl.dot(dscores, k, dq, input_precision=PRECISION)
            sums = new_sums
            dq_base = dq_ptr + (window * stride_dqw + head * stride_dqh) * ALIGN
            store_rows(dq_base, dq_offsets, dq * scale, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            if ROWS >= TOKENS:
                dv = tl.dot(tl.trans(operand(kept, dout, PRECISION)), dout, input_precision=PRECISION)
                dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
                dk_base = dk_ptr + (window * stride_dkw + head * stride_dkh) * ALIGN
                dv_base = dv_ptr + (window * stride_dvw + head * stride_dvh) * ALIGN
                store_rows(dv_base, dv_offsets, dv, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
                store_rows(dk_base, dk_offsets, dk * scale, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)

    if NEEDS_BIAS:
        OWNED: tl.constexpr = min(STRIPS * ROWS, TOKENS - FIRST)
        tile = partials_ptr + (part.to(tl.int64) * heads + head) * (OWNED * TOKENS)
        for c in tl.static_range(CHUNKS):
            column = c * COLUMNS + tl.arange(0, COLUMNS if c < WHOLE else TAIL)
            is_pair = is_row[:, None] & (column < TOKENS)[None, :]
            tl.store(tile + (rows - FIRST)[:, None] * TOKENS + column[None, :], sums[c], mask=is_pair)


@triton.jit(
    do_not_specialize=[
        "stride_qw", "stride_qh", "stride_qn", "stride_kw", "stride_kh", "stride_kn",
        "stride_vw", "stride_vh", "stride_vn", "stride_gw", "stride_gh", "stride_gn",
        "stride_dkw", "stride_dkh", "stride_dkn", "stride_dvw", "stride_dvh", "stride_dvn",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts",
    ]
)  # fmt: skip
def _window_bwd_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, inverse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr, seed_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_gw, stride_gh, stride_gn, stride_gd,
    stride_dkw, stride_dkh, stride_dkn, stride_dkd,
    stride_dvw, stride_dvh, stride_dvn, stride_dvd,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, scale, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`dv = P^T dout`, `dk = scale dS^T q` of strips of keys; columns are queries.

    Grid: parts x heads x strips of keys, the last fastest.
    """
    stride_kn = full_stride(stride_kn, ALIGN)
    stride_vn = full_stride(stride_vn, ALIGN)
    stride_dkn = full_stride(stride_dkn, ALIGN)
    stride_dvn = full_stride(stride_dvn, ALIGN)
    stride_qn = full_stride(stride_qn, ALIGN)
    stride_gn = full_stride(stride_gn, ALIGN)
    FULL: tl.constexpr = FIRST + STRIPS * ROWS <= TOKENS
    WHOLE: tl.constexpr = TOKENS // COLUMNS if TAIL > 0 else (TOKENS + COLUMNS - 1) // COLUMNS
    CHUNKS: tl.constexpr = WHOLE + (TAIL > 0)
    pid = tl.program_id(0)
    strip, head = pid % STRIPS, (pid // STRIPS % heads).to(tl.int64)
    part = pid // STRIPS // heads

    offs_d = tl.arange(0, BLOCK_D)
    rows = FIRST + strip * ROWS + tl.arange(0, ROWS)
    is_row = rows < TOKENS
    k_offsets = row_offsets(rows, offs_d, stride_kn, stride_kd)
    v_offsets = row_offsets(rows, offs_d, stride_vn, stride_vd)
    dk_offsets = row_offsets(rows, offs_d, stride_dkn, stride_dkd)
    dv_offsets = row_offsets(rows, offs_d, stride_dvn, stride_dvd)
    first_group, last_group = mask_groups(part, parts, windows, mask_windows, MASK)
    for group in range(first_group, last_group):
        # Under a mask made anew for each of its windows, rather than kept beside the sum with the mask.
        bias = addend_tiles(
            bias_ptr, head * stride_bh, rows, stride_bk, stride_bq, TOKENS, COLUMNS, TAIL, WHOLE, CHUNKS, BIAS
        )
        addends = add_mask_tiles(
            bias, mask_ptr, group, rows, stride_mw, stride_mk, stride_mq, TOKENS, COLUMNS, TAIL, WHOLE, CHUNKS, MASK
        )
        begin, end, step = walk(group, part, parts, windows, mask_windows, MASK)
        for item in range(begin, end, step):
            window = tl.cast(item, tl.int64)
            window_head = window * heads + head
            q_base = q_ptr + (window * stride_qw + head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + head * stride_kh) * ALIGN
            v_base = v_ptr + (window * stride_vw + head * stride_vh) * ALIGN
            g_base = dout_ptr + (window * stride_gw + head * stride_gh) * ALIGN
            k = load_rows(k_base, k_offsets, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            v = load_rows(v_base, v_offsets, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            for c in tl.static_range(CHUNKS):
                q = load_chunk(
                    q_base, c, offs_d, stride_qn, stride_qd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D
                )
                dout = load_chunk(
                    g_base, c, offs_d, stride_gn, stride_gd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D
                )
                # Queries past the end weigh nothing.
                query = c * COLUMNS + tl.arange(0, COLUMNS if c < WHOLE else TAIL)
                lse = tl.load(lse_ptr + window_head * TOKENS + query, mask=query < TOKENS, other=float("inf"))
                delta = tl.load(delta_ptr + window_head * TOKENS + query, mask=query < TOKENS, other=0.0)
                if inverse_ptr is not None:
                    inverse = tl.load(inverse_ptr + window_head * TOKENS + query, mask=query < TOKENS, other=0.0)
                scores = channel_product(k, q, PRECISION) * scale_log2 + addends[c]
                weights = tl.exp2(scores - lse[None, :])
                if inverse_ptr is not None:
                    weights *= inverse[None, :]
                dweights = channel_product(v, dout, PRECISION)
                kept = weights
                if DROPOUT:
                    keep = dropout_keep(seed_ptr, window_head, query[None, :], rows[:, None], threshold)
                    dweights = tl.where(keep, dweights * keep_scale, 0.0)
                    kept = tl.where(keep, weights * keep_scale, 0.0)
                dscores = operand(weights * (dweights - delta[None, :]), q, PRECISION)
                kept = operand(kept, dout, PRECISION)
                if c == 0:
                    dv = tl.dot(kept, dout, input_precision=PRECISION)
                    dk = tl.dot(dscores, q, input_precision=PRECISION)
                else:
                    dv = tl.dot(kept, dout, dv, input_precision=PRECISION)
                    dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
            dk_base = dk_ptr + (window * stride_dkw + head * stride_dkh) * ALIGN
            dv_base = dv_ptr + (window * stride_dvw + head * stride_dvh) * ALIGN
            store_rows(dk_base, dk_offsets, dk * scale, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            store_rows(dv_base, dv_offsets, dv, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)


def launch_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor | None, statistics: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias (empty unless `needs_bias`); arguments as the operator's."""
    windows, heads, tokens, head_dim = query.shape
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
    dbias = query.new_empty((heads, tokens, tokens), dtype=bias.dtype) if needs_bias else query.new_empty(0)
    if query.numel() == 0:
        return dq, dk, dv, dbias.zero_()
    tensors = (query, key, value, dout, query if out is None else out, dq, dk, dv)
    outer = [outer_strides(tensor) for tensor in tensors]
    align = stride_alignment(*(stride for strides in outer for stride in strides))
    strides = [
        [*(s // align for s in of_tensor), tensor.stride(3)] for of_tensor, tensor in zip(outer, tensors, strict=True)
    ]
    addend_strides = [
        *((0, 0, 0) if bias is None else bias.stride()), *((0, 0, 0) if mask is None else mask.stride())
    ]  # fmt: skip
    threshold, keep_scale = dropout_numbers(dropout_p)
    numbers = [heads, windows, 1 if mask is None else mask.shape[0]]
    factors = [scale, scale * LOG2E.value, threshold, keep_scale]
    constants = {
        "BIAS": addend_kind(bias), "MASK": addend_kind(mask), "DROPOUT": seed is not None, "ALIGN": align,
        "TOKENS": tokens, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": dot_precision(query.dtype),
    }  # fmt: skip
    lse, inverse = (None, None) if statistics is None else split_statistics(statistics)
    delta = None if lse is None else torch.empty_like(lse)
    with device_of(query):
        for tile in choose_rows(query.dtype, tokens, head_dim):
            parts = count_parts(query.device, tile, windows, heads)
            rows = min(tile.strips * tile.rows, tokens - tile.first)
            partials = query.new_empty((parts, heads, rows, tokens), dtype=torch.float32) if needs_bias else None
            _window_bwd_rows_kernel[(parts * heads * tile.strips,)](
                query, key, value, dout, out, lse, inverse, dq, dk, dv, bias, addend_pointer(mask), seed, partials,
                delta,
                *(stride for of_tensor in strides for stride in of_tensor), *addend_strides, *numbers, parts, *factors,
                NEEDS_BIAS=needs_bias, FIRST=tile.first, STRIPS=tile.strips, ROWS=tile.rows, COLUMNS=tile.columns,
                TAIL=tile.tail, num_warps=tile.warps, num_stages=tile.stages, **constants,
            )  # fmt: skip
            if partials is not None:
                fold_rows(partials, dbias, tile.first)
        if lse is not None:
            for tile in choose_keys(query.dtype, tokens, head_dim):
                parts = count_parts(query.device, tile, windows, heads)
                _window_bwd_keys_kernel[(parts * heads * tile.strips,)](
                    query, key, value, dout, lse, inverse, delta, dk, dv, bias, addend_pointer(mask), seed,
                    *(stride for of_tensor in (*strides[:4], *strides[6:]) for stride in of_tensor), *addend_strides,
                    *numbers, parts, *factors, FIRST=tile.first, STRIPS=tile.strips, ROWS=tile.rows,
                    COLUMNS=tile.columns, TAIL=tile.tail, num_warps=tile.warps, num_stages=tile.stages, **constants,
                )  # fmt: skip
    return dq, dk, dv, dbias
