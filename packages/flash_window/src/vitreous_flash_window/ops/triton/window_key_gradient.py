"""Backward kernel of windows of more than one tile, by keys: their gradient and that of the values."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep

from .tile_math import (
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
    walk,
)


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
    PRECISION: tl.constexpr, HALVED: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """`dv = P^T dout`, `dk = scale dS^T q`; columns are queries.

    Grid: parts x heads x strips of keys, the last fastest.
    """
    pid = tl.program_id(0)
    strip, head, part = pid % STRIPS, (pid // STRIPS % heads).to(tl.int64), pid // STRIPS // heads
    if SAME_STRIDES:  # places within tensors are then computed once, in fewer registers
        stride_kw, stride_vw, stride_gw, stride_dkw, stride_dvw = stride_qw, stride_qw, stride_qw, stride_qw, stride_qw
        stride_kh, stride_vh, stride_gh, stride_dkh, stride_dvh = stride_qh, stride_qh, stride_qh, stride_qh, stride_qh
        stride_kn, stride_vn, stride_gn, stride_dkn, stride_dvn = stride_qn, stride_qn, stride_qn, stride_qn, stride_qn
    stride_kn = full_stride(stride_kn, ALIGN)
    stride_vn = full_stride(stride_vn, ALIGN)
    stride_dkn = full_stride(stride_dkn, ALIGN)
    stride_dvn = full_stride(stride_dvn, ALIGN)
    stride_qn = full_stride(stride_qn, ALIGN)
    stride_gn = full_stride(stride_gn, ALIGN)
    FULL: tl.constexpr = FIRST + STRIPS * ROWS <= TOKENS
    WHOLE: tl.constexpr = TOKENS // COLUMNS if TAIL > 0 else (TOKENS + COLUMNS - 1) // COLUMNS
    CHUNKS: tl.constexpr = WHOLE + (TAIL > 0)

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
            dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
            dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for c in tl.static_range(CHUNKS):
                q = load_chunk(q_base, c, offs_d, stride_qn, stride_qd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D)
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
                dscores = score_factor(weights * (dweights - delta[None, :]), q, PRECISION, HALVED)
                kept = score_factor(kept, dout, PRECISION, HALVED)
                dv = token_product(kept, halves(dout, HALVED), dv, PRECISION)
                dk = token_product(dscores, halves(q, HALVED), dk, PRECISION)
            dk_base = dk_ptr + (window * stride_dkw + head * stride_dkh) * ALIGN
            dv_base = dv_ptr + (window * stride_dvw + head * stride_dvh) * ALIGN
            store_rows(dk_base, dk_offsets, dk * scale, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            store_rows(dv_base, dv_offsets, dv, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
