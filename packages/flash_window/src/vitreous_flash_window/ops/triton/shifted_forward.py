"""Forward of attention in (shifted) windows of a packed image, a window's rows of scores on chip."""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton knows no unpacking into a tuple)

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep, operand

from .arguments import rows_of_statistics, split_statistics
from .image_addressing import (
    chunk_tokens,
    load_tokens,
    score_factor,
    store_tokens,
    window_addend,
    window_place,
    window_scores,
    windows_of_part,
)
from .shifted_arguments import PLANS, RUNTIME_NUMBERS, Launch, Problem, Shape
from .shifted_configs import LARGEST_TILE


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def _shifted_fwd_kernel(
    qkv_ptr, pad_ptr, table_ptr, logit_ptr, seed_ptr, out_ptr, lse_ptr, inverse_ptr,
    stride_b, stride_y, stride_x, stride_gb, stride_gy, stride_gx, stride_entry, stride_head,
    images, height, width, window_rows, window_columns, heads, load, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, COSINE: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`out = softmax(scale q k^T + bias + penalty) v`, and the statistics of the rows unless `lse_ptr` is None.

    A program owns some rows of one head's score matrix and walks over windows. Programs that are neighbours do the
    heads of one window at the same time, so that its pixels come from memory once.
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
    factor, _ = score_factor(logit_ptr, head, scale, COSINE)

    offs_d, rows = tl.arange(0, BLOCK_D), strip * ROWS + tl.arange(0, ROWS)
    columns, addends = (), ()
    for c in tl.static_range(CHUNKS):
        columns = columns + (chunk_tokens(c, CHUNKS, CHUNK, LAST),)
        addend = window_addend(
            table_ptr, head, rows[:, None], columns[c][None, :], zone, stride_entry, stride_head,
            WINDOW, SHIFT, BIAS,
        )  # fmt: skip
        addends = addends + (addend,)
    for item in tl.range(first, past, step, num_stages=STAGES):
        image, row, column = window_place(item, zone, window_rows, window_columns, SHIFT)
        place = (row, column, window_rows, window_columns, height, width)
        window_head = ((image * window_rows + row) * window_columns + column) * heads + head
        qkv_image = qkv_ptr + image.to(tl.int64) * stride_b * ALIGN
        q = load_tokens(
            qkv_image, pad_ptr, channel, rows, offs_d, place, stride_y, stride_x,
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        scores, values = (), ()
        for c in tl.static_range(CHUNKS):
            k = load_tokens(
                qkv_image, pad_ptr, channels + channel, columns[c], offs_d, place, stride_y, stride_x,
                WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
            )  # fmt: skip
            v = load_tokens(
                qkv_image, pad_ptr, 2 * channels + channel, columns[c], offs_d, place, stride_y, stride_x,
                WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
            )  # fmt: skip
            scores = scores + (window_scores(q, k, addends[c], factor, COSINE, PRECISION),)
            values = values + (v,)
        # Every query sees some key, so that no maximum is minus infinity.
        largest = tl.max(scores[0], 1)
        for c in tl.static_range(1, CHUNKS):
            largest = tl.maximum(largest, tl.max(scores[c], 1))
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for c in tl.static_range(CHUNKS):
            weights = tl.exp2(scores[c] - largest[:, None])
            total += tl.sum(weights, 1)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, window_head, rows[:, None], columns[c][None, :], threshold)
                weights = tl.where(keep, weights, 0.0)
            out = tl.dot(operand(weights, values[c], PRECISION), values[c], out, input_precision=PRECISION)
        store_tokens(
            out_ptr + image.to(tl.int64) * height * width * channels, channel, rows, offs_d, place,
            width * (channels // ALIGN), channels // ALIGN, out * (keep_scale / total)[:, None],
            WINDOW, SHIFT, PAD, HEAD_DIM, ALIGN,
        )  # fmt: skip
        if lse_ptr is not None:
            of_rows = tl.cast(window_head, tl.int64) * TOKENS + rows
            if inverse_ptr is None:
                largest += tl.log2(total)
            else:
                tl.store(inverse_ptr + of_rows, 1.0 / total, mask=rows < TOKENS)
            tl.store(lse_ptr + of_rows, largest, mask=rows < TOKENS)


@lru_cache(maxsize=PLANS)
def _plan(shape: Shape) -> tuple[Launch, tuple[int, ...], tuple[int, ...]]:
    """The launch, and the shapes of its output and statistics, `(0,)` where no backward pass needs these."""
    batch, height, width, _ = shape.image
    rows = (rows_of_statistics(shape.dtype), shape.windows, shape.num_heads, shape.tokens)
    statistics = rows if shape.config.keys else (0,)
    return shape.launch(shape.config.forward), (batch, height, width, shape.channels), statistics


def launch_shifted_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output `[B, height, width, C]`, and statistics `[1 or 2, B*W, H, N]` (or `[0]`)."""
    qkv = problem.qkv
    shape = problem.shape()
    if not qkv.numel():
        batch, height, width, _ = shape.image
        return qkv.new_empty((batch, height, width, shape.channels)), qkv.new_empty((0,), dtype=torch.float32)
    launch, out_shape, rows = _plan(shape)
    out, statistics = qkv.new_empty(out_shape), qkv.new_empty(rows, dtype=torch.float32)
    pointers = split_statistics(statistics) if shape.tokens > LARGEST_TILE else (None, None)
    with device_of(qkv):
        launch_kernel(
            _shifted_fwd_kernel, launch.grid, (*problem.pointers(shape), out, *pointers),
            (*launch.numbers, *problem.factors()), launch.constants,
        )  # fmt: skip
    return out, statistics
