"""Backward of attention in (shifted) windows of a packed image. No atomics, so reruns agree bitwise.

Scores are recomputed. Where a window fits one tile, `_shifted_bwd_closed_kernel` does all of it; else there are passes:
`_shifted_bwd_queries_kernel` owns rows of the score matrix (gradients of queries and logit scale; it leaves what the
others need of each row), `_shifted_bwd_keys_kernel` columns (gradients of keys, values and padding). The gradient of
the bias is summed by the former while there are registers for it, else by `_shifted_bwd_bias_kernel`.

Sums over windows (bias, logit scale, padding) stay in registers while a program walks over its windows. Each program
writes one partial result; they are added up in a fixed order.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton knows no unpacking into a tuple)

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep, operand

from .arguments import split_statistics
from .bias_gradient import fold_partials, fold_rows
from .image_addressing import (
    NO_PADDING,
    NORM_EPS,
    chunk_tokens,
    inverse_norms,
    load_tokens,
    score_factor,
    store_tokens,
    token_places,
    window_addend,
    window_place,
    window_products,
    window_scores,
    windows_of_part,
)
from .shifted_arguments import PLANS, RUNTIME_NUMBERS, Launch, Problem, Shape
from .tile_math import LOG2E, channel_product, score_gradients, softmax_numerators

_FEW_PARTS = 4
"""So many partial bias gradients are added up on the way into the table's: at stage 4 of Swin-T with 384 pixels the
kernel that this spares took 17 us, and adding up three of them here 3 us."""


@triton.jit
def unit_operand(rows, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """What score gradients are multiplied by to become gradients of the other side: its rows, or its unit rows."""
    if COSINE:
        rows = operand(rows.to(tl.float32) * inverse_norms(rows)[:, None], rows, PRECISION)
    return rows


@triton.jit
def through_norms(rows, gradients):
    """Gradient of rows from that of their unit rows.

    What lies along a row is lost, unless its norm was clamped and is a constant.
    """
    inverse = inverse_norms(rows)
    units = rows.to(tl.float32) * inverse[:, None]
    lost = tl.where(inverse < 1.0 / NORM_EPS, tl.sum(units * gradients, 1), 0.0)
    return (gradients - units * lost[:, None]) * inverse[:, None]


@triton.jit
def logit_gradients(dscores, scores, addend):
    """Gradient of the raw logit scale by rows: `dS` times the scores without what was added to them.

    A row of `dS` sums to zero, so its scores may be given relative to any number: one that makes them small where
    weights are large keeps digits.
    """
    is_hidden = addend == -float("inf")
    products = tl.where(is_hidden, 0.0, scores) - tl.where(is_hidden, 0.0, addend)
    return tl.sum(dscores * products, 1) / LOG2E


@triton.jit
def sum_padding(gradients, tokens, place, WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr):
    """Sum `[D]` of the rows `[rows, D]` that lie in the padding."""
    _, in_image = token_places(tokens, place, 0, 0, WINDOW, SHIFT, PAD)
    is_padding = (tokens < WINDOW * WINDOW) & ~in_image
    return tl.sum(tl.where(is_padding[:, None], gradients, 0.0), 0)


@triton.jit
def store_bias_partial(partial_ptr, index, rows, columns, values, TOKENS: tl.constexpr):
    """Write a part of the partial tile number `index` of `[parts x heads, N, N]`."""
    is_pair = (rows < TOKENS)[:, None] & (columns < TOKENS)[None, :]
    base = partial_ptr + index.to(tl.int64) * (TOKENS * TOKENS)
    tl.store(base + rows[:, None] * TOKENS + columns[None, :], values, mask=is_pair)


@triton.jit
def store_padding_partial(partial_ptr, index, channels, channel, offs_d, dk, dv, HEAD_DIM: tl.constexpr):
    """Write partial gradients of the padding's key and value into `[parts, 2, C]`."""
    pointers = partial_ptr + index.to(tl.int64) * 2 * channels + channel + offs_d
    tl.store(pointers, dk, mask=offs_d < HEAD_DIM)
    tl.store(pointers + channels, dv, mask=offs_d < HEAD_DIM)


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def _shifted_bwd_closed_kernel(
    qkv_ptr, pad_ptr, table_ptr, logit_ptr, seed_ptr, dout_ptr, dqkv_ptr, dbias_ptr, dpad_ptr, dlogit_ptr,
    stride_b, stride_y, stride_x, stride_gb, stride_gy, stride_gx, stride_entry, stride_head,
    images, height, width, window_rows, window_columns, heads, load, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr,
    STAGES: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, NEEDS_PAD: tl.constexpr, NEEDS_LOGIT: tl.constexpr,
):  # fmt: skip
    """Every gradient of windows of at most `ROWS` tokens (there is one chunk).

    Queries in the padding have no output: their cotangent is zero, and with it all that they would contribute.
    Grid: parts of the windows x heads, the last fastest.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    pid = tl.program_id(0)
    head, part = pid % heads, pid // heads
    zone, first, past, step = windows_of_part(part, load, images, window_rows, window_columns, SHIFT)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    factor, passes = score_factor(logit_ptr, head, scale, COSINE)

    offs_d, tokens = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    addend = window_addend(
        table_ptr, head, tokens[:, None], tokens[None, :], zone, stride_entry, stride_head, WINDOW, SHIFT, BIAS
    )
    dbias = tl.zeros([ROWS, ROWS], tl.float32)
    dlogit = tl.zeros([ROWS], tl.float32)
    dpad_k, dpad_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for item in tl.range(first, past, step, num_stages=STAGES):
        image, row, column = window_place(item, zone, window_rows, window_columns, SHIFT)
        place = (row, column, window_rows, window_columns, height, width)
        window_head = ((image * window_rows + row) * window_columns + column) * heads + head
        qkv_image = qkv_ptr + image.to(tl.int64) * stride_b * ALIGN
        dout_image = dout_ptr + image.to(tl.int64) * stride_gb * ALIGN
        q = load_tokens(
            qkv_image, pad_ptr, channel, tokens, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        k = load_tokens(
            qkv_image, pad_ptr, channels + channel, tokens, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        v = load_tokens(
            qkv_image, pad_ptr, 2 * channels + channel, tokens, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        dout = load_tokens(
            dout_image, None, channel, tokens, offs_d, place, stride_gy, stride_gx,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        scores = window_scores(q, k, addend, factor, COSINE, PRECISION)
        weights, inverse_sum = softmax_numerators(scores)
        weights *= inverse_sum[:, None]
        dweights = channel_product(dout, v, PRECISION)
        kept = weights
        if DROPOUT:
            keep = dropout_keep(seed_ptr, window_head, tokens[:, None], tokens[None, :], threshold)
            kept = tl.where(keep, weights * keep_scale, 0.0)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dv = tl.dot(tl.trans(operand(kept, dout, PRECISION)), dout, input_precision=PRECISION)
        dscores = score_gradients(weights, dweights)
        if NEEDS_BIAS:
            dbias += dscores
        if NEEDS_LOGIT:
            dlogit += logit_gradients(dscores, scores - tl.max(scores, 1)[:, None], addend)
        low = operand(dscores, k, PRECISION)
        dq = tl.dot(low, unit_operand(k, COSINE, PRECISION), input_precision=PRECISION) * factor
        dk = tl.dot(tl.trans(low), unit_operand(q, COSINE, PRECISION), input_precision=PRECISION) * factor
        if COSINE:
            dq, dk = through_norms(q, dq), through_norms(k, dk)
        dqkv_image = dqkv_ptr + image.to(tl.int64) * height * width * (3 * channels)
        stride_dx = 3 * channels // ALIGN
        store_tokens(
            dqkv_image, channel, tokens, offs_d, place, width * stride_dx, stride_dx, dq,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        store_tokens(
            dqkv_image, channels + channel, tokens, offs_d, place, width * stride_dx, stride_dx, dk,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        store_tokens(
            dqkv_image, 2 * channels + channel, tokens, offs_d, place, width * stride_dx, stride_dx, dv,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        if NEEDS_PAD:
            dpad_k += sum_padding(dk, tokens, place, WINDOW, SHIFT, PAD)
            dpad_v += sum_padding(dv, tokens, place, WINDOW, SHIFT, PAD)

    if NEEDS_BIAS:
        store_bias_partial(dbias_ptr, pid, tokens, tokens, dbias, TOKENS)
    if NEEDS_PAD:
        store_padding_partial(dpad_ptr, part, channels, channel, offs_d, dpad_k, dpad_v, HEAD_DIM)
    if NEEDS_LOGIT:
        tl.store(dlogit_ptr + pid, tl.where(passes, tl.sum(dlogit, 0), 0.0))


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def _shifted_bwd_queries_kernel(
    qkv_ptr, pad_ptr, table_ptr, logit_ptr, seed_ptr,
    dout_ptr, out_ptr, lse_ptr, delta_ptr, inverse_ptr, dqkv_ptr, dbias_ptr, dlogit_ptr,
    stride_b, stride_y, stride_x, stride_gb, stride_gy, stride_gx, stride_entry, stride_head,
    images, height, width, window_rows, window_columns, heads, load, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr,
    STAGES: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, NEEDS_LOGIT: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, logit scale and perhaps bias; leaves `delta = rowsum(P dP)` for the other passes.

    `delta` is `rowsum(dout out)` too, which inherits the rounding of `out`. Cosine scores of up to 100 make weights so
    sharp that `dP - delta` cancels and that rounding shows; so does the rounding of a log-sum-exp of that size. There
    `dS` is summed with that `delta` and with weights whose sum is not quite one. Both errors are known at the end of a
    row: the sum of `dS`, which should be zero, and that of the weights. What is too much of `delta` times the mean key
    puts the gradient right. `inverse_ptr` gets the inverse of the weights' sums; else it holds that of the forward
    pass, if it was kept.

    Grid: parts of the windows x strips of queries x heads, the last fastest.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    STRIPS: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    head = pid % heads
    strip = pid // heads % STRIPS
    part = pid // (heads * STRIPS)
    zone, first, past, step = windows_of_part(part, load, images, window_rows, window_columns, SHIFT)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    factor, passes = score_factor(logit_ptr, head, scale, COSINE)

    offs_d, rows = tl.arange(0, BLOCK_D), strip * ROWS + tl.arange(0, ROWS)
    columns, addends = (), ()
    for c in tl.static_range(CHUNKS):
        columns = columns + (chunk_tokens(c, CHUNKS, CHUNK, LAST),)
        addend = window_addend(
            table_ptr, head, rows[:, None], columns[c][None, :], zone, stride_entry, stride_head,
            WINDOW, SHIFT, BIAS,
        )  # fmt: skip
        addends = addends + (addend,)
    dbias = ()
    for c in tl.static_range(CHUNKS):
        dbias = dbias + (tl.zeros([ROWS, columns[c].shape[0]], tl.float32),)
    dlogit = tl.zeros([ROWS], tl.float32)
    for item in tl.range(first, past, step, num_stages=STAGES):
        image, row, column = window_place(item, zone, window_rows, window_columns, SHIFT)
        place = (row, column, window_rows, window_columns, height, width)
        window_head = ((image * window_rows + row) * window_columns + column) * heads + head
        qkv_image = qkv_ptr + image.to(tl.int64) * stride_b * ALIGN
        dout_image = dout_ptr + image.to(tl.int64) * stride_gb * ALIGN
        q = load_tokens(
            qkv_image, pad_ptr, channel, rows, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        dout = load_tokens(
            dout_image, None, channel, rows, offs_d, place, stride_gy, stride_gx,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        of_rows = tl.cast(window_head, tl.int64) * TOKENS + rows
        lse = tl.load(lse_ptr + of_rows, mask=rows < TOKENS, other=0.0)
        if not COSINE and inverse_ptr is not None:
            inverse = tl.load(inverse_ptr + of_rows, mask=rows < TOKENS, other=0.0)
        out_image = out_ptr + image.to(tl.int64) * height * width * channels
        stride_ox = channels // ALIGN
        out = load_tokens(
            out_image, None, channel, rows, offs_d, place, width * stride_ox, stride_ox,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        dq, mean_key = tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)
        total, excess = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        slope, mean_score = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        sums = ()
        for c in tl.static_range(CHUNKS):
            k = load_tokens(
                qkv_image, pad_ptr, channels + channel, columns[c], offs_d, place, stride_y, stride_x,
                WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
            )  # fmt: skip
            v = load_tokens(
                qkv_image, pad_ptr, 2 * channels + channel, columns[c], offs_d, place, stride_y, stride_x,
                WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
            )  # fmt: skip
            products = window_products(q, k, factor, COSINE, PRECISION) - lse[:, None]
            weights = tl.exp2(products + addends[c])
            dweights = channel_product(dout, v, PRECISION)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window_head, rows[:, None], columns[c][None, :], threshold)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            if not COSINE and inverse_ptr is not None:
                weights *= inverse[:, None]
            dscores = weights * (dweights - delta[:, None])
            if NEEDS_BIAS:
                sums = sums + (dbias[c] + dscores,)
            unit_k = unit_operand(k, COSINE, PRECISION)
            dq = tl.dot(operand(dscores, k, PRECISION), unit_k, dq, input_precision=PRECISION)
            if COSINE:
                total += tl.sum(weights, 1)
                excess += tl.sum(dscores, 1)
                mean_key = tl.dot(operand(weights, k, PRECISION), unit_k, mean_key, input_precision=PRECISION)
            if NEEDS_LOGIT:
                slope += tl.sum(dscores * products, 1)
                mean_score += tl.sum(weights * products, 1)
        if NEEDS_BIAS:
            dbias = sums
        if COSINE:
            inverse = 1.0 / total
            excess *= inverse
            delta += excess
            dq = (dq - excess[:, None] * mean_key) * inverse[:, None]
            tl.store(inverse_ptr + of_rows, inverse, mask=rows < TOKENS)
            if NEEDS_LOGIT:
                dlogit += (slope - excess * mean_score) * inverse / LOG2E
        tl.store(delta_ptr + of_rows, delta, mask=rows < TOKENS)
        dq *= factor
        if COSINE:
            dq = through_norms(q, dq)
        dqkv_image = dqkv_ptr + image.to(tl.int64) * height * width * (3 * channels)
        stride_dx = 3 * channels // ALIGN
        store_tokens(
            dqkv_image, channel, rows, offs_d, place, width * stride_dx, stride_dx, dq,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip

    if NEEDS_BIAS:
        for c in tl.static_range(CHUNKS):
            store_bias_partial(dbias_ptr, part * heads + head, rows, columns[c], dbias[c], TOKENS)
    if NEEDS_LOGIT:
        tl.store(dlogit_ptr + (part * STRIPS + strip) * heads + head, tl.where(passes, tl.sum(dlogit, 0), 0.0))


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def _shifted_bwd_keys_kernel(
    qkv_ptr, pad_ptr, table_ptr, logit_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, inverse_ptr, dqkv_ptr, dpad_ptr,
    stride_b, stride_y, stride_x, stride_gb, stride_gy, stride_gx, stride_entry, stride_head,
    images, height, width, window_rows, window_columns, heads, load, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr,
    STAGES: tl.constexpr,
    NEEDS_PAD: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, values and padding; rows are keys, columns are queries.

    Grid: parts of the windows x strips of keys x heads, the last fastest.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    STRIPS: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    head = pid % heads
    strip = pid // heads % STRIPS
    part = pid // (heads * STRIPS)
    zone, first, past, step = windows_of_part(part, load, images, window_rows, window_columns, SHIFT)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    factor, _ = score_factor(logit_ptr, head, scale, COSINE)

    offs_d, rows = tl.arange(0, BLOCK_D), strip * ROWS + tl.arange(0, ROWS)
    columns, addends = (), ()
    for c in tl.static_range(CHUNKS):
        columns = columns + (chunk_tokens(c, CHUNKS, CHUNK, LAST),)
        addend = window_addend(
            table_ptr, head, columns[c][None, :], rows[:, None], zone, stride_entry, stride_head,
            WINDOW, SHIFT, BIAS,
        )  # fmt: skip
        addends = addends + (addend,)
    dpad_k, dpad_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for item in tl.range(first, past, step, num_stages=STAGES):
        image, row, column = window_place(item, zone, window_rows, window_columns, SHIFT)
        place = (row, column, window_rows, window_columns, height, width)
        window_head = ((image * window_rows + row) * window_columns + column) * heads + head
        qkv_image = qkv_ptr + image.to(tl.int64) * stride_b * ALIGN
        dout_image = dout_ptr + image.to(tl.int64) * stride_gb * ALIGN
        k = load_tokens(
            qkv_image, pad_ptr, channels + channel, rows, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        v = load_tokens(
            qkv_image, pad_ptr, 2 * channels + channel, rows, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        of_window = tl.cast(window_head, tl.int64) * TOKENS
        dk, dv = tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)
        for c in tl.static_range(CHUNKS):
            q = load_tokens(
                qkv_image, pad_ptr, channel, columns[c], offs_d, place, stride_y, stride_x,
                WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
            )  # fmt: skip
            dout = load_tokens(
                dout_image, None, channel, columns[c], offs_d, place, stride_gy, stride_gx,
                WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
            )  # fmt: skip
            # Queries past the window weigh nothing.
            lse = tl.load(lse_ptr + of_window + columns[c], mask=columns[c] < TOKENS, other=float("inf"))
            delta = tl.load(delta_ptr + of_window + columns[c], mask=columns[c] < TOKENS, other=0.0)
            weights = tl.exp2(window_scores(k, q, addends[c], factor, COSINE, PRECISION) - lse[None, :])
            if inverse_ptr is not None:
                inverse = tl.load(inverse_ptr + of_window + columns[c], mask=columns[c] < TOKENS, other=0.0)
                weights *= inverse[None, :]
            dweights = channel_product(v, dout, PRECISION)
            kept = weights
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window_head, columns[c][None, :], rows[:, None], threshold)
                kept = tl.where(keep, weights * keep_scale, 0.0)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            dv = tl.dot(operand(kept, dout, PRECISION), dout, dv, input_precision=PRECISION)
            low = operand(weights * (dweights - delta[None, :]), q, PRECISION)
            dk = tl.dot(low, unit_operand(q, COSINE, PRECISION), dk, input_precision=PRECISION)
        dk *= factor
        if COSINE:
            dk = through_norms(k, dk)
        dqkv_image = dqkv_ptr + image.to(tl.int64) * height * width * (3 * channels)
        stride_dx = 3 * channels // ALIGN
        store_tokens(
            dqkv_image, channels + channel, rows, offs_d, place, width * stride_dx, stride_dx, dk,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        store_tokens(
            dqkv_image, 2 * channels + channel, rows, offs_d, place, width * stride_dx, stride_dx, dv,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        if NEEDS_PAD:
            dpad_k += sum_padding(dk, rows, place, WINDOW, SHIFT, PAD)
            dpad_v += sum_padding(dv, rows, place, WINDOW, SHIFT, PAD)

    if NEEDS_PAD:
        store_padding_partial(dpad_ptr, part * STRIPS + strip, channels, channel, offs_d, dpad_k, dpad_v, HEAD_DIM)


@triton.jit
def numbers_of_window(
    ptr, item, past, zone, head, heads, window_rows, window_columns, rows,
    TOKENS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Numbers of the rows of one head of window `item`, zeros if that is past the last one."""
    image, row, column = window_place(item, zone, window_rows, window_columns, SHIFT)
    window_head = ((image * window_rows + row) * window_columns + column) * heads + head
    is_row = rows < tl.where(item < past, TOKENS, 0)
    return tl.load(ptr + tl.cast(window_head, tl.int64) * TOKENS + rows, mask=is_row, other=0.0)


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def _shifted_bwd_bias_kernel(
    qkv_ptr, pad_ptr, table_ptr, logit_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, inverse_ptr, dbias_ptr,
    stride_b, stride_y, stride_x, stride_gb, stride_gy, stride_gx, stride_entry, stride_head,
    images, height, width, window_rows, window_columns, heads, load, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of `dS` where the pass over queries has no registers for them.

    Grid: parts of the windows x tiles of scores x heads, the last fastest.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    STRIPS: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    head = pid % heads
    tile = pid // heads % (STRIPS * CHUNKS)
    part = pid // (heads * STRIPS * CHUNKS)
    zone, first, past, step = windows_of_part(part, load, images, window_rows, window_columns, SHIFT)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    factor, _ = score_factor(logit_ptr, head, scale, COSINE)

    offs_d = tl.arange(0, BLOCK_D)
    to_rows, to_columns = tile % STRIPS * ROWS + tl.arange(0, ROWS), tile // STRIPS * CHUNK + tl.arange(0, CHUNK)
    # Past the end the last token stands in: no sum crosses rows or columns.
    rows, columns = tl.minimum(to_rows, TOKENS - 1), tl.minimum(to_columns, TOKENS - 1)
    addend = window_addend(
        table_ptr, head, rows[:, None], columns[None, :], zone, stride_entry, stride_head, WINDOW, SHIFT, BIAS
    )
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    # Numbers of the rows are no operands of a product, so the pipeline would not fetch them ahead.
    lse = numbers_of_window(lse_ptr, first, past, zone, head, heads, window_rows, window_columns, rows, TOKENS, SHIFT)
    delta = numbers_of_window(
        delta_ptr, first, past, zone, head, heads, window_rows, window_columns, rows, TOKENS, SHIFT
    )
    for item in tl.range(first, past, step, num_stages=STAGES):
        image, row, column = window_place(item, zone, window_rows, window_columns, SHIFT)
        place = (row, column, window_rows, window_columns, height, width)
        window_head = ((image * window_rows + row) * window_columns + column) * heads + head
        qkv_image = qkv_ptr + image.to(tl.int64) * stride_b * ALIGN
        dout_image = dout_ptr + image.to(tl.int64) * stride_gb * ALIGN
        next_lse = numbers_of_window(
            lse_ptr, item + step, past, zone, head, heads, window_rows, window_columns, rows, TOKENS, SHIFT
        )
        next_delta = numbers_of_window(
            delta_ptr, item + step, past, zone, head, heads, window_rows, window_columns, rows, TOKENS, SHIFT
        )
        q = load_tokens(
            qkv_image, pad_ptr, channel, rows, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        dout = load_tokens(
            dout_image, None, channel, rows, offs_d, place, stride_gy, stride_gx,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        k = load_tokens(
            qkv_image, pad_ptr, channels + channel, columns, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        v = load_tokens(
            qkv_image, pad_ptr, 2 * channels + channel, columns, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        weights = tl.exp2(window_scores(q, k, addend, factor, COSINE, PRECISION) - lse[:, None])
        if inverse_ptr is not None:
            inverse = tl.load(inverse_ptr + tl.cast(window_head, tl.int64) * TOKENS + rows)
            weights *= inverse[:, None]
        dweights = channel_product(dout, v, PRECISION)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, window_head, rows[:, None], columns[None, :], threshold)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        total += weights * (dweights - delta[:, None])
        lse, delta = next_lse, next_delta

    store_bias_partial(dbias_ptr, part * heads + head, to_rows, to_columns, total, TOKENS)


@triton.jit(do_not_specialize=["parts"])
def _table_kernel(dbias_ptr, dtable_ptr, parts, heads, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Fold partial bias gradients `[parts, H, N, N]` to the table `[(2w - 1)^2, H]`: programs are heads x row offsets.

    With the row offset fixed, a pair is (query row, query column, key column); pairs of one column offset are added
    up in the order of the block.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    WIDE: tl.constexpr = 2 * WINDOW - 1
    head, offset_y = tl.program_id(0), tl.program_id(1) - (WINDOW - 1)
    query_y = tl.arange(0, BLOCK)[:, None, None]
    query_x = tl.arange(0, BLOCK)[None, :, None]
    key_x = tl.arange(0, BLOCK)[None, None, :]
    key_y = query_y - offset_y
    is_pair = (query_y < WINDOW) & (key_y >= 0) & (key_y < WINDOW) & (query_x < WINDOW) & (key_x < WINDOW)
    pair = (query_y * WINDOW + query_x) * TOKENS + key_y * WINDOW + key_x
    pairs = tl.zeros([BLOCK, BLOCK, BLOCK], tl.float32)
    for part in range(parts):
        tile = (tl.cast(part, tl.int64) * heads + head) * (TOKENS * TOKENS)
        pairs += tl.load(dbias_ptr + tile + pair, mask=is_pair, other=0.0)
    values = tl.sum(pairs, 0)  # [query_x, key_x]
    offset_x = tl.arange(0, BLOCK)[:, None] - tl.arange(0, BLOCK)[None, :]
    for entry_x in tl.static_range(WIDE):
        total = tl.sum(tl.where(offset_x == entry_x - (WINDOW - 1), values, 0.0))
        pointer = dtable_ptr + (tl.program_id(1) * WIDE + entry_x) * heads + head
        tl.store(pointer, total.to(dtable_ptr.dtype.element_ty))


class _Plan(NamedTuple):
    """The launches of a backward pass: over queries, or over whole windows; over keys; over tiles of the bias gradient.

    Args:
        queries: the first one, which is all there is of windows that are one tile.
        keys: None there.
        bias: None too where the first one sums the bias gradient, or nobody needs it.
    """

    queries: Launch
    keys: Launch | None
    bias: Launch | None


@lru_cache(maxsize=PLANS)
def _plan(shape: Shape, needs_table: bool, sums_pad: bool, needs_logit: bool) -> _Plan:
    config = shape.config
    needs = {"NEEDS_BIAS": needs_table and config.bias is None, "NEEDS_LOGIT": needs_logit}
    if config.keys is None:
        return _Plan(shape.launch(config.queries, **needs, NEEDS_PAD=sums_pad), None, None)
    bias = config.bias if needs_table else None
    return _Plan(
        shape.launch(config.queries, **needs),
        shape.launch(config.keys, NEEDS_PAD=sums_pad),
        None if bias is None else shape.launch(bias, tiles=True),
    )


def launch_shifted_backward(
    dout: Tensor, out: Tensor | None, statistics: Tensor | None, problem: Problem,
    needs_table: bool, needs_pad: bool, needs_logit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv (contiguous), table, padding and logit scale; the last three empty unless needed."""
    qkv, table, pad, logit = problem[:4]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dtable, dpad, dlogit = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else qkv.new_empty(0)
        for tensor, needed in ((table, needs_table), (pad, needs_pad), (logit, needs_logit))
    )
    if needs_pad:
        # Its queries have no output; and without padding all of it is zero, and no kernel needs to know.
        dpad.zero_()
    if not qkv.numel():
        return dqkv, dtable.zero_(), dpad, dlogit.zero_()
    shape = problem.shape(dout)
    sums_pad = needs_pad and shape.padding != NO_PADDING.value
    queries, keys, bias = _plan(shape, needs_table, sums_pad, needs_logit)
    heads, tokens, wide = shape.num_heads, shape.tokens, torch.float32
    # One row of sums for each program and head: programs of a part are neighbours, the heads fastest.
    bias_shape = ((bias or queries).parts, heads, tokens, tokens)
    bias_parts = qkv.new_empty(bias_shape, dtype=wide) if needs_table else None
    logit_parts = qkv.new_empty((queries.grid[0] // heads, 1, 1, heads), dtype=wide) if needs_logit else None
    pad_rows = (keys or queries).grid[0] // heads
    pad_parts = qkv.new_empty((pad_rows, 1, 1, 2 * shape.channels), dtype=wide) if sums_pad else None
    pointers, factors = (*problem.pointers(shape), dout), problem.factors()
    with device_of(qkv):
        if keys is None:
            launch_kernel(
                _shifted_bwd_closed_kernel, queries.grid, (*pointers, dqkv, bias_parts, pad_parts, logit_parts),
                (*queries.numbers, *factors), queries.constants,
            )  # fmt: skip
        else:
            lse, inverse = split_statistics(statistics)
            delta = torch.empty_like(lse)
            if shape.has_logit_scale:
                inverse = torch.empty_like(lse)
            launch_kernel(
                _shifted_bwd_queries_kernel, queries.grid,
                (*pointers, out, lse, delta, inverse, dqkv, bias_parts, logit_parts),
                (*queries.numbers, *factors), queries.constants,
            )  # fmt: skip
            launch_kernel(
                _shifted_bwd_keys_kernel, keys.grid, (*pointers, lse, delta, inverse, dqkv, pad_parts),
                (*keys.numbers, *factors), keys.constants,
            )  # fmt: skip
            if bias is not None:
                launch_kernel(
                    _shifted_bwd_bias_kernel, bias.grid, (*pointers, lse, delta, inverse, bias_parts),
                    (*bias.numbers, *factors), bias.constants,
                )  # fmt: skip
        if needs_table:
            _fold_table(bias_parts, dtable, shape.window_size)
        if sums_pad:
            fold_rows(pad_parts, dpad[shape.channels :].view(1, 1, -1), 0)
        if needs_logit:
            fold_rows(logit_parts, dlogit.view(1, 1, -1), 0)
    return dqkv, dtable, dpad, dlogit


def _fold_table(bias_parts: Tensor, dtable: Tensor, window: int) -> None:
    parts, heads = bias_parts.shape[:2]
    if parts > _FEW_PARTS:
        bias_parts, parts = fold_partials(bias_parts, torch.float32), 1
    constants = {"WINDOW": window, "BLOCK": 1 << (window - 1).bit_length()}
    launch_kernel(_table_kernel, (heads, 2 * window - 1), (bias_parts, dtable), (parts, heads), constants)
