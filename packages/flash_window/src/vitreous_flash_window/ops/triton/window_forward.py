"""Forward kernel of short windows: few programs, each walking over many windows of one head.

A program owns a strip of queries: all, or 64. What depends on the head alone, the bias, stays in its registers, while
queries, keys and values of the next windows are on their way. Keys come in chunks: 144 = 64 + 64 + 16.
"""

# mypy: ignore-errors

from __future__ import annotations

from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep, operand

from .arguments import (
    addend_kind,
    addend_pointer,
    addend_strides,
    aligned_strides,
    dot_precision,
    dropout_numbers,
    new_statistics,
    padded_head_dim,
    split_statistics,
)
from .configs import choose_forward, count_parts, keeps_statistics, tile_constants
from .tile_math import (
    FLOOR,
    LOG2E,
    add_mask_tiles,
    addend_tiles,
    channel_product,
    full_stride,
    load_chunk,
    load_rows,
    mask_groups,
    row_offsets,
    store_rows,
    walk,
)


@triton.jit(
    do_not_specialize=[
        "stride_qw", "stride_qh", "stride_qn", "stride_kw", "stride_kh", "stride_kn",
        "stride_vw", "stride_vh", "stride_vn", "stride_ow", "stride_oh", "stride_on",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts",
    ]
)  # fmt: skip
def _window_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, inverse_ptr, bias_ptr, mask_ptr, seed_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_ow, stride_oh, stride_on, stride_od,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    STRIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`o = softmax(scale q k^T + bias + mask) v`, and the statistics of the rows where a program holds not all columns.

    Grid: parts x heads x strips of queries, the last fastest.
    """
    pid = tl.program_id(0)
    strip, head, part = pid % STRIPS, (pid // STRIPS % heads).to(tl.int64), pid // STRIPS // heads
    stride_qn = full_stride(stride_qn, ALIGN)
    stride_on = full_stride(stride_on, ALIGN)
    stride_kn = full_stride(stride_kn, ALIGN)
    stride_vn = full_stride(stride_vn, ALIGN)
    FULL: tl.constexpr = STRIPS * ROWS <= TOKENS
    WHOLE: tl.constexpr = TOKENS // COLUMNS if TAIL > 0 else (TOKENS + COLUMNS - 1) // COLUMNS
    CHUNKS: tl.constexpr = WHOLE + (TAIL > 0)

    offs_d = tl.arange(0, BLOCK_D)
    rows = strip * ROWS + tl.arange(0, ROWS)
    is_row = rows < TOKENS
    q_offsets = row_offsets(rows, offs_d, stride_qn, stride_qd)
    o_offsets = row_offsets(rows, offs_d, stride_on, stride_od)
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
            q_base = q_ptr + (window * stride_qw + head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + head * stride_kh) * ALIGN
            v_base = v_ptr + (window * stride_vw + head * stride_vh) * ALIGN
            q = load_rows(q_base, q_offsets, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            for c in tl.static_range(CHUNKS):
                k = load_chunk(k_base, c, offs_d, stride_kn, stride_kd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D)
                v = load_chunk(v_base, c, offs_d, stride_vn, stride_vd, TOKENS, COLUMNS, TAIL, WHOLE, HEAD_DIM, BLOCK_D)
                scores = channel_product(q, k, PRECISION) * scale_log2 + addends[c]
                if c == 0:
                    largest = tl.maximum(tl.max(scores, 1), FLOOR)
                    weights = tl.exp2(scores - largest[:, None])
                    total = tl.sum(weights, 1)
                else:
                    grown = tl.maximum(tl.max(scores, 1), largest)
                    shrink = tl.exp2(largest - grown)
                    largest = grown
                    weights = tl.exp2(scores - largest[:, None])
                    total = total * shrink + tl.sum(weights, 1)
                if DROPOUT:
                    key = c * COLUMNS + tl.arange(0, COLUMNS if c < WHOLE else TAIL)
                    keep = dropout_keep(seed_ptr, window * heads + head, rows[:, None], key[None, :], threshold)
                    weights = tl.where(keep, weights, 0.0)
                if c == 0:
                    out = tl.dot(operand(weights, v, PRECISION), v, input_precision=PRECISION)
                else:
                    out = tl.dot(operand(weights, v, PRECISION), v, out * shrink[:, None], input_precision=PRECISION)
            is_blank = total == 0.0
            total = tl.where(is_blank, 1.0, total)
            o_base = out_ptr + (window * stride_ow + head * stride_oh) * ALIGN
            out *= (keep_scale / total)[:, None]
            store_rows(o_base, o_offsets, out, is_row, offs_d, HEAD_DIM, BLOCK_D, FULL)
            if ROWS < TOKENS:
                lse = largest
                of_rows = (window * heads + head) * TOKENS + rows
                if inverse_ptr is None:
                    lse += tl.log2(total)
                else:
                    tl.store(inverse_ptr + of_rows, 1.0 / total, mask=is_row)
                tl.store(lse_ptr + of_rows, tl.where(is_blank, float("inf"), lse), mask=is_row)


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and statistics (`[0]` where a tile holds the window); arguments as the registered operator's."""
    windows, heads, tokens, head_dim = query.shape
    out = torch.empty_like(query)
    kept = keeps_statistics(tokens)
    statistics = new_statistics(query, windows, heads, tokens) if kept else query.new_empty(0, dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    align, strides = aligned_strides(query, key, value, out)
    threshold, keep_scale = dropout_numbers(dropout_p)
    pointers = split_statistics(statistics) if kept else (None, None)
    tile = choose_forward(query.dtype, tokens, head_dim)
    parts = count_parts(query.device, tile, windows, heads)
    with device_of(query):
        launch_kernel(
            _window_fwd_kernel, (parts * heads * tile.strips,),
            (query, key, value, out, *pointers, bias, addend_pointer(mask), seed),
            (
                *chain(*strides), *addend_strides(bias, mask), heads, windows, 1 if mask is None else mask.shape[0],
                parts, scale * LOG2E.value, threshold, keep_scale,
            ),
            {
                "BIAS": addend_kind(bias), "MASK": addend_kind(mask), "DROPOUT": seed is not None, "ALIGN": align,
                "TOKENS": tokens, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
                "PRECISION": dot_precision(query.dtype), **tile_constants(tile),
            },
        )  # fmt: skip
    return out, statistics
