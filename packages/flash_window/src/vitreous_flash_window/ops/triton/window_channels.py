"""Kernels of windows whose scores are one tile, but whose rows have too many channels to be on chip at once.

The backward pass takes some whose rows would fit, too: `configs.tiles_channels_backward`.

Both tile along the head dimension, as the paper's kernel does: the tile of scores is a sum over chunks of channels, and
outputs and gradients are made chunk by chunk from the weights, so that every input is read once or, in the backward
pass, twice, the second time mostly from a cache. Programs walk over many windows of one head and keep its bias, and the
partial sum of the bias gradient, in registers. Rows are fp32: in half precision they fit.
"""

# mypy: ignore-errors

from __future__ import annotations

from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep

from .arguments import (
    addend_kind,
    addend_pointer,
    addend_strides,
    aligned_strides,
    dot_precision,
    dropout_numbers,
)
from .bias_gradient import fold_rows
from .configs import choose_channels, count_parts
from .tile_math import (
    LOG2E,
    addend_tile,
    channel_product,
    full_stride,
    halves,
    mask_groups,
    score_factor,
    score_gradients,
    softmax_numerators,
    token_product,
    transposed,
    walk,
)


@triton.jit
def _load_chunk(
    base, rows, first, stride_n, stride_d, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Channels `first` and on of a window's rows, zero outside."""
    channel = first + tl.arange(0, CHUNK)
    pointers = base + rows.to(tl.int64)[:, None] * stride_n + channel[None, :] * stride_d
    is_there = (rows < TOKENS)[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=is_there, other=0.0)


@triton.jit
def _addend(ptr, offset, rows, stride_row, stride_column, TOKENS: tl.constexpr, KIND: tl.constexpr):
    """`addend_tile` of all rows and columns of a window."""
    base = ptr + offset if KIND > 0 else 0
    return addend_tile(base, rows[:, None], rows[None, :], stride_row, stride_column, TOKENS, KIND)


@triton.jit
def _store_product(
    left, factors, base, stride_n, stride_d, to, to_stride_n, to_stride_d, rows,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """Write `factors * left x` chunk by chunk, where x are a window's rows at `base` and `left` a `score_factor`."""
    for first in range(0, HEAD_DIM, CHUNK):
        x = _load_chunk(base, rows, first, stride_n, stride_d, TOKENS, HEAD_DIM, CHUNK)
        product = tl.zeros([left[0].shape[0], CHUNK], tl.float32)
        product = token_product(left, halves(x, HALVED), product, PRECISION) * factors
        channel = first + tl.arange(0, CHUNK)
        is_there = (rows < TOKENS)[:, None] & (channel < HEAD_DIM)[None, :]
        tl.store(to + rows.to(tl.int64)[:, None] * to_stride_n + channel[None, :] * to_stride_d, product, mask=is_there)


@triton.jit(
    do_not_specialize=[
        "stride_qw", "stride_qh", "stride_qn", "stride_kw", "stride_kh", "stride_kn",
        "stride_vw", "stride_vh", "stride_vn", "stride_ow", "stride_oh", "stride_on",
        "stride_bh", "stride_bq", "stride_bk", "stride_mw", "stride_mq", "stride_mk",
        "heads", "windows", "mask_windows", "parts",
    ]
)  # fmt: skip
def _channels_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, bias_ptr, mask_ptr, seed_ptr,
    stride_qw, stride_qh, stride_qn, stride_qd,
    stride_kw, stride_kh, stride_kn, stride_kd,
    stride_vw, stride_vh, stride_vn, stride_vd,
    stride_ow, stride_oh, stride_on, stride_od,
    stride_bh, stride_bq, stride_bk, stride_mw, stride_mq, stride_mk,
    heads, windows, mask_windows, parts, scale_log2, threshold, keep_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`o = softmax(scale q k^T + bias + mask) v`. Grid: parts x heads, the last fastest."""
    pid = tl.program_id(0)
    head, part = (pid % heads).to(tl.int64), pid // heads
    stride_qn = full_stride(stride_qn, ALIGN)
    stride_kn = full_stride(stride_kn, ALIGN)
    stride_vn = full_stride(stride_vn, ALIGN)
    stride_on = full_stride(stride_on, ALIGN)
    rows = tl.arange(0, ROWS)
    bias = _addend(bias_ptr, head * stride_bh, rows, stride_bq, stride_bk, TOKENS, BIAS)
    first_group, last_group = mask_groups(part, parts, windows, mask_windows, MASK)
    for group in range(first_group, last_group):
        addend = bias
        if MASK > 0:
            addend += _addend(mask_ptr, tl.cast(group, tl.int64) * stride_mw, rows, stride_mq, stride_mk, TOKENS, MASK)
        begin, end, step = walk(group, part, parts, windows, mask_windows, MASK)
        for item in range(begin, end, step):
            window = tl.cast(item, tl.int64)
            q_base = q_ptr + (window * stride_qw + head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + head * stride_kh) * ALIGN
            scores = tl.zeros([ROWS, ROWS], tl.float32)
            for first in range(0, HEAD_DIM, CHUNK):
                q = _load_chunk(q_base, rows, first, stride_qn, stride_qd, TOKENS, HEAD_DIM, CHUNK)
                k = _load_chunk(k_base, rows, first, stride_kn, stride_kd, TOKENS, HEAD_DIM, CHUNK)
                scores += channel_product(q, k, PRECISION)
            weights, inverse_sum = softmax_numerators(scores * scale_log2 + addend)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window * heads + head, rows[:, None], rows[None, :], threshold)
                weights = tl.where(keep, weights, 0.0)
            _store_product(
                score_factor(weights, weights, PRECISION, False), (keep_scale * inverse_sum)[:, None],
                v_ptr + (window * stride_vw + head * stride_vh) * ALIGN, stride_vn, stride_vd,
                out_ptr + (window * stride_ow + head * stride_oh) * ALIGN, stride_on, stride_od, rows,
                TOKENS, HEAD_DIM, CHUNK, PRECISION, False,
            )  # fmt: skip


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
def _channels_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, mask_ptr, seed_ptr, partials_ptr,
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
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, HALVED: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """`dv = P^T dout`, `dS = P (dout v^T - delta)`, `dq = scale dS k`, `dk = scale dS^T q`, and partial sums of dS.

    Grid: parts x heads, the last fastest.
    """
    pid = tl.program_id(0)
    head, part = (pid % heads).to(tl.int64), pid // heads
    if SAME_STRIDES:  # places within tensors are then computed once, in fewer registers
        stride_kw, stride_vw, stride_gw = stride_qw, stride_qw, stride_qw
        stride_kh, stride_vh, stride_gh = stride_qh, stride_qh, stride_qh
        stride_kn, stride_vn, stride_gn = stride_qn, stride_qn, stride_qn
        stride_dqw, stride_dkw, stride_dvw = stride_qw, stride_qw, stride_qw
        stride_dqh, stride_dkh, stride_dvh = stride_qh, stride_qh, stride_qh
        stride_dqn, stride_dkn, stride_dvn = stride_qn, stride_qn, stride_qn
    stride_qn = full_stride(stride_qn, ALIGN)
    stride_kn = full_stride(stride_kn, ALIGN)
    stride_vn = full_stride(stride_vn, ALIGN)
    stride_gn = full_stride(stride_gn, ALIGN)
    stride_dqn = full_stride(stride_dqn, ALIGN)
    stride_dkn = full_stride(stride_dkn, ALIGN)
    stride_dvn = full_stride(stride_dvn, ALIGN)
    rows = tl.arange(0, ROWS)
    bias = _addend(bias_ptr, head * stride_bh, rows, stride_bq, stride_bk, TOKENS, BIAS)
    total = tl.zeros([ROWS, ROWS], tl.float32)
    first_group, last_group = mask_groups(part, parts, windows, mask_windows, MASK)
    for group in range(first_group, last_group):
        addend = bias
        if MASK > 0:
            addend += _addend(mask_ptr, tl.cast(group, tl.int64) * stride_mw, rows, stride_mq, stride_mk, TOKENS, MASK)
        begin, end, step = walk(group, part, parts, windows, mask_windows, MASK)
        for item in range(begin, end, step):
            window = tl.cast(item, tl.int64)
            q_base = q_ptr + (window * stride_qw + head * stride_qh) * ALIGN
            k_base = k_ptr + (window * stride_kw + head * stride_kh) * ALIGN
            v_base = v_ptr + (window * stride_vw + head * stride_vh) * ALIGN
            g_base = dout_ptr + (window * stride_gw + head * stride_gh) * ALIGN
            scores = tl.zeros([ROWS, ROWS], tl.float32)
            dweights = tl.zeros([ROWS, ROWS], tl.float32)
            for first in range(0, HEAD_DIM, CHUNK):
                q = _load_chunk(q_base, rows, first, stride_qn, stride_qd, TOKENS, HEAD_DIM, CHUNK)
                k = _load_chunk(k_base, rows, first, stride_kn, stride_kd, TOKENS, HEAD_DIM, CHUNK)
                scores += channel_product(q, k, PRECISION)
                dout = _load_chunk(g_base, rows, first, stride_gn, stride_gd, TOKENS, HEAD_DIM, CHUNK)
                v = _load_chunk(v_base, rows, first, stride_vn, stride_vd, TOKENS, HEAD_DIM, CHUNK)
                dweights += channel_product(dout, v, PRECISION)
            weights, inverse_sum = softmax_numerators(scores * scale_log2 + addend)
            weights *= inverse_sum[:, None]
            kept = weights
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window * heads + head, rows[:, None], rows[None, :], threshold)
                kept = tl.where(keep, weights * keep_scale, 0.0)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            _store_product(
                transposed(score_factor(kept, kept, PRECISION, HALVED)), 1.0, g_base, stride_gn, stride_gd,
                dv_ptr + (window * stride_dvw + head * stride_dvh) * ALIGN, stride_dvn, stride_dvd, rows,
                TOKENS, HEAD_DIM, CHUNK, PRECISION, HALVED,
            )  # fmt: skip
            dscores = score_gradients(weights, dweights)
            if NEEDS_BIAS:
                total += dscores
            dscores = score_factor(dscores, dscores, PRECISION, HALVED)
            _store_product(
                dscores, scale, k_base, stride_kn, stride_kd,
                dq_ptr + (window * stride_dqw + head * stride_dqh) * ALIGN, stride_dqn, stride_dqd, rows,
                TOKENS, HEAD_DIM, CHUNK, PRECISION, HALVED,
            )  # fmt: skip
            _store_product(
                transposed(dscores), scale, q_base, stride_qn, stride_qd,
                dk_ptr + (window * stride_dkw + head * stride_dkh) * ALIGN, stride_dkn, stride_dkd, rows,
                TOKENS, HEAD_DIM, CHUNK, PRECISION, HALVED,
            )  # fmt: skip
    if NEEDS_BIAS:
        is_pair = (rows < TOKENS)[:, None] & (rows < TOKENS)[None, :]
        to = partials_ptr + (part.to(tl.int64) * heads + head) * (TOKENS * TOKENS)
        tl.store(to + rows[:, None] * TOKENS + rows[None, :], total, mask=is_pair)


def launch_channels_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and empty statistics; arguments as the registered operator's."""
    windows, heads, tokens, head_dim = query.shape
    out, statistics = torch.empty_like(query), query.new_empty(0, dtype=torch.float32)
    if not out.numel():
        return out, statistics
    align, strides = aligned_strides(query, key, value, out)
    tile = choose_channels(tokens, head_dim, dot_precision(query.dtype)).forward
    parts = count_parts(query.device, tile, windows, heads)
    with device_of(query):
        launch_kernel(
            _channels_fwd_kernel, (parts * heads,), (query, key, value, out, bias, addend_pointer(mask), seed),
            (
                *chain(*strides), *addend_strides(bias, mask), heads, windows, 1 if mask is None else mask.shape[0],
                parts, scale * LOG2E.value, *dropout_numbers(dropout_p),
            ),
            {
                "BIAS": addend_kind(bias), "MASK": addend_kind(mask), "DROPOUT": seed is not None, "ALIGN": align,
                "TOKENS": tokens, "HEAD_DIM": head_dim, "ROWS": tile.rows, "CHUNK": tile.columns,
                "PRECISION": dot_precision(query.dtype), "num_warps": tile.warps, "num_stages": tile.stages,
            },
        )  # fmt: skip
    return out, statistics


def launch_channels_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias (empty unless `needs_bias`); arguments as the operator's."""
    windows, heads, tokens, head_dim = query.shape
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
    dbias = query.new_empty((heads, tokens, tokens), dtype=bias.dtype) if needs_bias else query.new_empty(0)
    if not query.numel():
        return dq, dk, dv, dbias.zero_()
    align, strides = aligned_strides(query, key, value, dout, dq, dk, dv)
    tile = choose_channels(tokens, head_dim, dot_precision(query.dtype)).backward
    parts = count_parts(query.device, tile, windows, heads)
    partials = query.new_empty((parts, heads, tokens, tokens), dtype=torch.float32) if needs_bias else None
    with device_of(query):
        launch_kernel(
            _channels_bwd_kernel, (parts * heads,),
            (query, key, value, dout, dq, dk, dv, bias, addend_pointer(mask), seed, partials),
            (
                *chain(*strides), *addend_strides(bias, mask), heads, windows, 1 if mask is None else mask.shape[0],
                parts, scale, scale * LOG2E.value, *dropout_numbers(dropout_p),
            ),
            {
                "BIAS": addend_kind(bias), "NEEDS_BIAS": needs_bias, "MASK": addend_kind(mask),
                "DROPOUT": seed is not None, "ALIGN": align, "TOKENS": tokens, "HEAD_DIM": head_dim, "ROWS": tile.rows,
                "CHUNK": tile.columns, "PRECISION": dot_precision(query.dtype), "HALVED": tile.halved,
                "SAME_STRIDES": all(own == strides[0] for own in strides),
                "num_warps": tile.warps, "num_stages": tile.stages,
            },
        )  # fmt: skip
        if partials is not None:
            fold_rows(partials, dbias, 0)
    return dq, dk, dv, dbias
