"""Cascaded group attention of windows in one kernel; `../README.md` explains the design."""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from ..weights import BIAS_TILE, AttentionWeights
from . import resources
from .configs import PLANS, Launch, attention_tile, precision

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_kernel(
    x_ptr, qkv_weight_ptr, qkv_bias_ptr, query_weight_ptr, query_bias_ptr, bias_ptr, proj_weight_ptr, proj_bias_ptr,
    queries_ptr, heads_ptr, out_ptr, groups, windows, window_rows, window_columns, height, width,
    KERNELS: tl.constexpr, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_DIM: tl.constexpr, SIDE: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: programs that walk over groups of `GROUP` windows, whose tokens are the rows of one tile.

    Rows past the windows' tokens compute finite numbers that nobody reads.
    """
    CHANNELS: tl.constexpr = HEADS * VALUE_DIM
    TOKENS: tl.constexpr = SIDE * SIDE
    dtype = x_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    slot, token = offs_n // TOKENS, offs_n % TOKENS
    offs_k, offs_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    is_value = (offs_v < VALUE_DIM)[None, :]
    # What a program keeps between its warps: the heads' outputs, and the queries twice.
    rows = (tl.program_id(0) * BLOCK_N + offs_n).to(tl.int64)[:, None] * CHANNELS
    query_rows = (tl.program_id(0) * 2 * BLOCK_N + offs_n)[:, None] * BLOCK_K
    # One stage: a load moved ahead of its iteration would read queries or heads before they are written.
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0), num_stages=1, disable_licm=True):
        window = group * GROUP + slot
        place = window % (window_rows * window_columns)
        y = place // window_columns * SIDE + token // SIDE
        x = place % window_columns * SIDE + token % SIDE
        # Cells of the padding are zero here and take part from now on, as keys too.
        is_cell = ((slot < GROUP) & (window < windows) & (y < height) & (x < width))[:, None]
        row = (window // (window_rows * window_columns)).to(tl.int64) * height * width + y * width + x
        cells = row[:, None] * CHANNELS

        output = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        first_tap = 0
        for head in tl.static_range(HEADS):
            piece = tl.load(x_ptr + cells + (head * VALUE_DIM + offs_v)[None, :], mask=is_cell & is_value, other=0.0)
            source = (piece.to(tl.float32) + output).to(dtype)
            qkv_row = head * (2 * KEY_DIM + VALUE_DIM)
            query = _map(
                source, qkv_weight_ptr, qkv_bias_ptr, qkv_row, offs_v, offs_k, VALUE_DIM, KEY_DIM, PRECISION
            )  # fmt: skip
            key = _map(
                source, qkv_weight_ptr, qkv_bias_ptr, qkv_row + KEY_DIM, offs_v, offs_k, VALUE_DIM, KEY_DIM, PRECISION
            )  # fmt: skip
            value = _map(
                source, qkv_weight_ptr, qkv_bias_ptr, qkv_row + 2 * KEY_DIM, offs_v, offs_v, VALUE_DIM, VALUE_DIM,
                PRECISION,
            )  # fmt: skip

            # Two buffers in turn: one barrier a head is enough.
            queries = queries_ptr + head % 2 * BLOCK_N * BLOCK_K
            tl.store(queries + query_rows + offs_k[None, :], query)
            tl.debug_barrier()
            query = _convolve(
                queries + query_rows + offs_k[None, :], query_weight_ptr + first_tap * KEY_DIM,
                query_bias_ptr + head * KEY_DIM, token, offs_k, KERNELS[head], SIDE, KEY_DIM, BLOCK_N, BLOCK_K,
            ).to(dtype)  # fmt: skip
            first_tap += KERNELS[head] * KERNELS[head]

            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            bias = tl.load(bias_ptr + head * TILE * TILE + offs_n[:, None] * TILE + offs_n[None, :])
            scores = (scores + bias.to(tl.float32)) * LOG2E
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(weights, 1)
            output = tl.dot(weights.to(dtype), value, input_precision=PRECISION) / total[:, None]
            rectified = tl.maximum(output, 0.0).to(dtype)
            tl.store(heads_ptr + rows + (head * VALUE_DIM + offs_v)[None, :], rectified, mask=is_value)

        tl.debug_barrier()
        for first in tl.range(0, CHANNELS, BLOCK_C, num_stages=1):
            offs_c = first + tl.arange(0, BLOCK_C)
            is_column = offs_c < CHANNELS
            projected = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            for start in tl.range(0, CHANNELS, BLOCK_D, num_stages=STAGES):
                offs_d = start + tl.arange(0, BLOCK_D)
                is_channel = offs_d < CHANNELS
                part = tl.load(heads_ptr + rows + offs_d[None, :], mask=is_channel[None, :], other=0.0)
                weight = tl.load(
                    proj_weight_ptr + offs_c[None, :] * CHANNELS + offs_d[:, None],
                    mask=is_column[None, :] & is_channel[:, None], other=0.0,
                )  # fmt: skip
                projected = tl.dot(part, weight, projected, input_precision=PRECISION)
            projected += tl.load(proj_bias_ptr + offs_c, mask=is_column, other=0.0).to(tl.float32)[None, :]
            mask = is_cell & is_column[None, :]
            projected += tl.load(x_ptr + cells + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + cells + offs_c[None, :], projected.to(dtype), mask=mask)
        # The last head of these windows and the first of the next may use the same buffer.
        tl.debug_barrier()


@triton.jit
def _map(
    source, weight_ptr, bias_ptr, first, offs_in, offs_out, IN: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`source @ weight.T + bias` in the dtype of `source`, by `OUT` rows of the weight `[rows, IN]` from `first` on.

    Padding comes out as zero.
    """
    is_weight = (offs_in < IN)[:, None] & (offs_out < OUT)[None, :]
    weight = tl.load(weight_ptr + (first + offs_out)[None, :] * IN + offs_in[:, None], mask=is_weight, other=0.0)
    bias = tl.load(bias_ptr + first + offs_out, mask=offs_out < OUT, other=0.0).to(tl.float32)
    return (tl.dot(source, weight, input_precision=PRECISION) + bias[None, :]).to(source.dtype)


@triton.jit
def _convolve(
    queries, weight_ptr, bias_ptr, token, offs_k, KERNEL: tl.constexpr, SIDE: tl.constexpr,
    KEY_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution of each window of `[BLOCK_N, BLOCK_K]`, zero outside the window, in fp32.

    Args:
        queries: pointers to the rows.
        token: of each row, within its window.
    """
    REACH: tl.constexpr = KERNEL // 2
    y, x = token // SIDE, token % SIDE
    is_channel = offs_k < KEY_DIM
    # Windows that the end of the tile cuts off would reach past it.
    is_whole = tl.arange(0, BLOCK_N) < BLOCK_N // (SIDE * SIDE) * (SIDE * SIDE)
    bias = tl.load(bias_ptr + offs_k, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32) + bias[None, :]
    for row in range(KERNEL):
        dy = row - REACH
        for column in tl.static_range(KERNEL):
            dx = column - REACH
            is_there = (y + dy >= 0) & (y + dy < SIDE) & (x + dx >= 0) & (x + dx < SIDE) & is_whole
            cell = tl.load(queries + (dy * SIDE + dx) * BLOCK_K, mask=is_there[:, None], other=0.0)
            tap = tl.load(weight_ptr + (row * KERNEL + column) * KEY_DIM + offs_k, mask=is_channel, other=0.0)
            total += cell.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total


@lru_cache(maxsize=PLANS)
def _plan(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, products: str,
    weight_shape: tuple[int, ...], kernel_sizes: tuple[int, ...], side: int,
) -> tuple[Launch, tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """The launch, and the shapes of what its programs keep: queries, and the heads' outputs."""
    batch, channels, height, width = shape
    heads, mixed, value_dim = weight_shape
    key_dim = (mixed - value_dim) // 2
    rows, columns = triton.cdiv(height, side), triton.cdiv(width, side)
    windows = batch * rows * columns
    multiprocessors, _ = resources(device)
    tile = attention_tile(dtype, products == "tf32", windows, side, value_dim, multiprocessors)
    groups = triton.cdiv(windows, tile.windows)
    programs = min(groups, multiprocessors * tile.programs)
    block_k, block_v = (max(triton.next_power_of_2(size), 16) for size in (key_dim, value_dim))
    constants = {
        "KERNELS": kernel_sizes, "HEADS": heads, "VALUE_DIM": value_dim, "KEY_DIM": key_dim, "SIDE": side,
        "GROUP": tile.windows, "TILE": BIAS_TILE, "BLOCK_N": tile.rows, "BLOCK_K": block_k, "BLOCK_V": block_v,
        "BLOCK_C": tile.columns, "BLOCK_D": tile.depth, "PRECISION": products, "STAGES": tile.stages,
        "num_warps": tile.warps,
    }  # fmt: skip
    launch = Launch((programs,), (groups, windows, rows, columns, height, width), constants)
    return launch, (programs, 2, tile.rows, block_k), (programs, tile.rows, channels)


def launch_attention(x: Tensor, weights: AttentionWeights) -> Tensor:
    """The operator; the result is channels-last, and so is `x` unless a copy is made."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return out
    launch, *scratch = _plan(
        x.shape, x.dtype, x.device, precision(x.dtype), weights.qkv_weight.shape, tuple(weights.kernel_sizes),
        weights.window_size,
    )  # fmt: skip
    queries, outputs = (x.new_empty(shape) for shape in scratch)
    with device_of(x):
        launch_kernel(_attention_kernel, launch.grid, (x, *weights.tensors, queries, outputs, out), *launch[1:])
    return out
