"""Backward kernel of short windows, by queries: their gradient, and where registers allow it, that of the bias.

It walks like the forward kernel and keeps, beside the bias of its strip of queries, the bias gradient on chip: one
partial sum per program leaves it at the end. Where one tile holds all scores of a window, it computes every gradient
from query, key, value and dout alone.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton's language cannot unpack one tuple into another

from __future__ import annotations

import triton
import triton.language as tl

from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep

from .tile_math import (
    FLOOR,
    add_mask_tiles,
    addend_tiles,
    channel_product,
    full_stride,
    halves,
    load_chunk,
    load_rows,
    mask_groups,
    row_offsets,
    score_factor,
    store_rows,
    token_product,
    transposed,
    walk,
)


@triton.jit
def _store_turned_product(
    left, right, factor, base, offsets, is_row, offs_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """Write `factor left^T right` of a `score_factor` and rows of the queries' side: a gradient of keys or values."""
    product = tl.zeros([left[0].shape[1], BLOCK_D], tl.float32)
    product = token_product(transposed(left), halves(right, HALVED), product, PRECISION)
    store_rows(base, offsets, product * factor, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)


@triton.jit
def _walk_rows(
    q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, lse_ptr, inverse_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr, seed_ptr,
    delta_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_gw, stride_gh, stride_gn, stride_gd,
    stride_ow, stride_oh, stride_on, stride_od,
    stride_dqw, stride_dqh, stride_dqn, stride_dqd,
    stride_dkw, stride_dkh, stride_dkn, stride_dkd,
    stride_dvw, stride_dvh, stride_dvn, stride_dvd,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, scale, scale_log2, threshold, keep_scale,
    strip, head, part, parts, partials_ptr,
    BIAS: tl.constexpr, NEEDS_BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr, HALVED: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """`dS = P (dP - delta)`, `dq = scale dS k`, partial sums of dS; of one tile also dk and dv, else also delta.

    Of a strip of queries and a part of the windows. `delta = rowsum(P dP)`, or from the output, `rowsum(dout out)`.
    """
    if SAME_STRIDES:  # places within tensors are then computed once, in fewer registers
        stride_kn, stride_vn, stride_gn, stride_on = stride_qn, stride_qn, stride_qn, stride_qn
        stride_dqn, stride_dkn, stride_dvn = stride_qn, stride_qn, stride_qn
        if not HALVED:  # with halves, sharing these too took longer: docs/results/profiles/windows-tf32.txt
            stride_kw, stride_vw, stride_gw, stride_ow = stride_qw, stride_qw, stride_qw, stride_qw
            stride_kh, stride_vh, stride_gh, stride_oh = stride_qh, stride_qh, stride_qh, stride_qh
            stride_dqw, stride_dkw, stride_dvw = stride_qw, stride_qw, stride_qw
            stride_dqh, stride_dkh, stride_dvh = stride_qh, stride_qh, stride_qh
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
            dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for c in tl.static_range(CHUNKS):
                k = load_chunk(k_base, c, offs_d, stride_kn, stride_kd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D)
                v = load_chunk(v_base, c, offs_d, stride_vn, stride_vd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D)
                scores = channel_product(q, k, PRECISION) * scale_log2 + addends[c]
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
                    kept = tl.where(keep, weights * keep_scale, 0.0)
                if ROWS >= TOKENS and HALVED:
                    # Ahead of dP, which is one more tile in the registers; other kinds of products spill more this way.
                    dv_base = dv_ptr + (window * stride_dvw + head * stride_dvh) * ALIGN
                    _store_turned_product(
                        score_factor(kept, dout, PRECISION, HALVED), dout, 1.0, dv_base, dv_offsets, is_row, offs_d,
                        HEAD_DIM, BLOCK_D, FULL, PRECISION, HALVED,
                    )  # fmt: skip
                dweights = channel_product(dout, v, PRECISION)
                if DROPOUT:
                    dweights = tl.where(keep, dweights * keep_scale, 0.0)
                if ROWS >= TOKENS:
                    delta = tl.sum(weights * dweights, 1)
                dscores = weights * (dweights - delta[:, None])
                if NEEDS_BIAS:
                    new_sums = new_sums + (sums[c] + dscores,)
                dscores = score_factor(dscores, k, PRECISION, HALVED)
                dq = token_product(dscores, halves(k, HALVED), dq, PRECISION)
            sums = new_sums
            dq_base = dq_ptr + (window * stride_dqw + head * stride_dqh) * ALIGN
            store_rows(dq_base, dq_offsets, dq * scale, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            if ROWS >= TOKENS:
                if not HALVED:
                    dv_base = dv_ptr + (window * stride_dvw + head * stride_dvh) * ALIGN
                    _store_turned_product(
                        score_factor(kept, dout, PRECISION, HALVED), dout, 1.0, dv_base, dv_offsets, is_row, offs_d,
                        HEAD_DIM, BLOCK_D, FULL, PRECISION, HALVED,
                    )  # fmt: skip
                dk_base = dk_ptr + (window * stride_dkw + head * stride_dkh) * ALIGN
                _store_turned_product(
                    dscores, q, scale, dk_base, dk_offsets, is_row, offs_d,
                    HEAD_DIM, BLOCK_D, FULL, PRECISION, HALVED,
                )  # fmt: skip

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
        "stride_ow", "stride_oh", "stride_on",
        "stride_dqw", "stride_dqh", "stride_dqn", "stride_dkw", "stride_dkh", "stride_dkn",
        "stride_dvw", "stride_dvh", "stride_dvn",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts", "rest_parts",
    ]
)  # fmt: skip
def _window_bwd_rows_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, lse_ptr, inverse_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr, seed_ptr,
    partials_ptr, rest_partials_ptr, delta_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_gw, stride_gh, stride_gn, stride_gd,
    stride_ow, stride_oh, stride_on, stride_od,
    stride_dqw, stride_dqh, stride_dqn, stride_dqd,
    stride_dkw, stride_dkh, stride_dkn, stride_dkd,
    stride_dvw, stride_dvh, stride_dvn, stride_dvd,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, rest_parts, scale, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, NEEDS_BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, REST: tl.constexpr, COLUMNS: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, HALVED: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """A walk each: of the strips of queries, and of the `REST` rows that they leave, if there are any.

    Grid: parts x heads x strips, the last fastest; then rest_parts x heads.
    """
    shared = (
        q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, lse_ptr, inverse_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr,
        seed_ptr, delta_ptr,
        stride_qw, stride_qh, stride_qn, stride_qd,
        stride_kw, stride_kh, stride_kn, stride_kd,
        stride_vw, stride_vh, stride_vn, stride_vd,
        stride_gw, stride_gh, stride_gn, stride_gd,
        stride_ow, stride_oh, stride_on, stride_od,
        stride_dqw, stride_dqh, stride_dqn, stride_dqd,
        stride_dkw, stride_dkh, stride_dkn, stride_dkd,
        stride_dvw, stride_dvh, stride_dvn, stride_dvd,
        stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
        heads, windows, mask_windows, scale, scale_log2, threshold, keep_scale,
    )  # fmt: skip
    pid = tl.program_id(0)
    of_rest = pid - parts * heads * STRIPS
    if True if REST == 0 else of_rest < 0:  # without a rest no branch at all, which would cost registers
        strip, head, part = pid % STRIPS, (pid // STRIPS % heads).to(tl.int64), pid // STRIPS // heads
        _walk_rows(
            *shared, strip, head, part, parts, partials_ptr,
            BIAS, NEEDS_BIAS, MASK, DROPOUT, ALIGN, TOKENS, HEAD_DIM, BLOCK_D,
            FIRST, STRIPS, ROWS, COLUMNS, TAIL, PRECISION, HALVED, SAME_STRIDES,
        )  # fmt: skip
    else:
        head, part = (of_rest % heads).to(tl.int64), of_rest // heads
        _walk_rows(
            *shared, 0, head, part, rest_parts, rest_partials_ptr,
            BIAS, NEEDS_BIAS, MASK, DROPOUT, ALIGN, TOKENS, HEAD_DIM, BLOCK_D,
            STRIPS * ROWS, 1, REST, COLUMNS, TAIL, PRECISION, HALVED, SAME_STRIDES,
        )  # fmt: skip
