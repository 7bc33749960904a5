"""Forward kernel of short windows: few programs, each walking over many windows of one head.

A program owns a strip of queries. What depends on the head alone, the bias, stays in its registers; queries, keys and
values of the next windows are on their way while it computes. Keys are one power of two, or two: 144 = 128 + 16.
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
from .configs import choose_forward, count_parts
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
        "stride_vw", "stride_vh", "stride_vn", "stride_ow", "stride_oh", "stride_on",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts",
    ]
)  # fmt: skip
def _window_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, bias_ptr, mask_ptr, seed_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_ow, stride_oh, stride_on, stride_od,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`o = softmax(scale q k^T + bias + mask) v`. Grid: parts x heads x strips of queries, the last fastest."""
    STRIPS: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    strip, head = pid % STRIPS, pid // STRIPS % heads
    first, last = part_range(pid // STRIPS // heads, parts, windows)
    wide_head = head.to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    rows = strip * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, MAIN)
    q_offsets = row_offsets(rows, offs_d, stride_qn * ALIGN, stride_qd)
    o_offsets = row_offsets(rows, offs_d, stride_on * ALIGN, stride_od)
    k_offsets = row_offsets(columns, offs_d, stride_kn * ALIGN, stride_kd)
    v_offsets = row_offsets(columns, offs_d, stride_vn * ALIGN, stride_vd)
    if BIAS > 0:
        bias_ptr += wide_head * stride_bh
    bias = addend_tile(bias_ptr, rows[:, None], columns[None, :], stride_bq, stride_bk, TOKENS, BIAS)
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        tail_k_offsets = row_offsets(tail_columns, offs_d, stride_kn * ALIGN, stride_kd)
        tail_v_offsets = row_offsets(tail_columns, offs_d, stride_vn * ALIGN, stride_vd)
        tail_bias = addend_tile(bias_ptr, rows[:, None], tail_columns[None, :], stride_bq, stride_bk, TOKENS, BIAS)

    # Windows under the same mask are neighbours in the order of the walk: window `j // images` of image `j % images`.
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
            q = load_rows(q_base, q_offsets, rows < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0)
            k = load_rows(k_base, k_offsets, columns < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
            v = load_rows(v_base, v_offsets, columns < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS >= MAIN)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + addend
            largest = tl.max(scores, 1)
            if TAIL > 0:
                is_tail = tail_columns < TOKENS
                tail_k = load_rows(k_base, tail_k_offsets, is_tail, offs_d, HEAD_DIM, BLOCK_D, TOKENS == MAIN + TAIL)
                tail_v = load_rows(v_base, tail_v_offsets, is_tail, offs_d, HEAD_DIM, BLOCK_D, TOKENS == MAIN + TAIL)
                tail_scores = tl.dot(q, tl.trans(tail_k), input_precision=PRECISION) * scale_log2 + tail_addend
                largest = tl.maximum(largest, tl.max(tail_scores, 1))
            largest = tl.where(largest == -float("inf"), 0.0, largest)
            weights = tl.exp2(scores - largest[:, None])
            total = tl.sum(weights, 1)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window * heads + head, rows[:, None], columns[None, :], threshold)
                weights = tl.where(keep, weights, 0.0)
            out = tl.dot(operand(weights, v, PRECISION), v, input_precision=PRECISION)
            if TAIL > 0:
                tail_weights = tl.exp2(tail_scores - largest[:, None])
                total += tl.sum(tail_weights, 1)
                if DROPOUT:
                    keep = dropout_keep(
                        seed_ptr, window * heads + head, rows[:, None], tail_columns[None, :], threshold
                    )
                    tail_weights = tl.where(keep, tail_weights, 0.0)
                out = tl.dot(operand(tail_weights, tail_v, PRECISION), tail_v, out, input_precision=PRECISION)
            factor = keep_scale / tl.where(total == 0.0, 1.0, total)
            o_base = out_ptr + (window * stride_ow + wide_head * stride_oh) * ALIGN
            store_rows(
                o_base, o_offsets, out * factor[:, None], rows < TOKENS, offs_d, HEAD_DIM, BLOCK_D, TOKENS % ROWS == 0
            )


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Output `[B*W, H, N, D]`, strides ordered as those of query; arguments as the registered operator's."""
    windows, heads, tokens, head_dim = query.shape
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    tile = choose_forward(query.dtype, tokens, head_dim)
    strips = -(-tokens // tile.rows)
    parts = count_parts(query.device, tile, windows, heads * strips)
    outer = [outer_strides(tensor) for tensor in (query, key, value, out)]
    align = stride_alignment(*(stride for strides in outer for stride in strides))
    q, k, v, o = ([*(s // align for s in strides), t.stride(3)] for strides, t in zip(outer, (query, key, value, out)))
    threshold, keep_scale = dropout_numbers(dropout_p)
    with device_of(query):
        _window_fwd_kernel[(parts * heads * strips,)](
            query, key, value, out, bias, addend_pointer(mask), seed, *q, *k, *v, *o,
            *((0, 0, 0) if bias is None else bias.stride()), *((0, 0, 0) if mask is None else mask.stride()),
            heads, windows, 1 if mask is None else mask.shape[0], parts, scale * LOG2E.value, threshold, keep_scale,
            BIAS=addend_kind(bias), MASK=addend_kind(mask), DROPOUT=seed is not None, ALIGN=align,
            TOKENS=tokens, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
            ROWS=tile.rows, MAIN=tile.main, TAIL=tile.tail, PRECISION=dot_precision(query.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
