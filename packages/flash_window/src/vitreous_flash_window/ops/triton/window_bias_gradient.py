"""Bias gradient of windows whose rows leave no registers for it: a backward pass over its tiles.

A program owns a tile of `[N, N]` of one head, and walks over windows like those of the other passes, which have left
the statistics of the rows and `delta`.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import launch_kernel
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep

from .bias_gradient import fold_rows
from .configs import Tile, count_parts
from .tile_math import addend_tile, channel_product, full_stride, load_rows, mask_groups, row_offsets, walk


@triton.jit
def _row_numbers(ptr, window_head, rows, count, TOKENS: tl.constexpr, other):
    """Numbers of a window's first `count` rows, `other` past them."""
    return tl.load(ptr + window_head * TOKENS + rows, mask=rows < count, other=other)


@triton.jit(
    do_not_specialize=[
        "stride_qw", "stride_qh", "stride_qn", "stride_kw", "stride_kh", "stride_kn",
        "stride_vw", "stride_vh", "stride_vn", "stride_gw", "stride_gh", "stride_gn",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts",
    ]
)  # fmt: skip
def _window_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, inverse_ptr, delta_ptr, bias_ptr, mask_ptr, seed_ptr, partials_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_gw, stride_gh, stride_gn, stride_gd,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIPS: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """Partial sums of `dS = P (dP - delta)` over windows. Grid: parts x heads x tiles of scores, the last fastest."""
    if SAME_STRIDES:  # places within tensors are then computed once, in fewer registers
        stride_kw, stride_vw, stride_gw = stride_qw, stride_qw, stride_qw
        stride_kh, stride_vh, stride_gh = stride_qh, stride_qh, stride_qh
        stride_kn, stride_vn, stride_gn = stride_qn, stride_qn, stride_qn
    stride_qn = full_stride(stride_qn, ALIGN)
    stride_kn = full_stride(stride_kn, ALIGN)
    stride_vn = full_stride(stride_vn, ALIGN)
    stride_gn = full_stride(stride_gn, ALIGN)
    pid = tl.program_id(0)
    tile, part = pid % (STRIPS * STRIPS), pid // (STRIPS * STRIPS) // heads
    head = (pid // (STRIPS * STRIPS) % heads).to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    # Past the end the last token stands in, which is cheaper than a mask, as no sum crosses rows or columns.
    to_rows = tile % STRIPS * SIZE + tl.arange(0, SIZE)
    to_columns = tile // STRIPS * SIZE + tl.arange(0, SIZE)
    rows, columns = tl.minimum(to_rows, TOKENS - 1), tl.minimum(to_columns, TOKENS - 1)
    all_real = to_rows >= 0
    q_offsets = row_offsets(rows, offs_d, stride_qn, stride_qd)
    g_offsets = row_offsets(rows, offs_d, stride_gn, stride_gd)
    k_offsets = row_offsets(columns, offs_d, stride_kn, stride_kd)
    v_offsets = row_offsets(columns, offs_d, stride_vn, stride_vd)
    row, column = rows[:, None], columns[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    first_group, last_group = mask_groups(part, parts, windows, mask_windows, MASK)
    for group in range(first_group, last_group):
        addend = addend_tile(bias_ptr + head * stride_bh, row, column, stride_bq, stride_bk, TOKENS, BIAS)
        if MASK > 0:
            mask = mask_ptr + tl.cast(group, tl.int64) * stride_mw
            addend += addend_tile(mask, row, column, stride_mq, stride_mk, TOKENS, MASK)
        begin, end, step = walk(group, part, parts, windows, mask_windows, MASK)
        # Numbers of the rows are no operands of a product, so the pipeline would not fetch them ahead.
        next_head = tl.cast(begin, tl.int64) * heads + head
        count = tl.where(begin < end, TOKENS, 0)
        next_lse = _row_numbers(lse_ptr, next_head, rows, count, TOKENS, float("inf"))
        next_delta = _row_numbers(delta_ptr, next_head, rows, count, TOKENS, 0.0)
        for item in range(begin, end, step):
            window = tl.cast(item, tl.int64)
            window_head = window * heads + head
            lse, delta = next_lse, next_delta
            next_head = tl.cast(item + step, tl.int64) * heads + head
            count = tl.where(item + step < end, TOKENS, 0)
            next_lse = _row_numbers(lse_ptr, next_head, rows, count, TOKENS, float("inf"))
            next_delta = _row_numbers(delta_ptr, next_head, rows, count, TOKENS, 0.0)
            q_base = q_ptr + (window * stride_qw + head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + head * stride_kh) * ALIGN
            v_base = v_ptr + (window * stride_vw + head * stride_vh) * ALIGN
            g_base = dout_ptr + (window * stride_gw + head * stride_gh) * ALIGN
            q = load_rows(q_base, q_offsets, all_real, offs_d, HEAD_DIM, BLOCK_D, True)
            dout = load_rows(g_base, g_offsets, all_real, offs_d, HEAD_DIM, BLOCK_D, True)
            k = load_rows(k_base, k_offsets, all_real, offs_d, HEAD_DIM, BLOCK_D, True)
            v = load_rows(v_base, v_offsets, all_real, offs_d, HEAD_DIM, BLOCK_D, True)
            scores = channel_product(q, k, PRECISION) * scale_log2 + addend
            weights = tl.exp2(scores - lse[:, None])
            if inverse_ptr is not None:
                weights *= _row_numbers(inverse_ptr, window_head, rows, TOKENS, TOKENS, 0.0)[:, None]
            dweights = channel_product(dout, v, PRECISION)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window_head, row, column, threshold)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            total += weights * (dweights - delta[:, None])

    to = partials_ptr + (part.to(tl.int64) * heads + head) * (TOKENS * TOKENS)
    is_pair = (to_rows < TOKENS)[:, None] & (to_columns < TOKENS)[None, :]
    tl.store(to + to_rows[:, None] * TOKENS + to_columns[None, :], total, mask=is_pair)


def launch_bias_gradient(
    dbias: Tensor, tile: Tile, tensors: tuple[Tensor | None, ...], strides: list[int], numbers: list[int],
    factors: list[float], constants: dict[str, object],
) -> None:  # fmt: skip
    """Write the bias gradient `[H, N, N]`.

    Args:
        dbias: to be written.
        tile: the launch.
        tensors: query, key, value, dout, lse, inverse, delta, bias, mask, seed, as the kernel takes them.
        strides, numbers, factors, constants: the kernel's, in its order; without parts and tiles.
    """
    heads, windows, _ = numbers
    tokens = dbias.shape[1]
    parts = count_parts(dbias.device, tile._replace(strips=tile.strips**2), windows, heads)
    partials = dbias.new_empty((parts, heads, tokens, tokens), dtype=torch.float32)
    launch_kernel(
        _window_bwd_bias_kernel, (parts * heads * tile.strips**2,), (*tensors, partials),
        (*strides, *numbers, parts, *factors),
        {"STRIPS": tile.strips, "SIZE": tile.rows, "num_warps": tile.warps, "num_stages": tile.stages, **constants},
    )  # fmt: skip
    fold_rows(partials, dbias, 0)
