"""Backward kernels of short windows. Weights are recomputed; no atomics, so reruns agree bitwise.

`_window_bwd_rows_kernel` walks like the forward kernel and keeps, beside the bias of its strip of queries, the bias
gradient on chip: one partial tile per program leaves it at the end. Where the strip is the whole window, it computes
every gradient. Otherwise it computes those of queries and bias and leaves two numbers per row, from which
`_window_bwd_keys_kernel` computes the gradients of keys and values, strip of keys by strip of keys.
"""

# mypy: ignore-errors

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
    stride_alignment,
)
from .bias_gradient import fold_partials
from .configs import choose_keys, choose_rows, count_parts
from .tile_math import (
    LOG2E,
    addend_tile,
    dropout_keep,
    load_rows,
    operand,
    part_range,
    row_offsets,
    store_rows,
)


@triton.jit(
    do_not_specialize=[
        "stride_qw", "stride_qh", "stride_qn", "stride_kw", "stride_kh", "stride_kn",
        "stride_vw", "stride_vh", "stride_vn", "stride_gw", "stride_gh", "stride_gn",
        "stride_dqw", "stride_dqh", "stride_dqn", "stride_dkw", "stride_dkh", "stride_dkn",
        "stride_dvw", "stride_dvh", "stride_dvn",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts",
    ]
)  # fmt: skip
def _window_bwd_rows_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr, seed_ptr,
    partials_ptr, lse_ptr, delta_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_gw, stride_gh, stride_gn, stride_gd,
    stride_dqw, stride_dqh, stride_dqn, stride_dqd,
    stride_dkw, stride_dkh, stride_dkn, stride_dkd,
    stride_dvw, stride_dvh, stride_dvn, stride_dvd,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, scale, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, NEEDS_BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dS = P (dP - rowsum(P dP))`, `dq = scale dS k`, partial sums of dS; of one strip also dk and dv.

    Grid: parts x heads x strips of queries, the last fastest.
    """
    STRIPS: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    strip, head = pid % STRIPS, pid // STRIPS % heads
    part = pid // STRIPS // heads
    first, last = part_range(part, parts, windows)
    wide_head = head.to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    rows = strip * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, MAIN)
    q_offsets = row_offsets(rows, offs_d, stride_qn * ALIGN, stride_qd)
    g_offsets = row_offsets(rows, offs_d, stride_gn * ALIGN, stride_gd)
    dq_offsets = row_offsets(rows, offs_d, stride_dqn * ALIGN, stride_dqd)
    k_offsets = row_offsets(columns, offs_d, stride_kn * ALIGN, stride_kd)
    v_offsets = row_offsets(columns, offs_d, stride_vn * ALIGN, stride_vd)
    if BIAS > 0:
        bias_ptr += wide_head * stride_bh
    bias = addend_tile(bias_ptr, rows[:, None], columns[None, :], stride_bq, stride_bk, TOKENS, BIAS)
    if NEEDS_BIAS:
        dbias = tl.zeros([ROWS, MAIN], tl.float32)
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        tail_k_offsets = row_offsets(tail_columns, offs_d, stride_kn * ALIGN, stride_kd)
        tail_v_offsets = row_offsets(tail_columns, offs_d, stride_vn * ALIGN, stride_vd)
        tail_bias = addend_tile(bias_ptr, rows[:, None], tail_columns[None, :], stride_bq, stride_bk, TOKENS, BIAS)
        if NEEDS_BIAS:
            tail_dbias = tl.zeros([ROWS, TAIL], tl.float32)
    if STRIPS == 1:
        dk_offsets = row_offsets(columns, offs_d, stride_dkn * ALIGN, stride_dkd)
        dv_offsets = row_offsets(columns, offs_d, stride_dvn * ALIGN, stride_dvd)

    images = windows // mask_windows
    for mask_window in range(first // images, (last - 1) // images + 1):
        addend = bias
        if TAIL > 0:
            tail_addend = tail_bias
        if MASK > 0:
            tile_ptr = mask_ptr + tl.cast(mask_window, tl.int64) * stride_mw
            addend += addend_tile(tile_ptr, rows[:, None], columns[None, :], stride_mq, stride_mk, TOKENS, MASK)
            if TAIL > 0:
                tail_addend += addend_tile(
                    tile_ptr, rows[:, None], tail_columns[None, :], stride_mq, stride_mk, TOKENS, MASK
                )
        start = mask_window * images
        for item in range(tl.maximum(first, start), tl.minimum(last, start + images)):
            window = tl.cast((item - start) * mask_windows + mask_window, tl.int64)
            q_base = q_ptr + (window * stride_qw + wide_head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + wide_head * stride_kh) * ALIGN
            v_base = v_ptr + (window * stride_vw + wide_head * stride_vh) * ALIGN
            g_base = dout_ptr + (window * stride_gw + wide_head * stride_gh) * ALIGN
            q = load_rows(q_base, q_offsets, rows < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)
            k = load_rows(k_base, k_offsets, columns < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
            dout = load_rows(g_base, g_offsets, rows < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)
            v = load_rows(v_base, v_offsets, columns < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + addend
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            largest = tl.max(scores, 1)
            if TAIL > 0:
                is_tail = tail_columns < TOKENS
                tail_k = load_rows(k_base, tail_k_offsets, is_tail, offs_d, HEAD_DIM, BLOCK_D, TOKENS == MAIN + TAIL)
                tail_v = load_rows(v_base, tail_v_offsets, is_tail, offs_d, HEAD_DIM, BLOCK_D, TOKENS == MAIN + TAIL)
                tail_scores = tl.dot(q, tl.trans(tail_k), input_precision=PRECISION) * scale_log2 + tail_addend
                tail_dweights = tl.dot(dout, tl.trans(tail_v), input_precision=PRECISION)
                largest = tl.maximum(largest, tl.max(tail_scores, 1))
            largest = tl.where(largest == -float("inf"), 0.0, largest)
            weights = tl.exp2(scores - largest[:, None])
            total = tl.sum(weights, 1)
            if TAIL > 0:
                tail_weights = tl.exp2(tail_scores - largest[:, None])
                total += tl.sum(tail_weights, 1)
            is_blank = total == 0.0
            total = tl.where(is_blank, 1.0, total)
            weights *= (1.0 / total)[:, None]
            kept = weights
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window * heads + head, rows[:, None], columns[None, :], threshold)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
                kept = tl.where(keep, weights * keep_scale, 0.0)
            delta = tl.sum(weights * dweights, 1)
            if TAIL > 0:
                tail_weights *= (1.0 / total)[:, None]
                if DROPOUT:
                    keep = dropout_keep(
                        seed_ptr, window * heads + head, rows[:, None], tail_columns[None, :], threshold
                    )
                    tail_dweights = tl.where(keep, tail_dweights * keep_scale, 0.0)
                delta += tl.sum(tail_weights * tail_dweights, 1)
            dscores = weights * (dweights - delta[:, None])
            if NEEDS_BIAS:
                dbias += dscores
            dscores = operand(dscores, k, PRECISION)
            dq = tl.dot(dscores, k, input_precision=PRECISION)
            if TAIL > 0:
                tail_dscores = tail_weights * (tail_dweights - delta[:, None])
                if NEEDS_BIAS:
                    tail_dbias += tail_dscores
                dq = tl.dot(operand(tail_dscores, tail_k, PRECISION), tail_k, dq, input_precision=PRECISION)
            dq_base = dq_ptr + (window * stride_dqw + wide_head * stride_dqh) * ALIGN
            store_rows(dq_base, dq_offsets, dq * scale, rows < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)
            if STRIPS == 1:
                dv = tl.dot(tl.trans(operand(kept, dout, PRECISION)), dout, input_precision=PRECISION)
                dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
                dk_base = dk_ptr + (window * stride_dkw + wide_head * stride_dkh) * ALIGN
                dv_base = dv_ptr + (window * stride_dvw + wide_head * stride_dvh) * ALIGN
                is_key = columns < TOKENS
                store_rows(dv_base, dv_offsets, dv, is_key, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
                store_rows(dk_base, dk_offsets, dk * scale, is_key, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
            else:
                row_offset = (window * heads + head) * TOKENS + rows
                lse = tl.where(is_blank, float("inf"), largest + tl.log2(total))
                tl.store(lse_ptr + row_offset, lse, mask=rows < TOKENS)
                tl.store(delta_ptr + row_offset, delta, mask=rows < TOKENS)

    if NEEDS_BIAS:
        tile = partials_ptr + (part.to(tl.int64) * heads + head) * (TOKENS * TOKENS)
        is_row = (rows < TOKENS)[:, None]
        tl.store(tile + rows[:, None] * TOKENS + columns[None, :], dbias, mask=is_row & (columns < TOKENS)[None, :])
        if TAIL > 0:
            is_pair = is_row & (tail_columns < TOKENS)[None, :]
            tl.store(tile + rows[:, None] * TOKENS + tail_columns[None, :], tail_dbias, mask=is_pair)


@triton.jit
def _key_gradients(
    k, v, q, dout, addend, lse, delta, keep, keep_scale, dk, dv, scale_log2,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries, the columns, sends to a strip of keys, the rows."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 + addend
    weights = tl.exp2(scores - lse[None, :])
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    kept = weights
    if DROPOUT:
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
        kept = tl.where(keep, weights * keep_scale, 0.0)
    dv = tl.dot(operand(kept, dout, PRECISION), dout, dv, input_precision=PRECISION)
    dscores = weights * (dweights - delta[None, :])
    dk = tl.dot(operand(dscores, q, PRECISION), q, dk, input_precision=PRECISION)
    return dk, dv


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
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr, seed_ptr, lse_ptr, delta_ptr,
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
    ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dv = P^T dout`, `dk = scale dS^T q` of strips of keys; the columns are queries.

    Grid: parts x heads x strips of keys, the last fastest.
    """
    STRIPS: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    strip, head = pid % STRIPS, pid // STRIPS % heads
    first, last = part_range(pid // STRIPS // heads, parts, windows)
    wide_head = head.to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    rows = strip * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, MAIN)
    q_offsets = row_offsets(columns, offs_d, stride_qn * ALIGN, stride_qd)
    g_offsets = row_offsets(columns, offs_d, stride_gn * ALIGN, stride_gd)
    k_offsets = row_offsets(rows, offs_d, stride_kn * ALIGN, stride_kd)
    v_offsets = row_offsets(rows, offs_d, stride_vn * ALIGN, stride_vd)
    dk_offsets = row_offsets(rows, offs_d, stride_dkn * ALIGN, stride_dkd)
    dv_offsets = row_offsets(rows, offs_d, stride_dvn * ALIGN, stride_dvd)
    if BIAS > 0:
        bias_ptr += wide_head * stride_bh
    bias = addend_tile(bias_ptr, rows[:, None], columns[None, :], stride_bk, stride_bq, TOKENS, BIAS)
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        tail_q_offsets = row_offsets(tail_columns, offs_d, stride_qn * ALIGN, stride_qd)
        tail_g_offsets = row_offsets(tail_columns, offs_d, stride_gn * ALIGN, stride_gd)
        tail_bias = addend_tile(bias_ptr, rows[:, None], tail_columns[None, :], stride_bk, stride_bq, TOKENS, BIAS)

    images = windows // mask_windows
    for mask_window in range(first // images, (last - 1) // images + 1):
        addend = bias
        if TAIL > 0:
            tail_addend = tail_bias
        if MASK > 0:
            tile_ptr = mask_ptr + tl.cast(mask_window, tl.int64) * stride_mw
            addend += addend_tile(tile_ptr, rows[:, None], columns[None, :], stride_mk, stride_mq, TOKENS, MASK)
            if TAIL > 0:
                tail_addend += addend_tile(
                    tile_ptr, rows[:, None], tail_columns[None, :], stride_mk, stride_mq, TOKENS, MASK
                )
        start = mask_window * images
        for item in range(tl.maximum(first, start), tl.minimum(last, start + images)):
            window = tl.cast((item - start) * mask_windows + mask_window, tl.int64)
            window_head = window * heads + head
            q_base = q_ptr + (window * stride_qw + wide_head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + wide_head * stride_kh) * ALIGN
            v_base = v_ptr + (window * stride_vw + wide_head * stride_vh) * ALIGN
            g_base = dout_ptr + (window * stride_gw + wide_head * stride_gh) * ALIGN
            k = load_rows(k_base, k_offsets, rows < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)
            v = load_rows(v_base, v_offsets, rows < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)
            q = load_rows(q_base, q_offsets, columns < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
            dout = load_rows(g_base, g_offsets, columns < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
            # Queries past the end weigh nothing.
            row_offset = window_head * TOKENS + columns
            lse = tl.load(lse_ptr + row_offset, mask=columns < TOKENS, other=float("inf"))
            delta = tl.load(delta_ptr + row_offset, mask=columns < TOKENS, other=0.0)
            keep = True
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window_head, columns[None, :], rows[:, None], threshold)
            dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
            dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
            dk, dv = _key_gradients(
                k, v, q, dout, addend, lse, delta, keep, keep_scale, dk, dv, scale_log2, DROPOUT, PRECISION
            )
            if TAIL > 0:
                is_tail = tail_columns < TOKENS
                q = load_rows(q_base, tail_q_offsets, is_tail, offs_d, HEAD_DIM, BLOCK_D, TOKENS == MAIN + TAIL)
                dout = load_rows(g_base, tail_g_offsets, is_tail, offs_d, HEAD_DIM, BLOCK_D, TOKENS == MAIN + TAIL)
                row_offset = window_head * TOKENS + tail_columns
                lse = tl.load(lse_ptr + row_offset, mask=is_tail, other=float("inf"))
                delta = tl.load(delta_ptr + row_offset, mask=is_tail, other=0.0)
                if DROPOUT:
                    keep = dropout_keep(seed_ptr, window_head, tail_columns[None, :], rows[:, None], threshold)
                dk, dv = _key_gradients(
                    k, v, q, dout, tail_addend, lse, delta, keep, keep_scale, dk, dv, scale_log2, DROPOUT, PRECISION
                )
            dk_base = dk_ptr + (window * stride_dkw + wide_head * stride_dkh) * ALIGN
            dv_base = dv_ptr + (window * stride_dvw + wide_head * stride_dvh) * ALIGN
            is_row = rows < TOKENS
            store_rows(dk_base, dk_offsets, dk * scale, is_row, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)
            store_rows(dv_base, dv_offsets, dv, is_row, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)


def launch_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias (empty unless `needs_bias`); arguments as the operator's."""
    windows, heads, tokens, head_dim = query.shape
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
    if query.numel() == 0:
        return dq, dk, dv, query.new_zeros((heads, tokens, tokens) if needs_bias else 0, dtype=bias.dtype)
    tile = choose_rows(query.dtype, tokens, head_dim)
    strips = -(-tokens // tile.rows)
    parts = count_parts(query.device, tile, windows, heads * strips)
    tensors = (query, key, value, dout, dq, dk, dv)
    outer = [outer_strides(tensor) for tensor in tensors]
    align = stride_alignment(*(stride for strides in outer for stride in strides))
    q, k, v, g, *outs = (
        [*(s // align for s in strides), tensor.stride(3)] for strides, tensor in zip(outer, tensors, strict=True)
    )
    addend_strides = [
        *((0, 0, 0) if bias is None else bias.stride()), *((0, 0, 0) if mask is None else mask.stride())
    ]  # fmt: skip
    threshold, keep_scale = dropout_numbers(dropout_p)
    numbers = [scale, scale * LOG2E.value, threshold, keep_scale]
    mask_windows = 1 if mask is None else mask.shape[0]
    constants = {
        "BIAS": addend_kind(bias), "MASK": addend_kind(mask), "DROPOUT": seed is not None, "ALIGN": align,
        "TOKENS": tokens, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": dot_precision(query.dtype),
    }  # fmt: skip
    partials = query.new_empty((parts, heads, tokens, tokens), dtype=torch.float32) if needs_bias else None
    lse, delta = query.new_empty((2, windows, heads, tokens), dtype=torch.float32) if strips > 1 else (None, None)
    with device_of(query):
        _window_bwd_rows_kernel[(parts * heads * strips,)](
            query, key, value, dout, dq, dk, dv, bias, addend_pointer(mask), seed, partials, lse, delta,
            *q, *k, *v, *g, *outs[0], *outs[1], *outs[2], *addend_strides, heads, windows, mask_windows, parts,
            *numbers, NEEDS_BIAS=needs_bias, ROWS=tile.rows, MAIN=tile.main, TAIL=tile.tail,
            num_warps=tile.warps, num_stages=tile.stages, **constants,
        )  # fmt: skip
        if strips > 1:
            tile = choose_keys(query.dtype, tokens, head_dim)
            strips = -(-tokens // tile.rows)
            parts = count_parts(query.device, tile, windows, heads * strips)
            _window_bwd_keys_kernel[(parts * heads * strips,)](
                query, key, value, dout, dk, dv, bias, addend_pointer(mask), seed, lse, delta,
                *q, *k, *v, *g, *outs[1], *outs[2], *addend_strides, heads, windows, mask_windows, parts,
                *numbers, ROWS=tile.rows, MAIN=tile.main, TAIL=tile.tail,
                num_warps=tile.warps, num_stages=tile.stages, **constants,
            )  # fmt: skip
    return dq, dk, dv, query.new_empty(0) if partials is None else fold_partials(partials, bias.dtype)
