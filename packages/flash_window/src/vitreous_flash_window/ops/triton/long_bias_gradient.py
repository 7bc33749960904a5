"""Gradient of the bias of long windows, deterministic: fp32 partial sums over fixed groups of windows. No atomics.

A program owns one tile of `[N, N]` of one head and a run of windows: it loads its bias once, recomputes the score
gradients of each window and adds them up in registers. Fewer passes over the scores would need these tiles, or the
score gradients themselves, in device memory, which costs more than the two products saved (see `ops/README.md`).
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep

from .arguments import split_statistics
from .long_arguments import COUNTS, Call, output_strides
from .long_tiles import (
    NO_MASK,
    REGIONS,
    bias_tile,
    load_input,
    load_output,
    mask_tile,
    pad_distance,
    place_tokens,
    regions,
)
from .tile_math import LOG2E, channel_product, part_range

_PROGRAMS = 1056
"""Programs wanted per launch: some waves on the largest GPUs."""

_LARGEST_WORKSPACE = 2**27
"""Floats of partial sums; fewer parts above it."""


@triton.jit(do_not_specialize=COUNTS)
def _long_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, inverse_ptr, delta_ptr, partial_ptr,
    bias_ptr, mask_ptr, pad_ptr, seed_ptr, norm_ptr, factor_ptr,
    stride_qi, stride_qh, stride_qy, stride_qx, stride_ki, stride_kh, stride_ky, stride_kx,
    stride_vi, stride_vh, stride_vy, stride_vx, stride_gi, stride_gh, stride_gy, stride_gx,
    bias_head, bias_row,
    images, windows, heads, tokens, columns, height, width, padded_height, padded_width, shift,
    scale_log2, threshold, keep_scale, parts,
    SIDE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, DOUT_ALIGN: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, COSINE: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPANIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of `dS = P * (dP - delta)` over one part of the units, one tile. Grid: key blocks x strips x parts x heads.

    Units are counted window by window, the images of a window next to each other.
    """
    geometry = (columns, height, width, padded_height, padded_width, shift)
    q_strides = (stride_qi, stride_qh, stride_qy, stride_qx)
    k_strides = (stride_ki, stride_kh, stride_ky, stride_kx)
    v_strides = (stride_vi, stride_vh, stride_vy, stride_vx)
    g_strides = (stride_gi, stride_gh, stride_gy, stride_gx)
    pid = tl.program_id(0)
    blocks, strips = tl.cdiv(tokens, BLOCK_N), tl.cdiv(tokens, BLOCK_M)
    key = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    query = pid // blocks % strips * BLOCK_M + tl.arange(0, BLOCK_M)
    part = pid // (blocks * strips) % parts
    head = pid // (blocks * strips * parts)
    first, past = part_range(part, parts, images * windows)

    offs_d = tl.arange(0, BLOCK_D)
    last = tokens - 1
    row, column = tl.minimum(query, last), tl.minimum(key, last)
    bias_base = bias_ptr + head.to(tl.int64) * bias_head
    bias = bias_tile(bias_base, query[:, None], key[None, :], bias_row, tokens)
    factor = tl.load(factor_ptr + head) * LOG2E if COSINE else 1.0
    q_pad = pad_distance(pad_ptr, q_ptr, 0, heads, HEAD_DIM, ALIGN) if PADDED else 0
    k_pad = pad_distance(pad_ptr, k_ptr, 1, heads, HEAD_DIM, ALIGN) if PADDED else 0
    v_pad = pad_distance(pad_ptr, v_ptr, 2, heads, HEAD_DIM, ALIGN) if PADDED else 0

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in range(first, past):
        window, image = item // images, item % images
        q_y, q_x = place_tokens(row, window, geometry, SIDE)
        k_y, k_x = place_tokens(column, window, geometry, SIDE)
        q = load_input(
            q_ptr, q_pad, image, window, head, windows, q_y, q_x, q_strides, geometry, offs_d,
            SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        k = load_input(
            k_ptr, k_pad, image, window, head, windows, k_y, k_x, k_strides, geometry, offs_d,
            SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        v = load_input(
            v_ptr, v_pad, image, window, head, windows, k_y, k_x, v_strides, geometry, offs_d,
            SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dout = load_output(
            dout_ptr, image, window, head, windows, q_y, q_x, g_strides, geometry, offs_d,
            SIDE, PADDED, DOUT_ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        unit_head = (image * windows + window).to(tl.int64) * heads + head
        lse = tl.load(lse_ptr + unit_head * tokens + row)
        delta = tl.load(delta_ptr + unit_head * tokens + row)
        if inverse_ptr is not None:
            inverse = tl.load(inverse_ptr + unit_head * tokens + row)

        scores = channel_product(q, k, PRECISION)
        if COSINE:
            q_inverse = tl.load(norm_ptr + unit_head * tokens + row)
            unit_head = ((images + image) * windows + window).to(tl.int64) * heads + head
            k_inverse = tl.load(norm_ptr + unit_head * tokens + column)
            scores *= (q_inverse * factor)[:, None] * k_inverse[None, :]
        else:
            scores *= scale_log2
        if MASK == NO_MASK:
            scores += bias
        else:
            q_region = regions(tl.minimum(query, last), window, geometry, SIDE)[:, None] if MASK == REGIONS else 0
            k_region = regions(tl.minimum(key, last), window, geometry, SIDE)[None, :] if MASK == REGIONS else 0
            mask_base = mask_ptr + window.to(tl.int64) * tokens * tokens if MASK != REGIONS else 0
            scores += mask_tile(bias, mask_base, query[:, None], key[None, :], q_region, k_region, tokens, MASK)
        weights = tl.exp2(scores - lse[:, None])
        if inverse_ptr is not None:
            weights *= inverse[:, None]
        dweights = channel_product(dout, v, PRECISION)
        if DROPOUT:
            window_head = (image * windows + window) * heads + head
            keep = dropout_keep(seed_ptr, window_head, query[:, None], key[None, :], threshold)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        total += weights * (dweights - delta[:, None])

    base = partial_ptr + (part.to(tl.int64) * heads + head) * tokens * tokens
    offset = query[:, None] * tokens + key[None, :]
    tl.store(base + offset, total, mask=(query < tokens)[:, None] & (key < tokens)[None, :])


def bias_partials(call: Call, dout: Tensor, statistics: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the bias as fp32 partial sums `[parts, H, N, N]`, each over its own run of windows."""
    geometry, tile = call.geometry, call.config.bias
    heads, tokens = geometry.heads, geometry.tokens
    tiles = -(-tokens // tile.rows) * -(-tokens // tile.columns) * heads
    parts = max(1, min(_PROGRAMS // tiles, _LARGEST_WORKSPACE // (heads * tokens**2), geometry.units))
    partials = torch.empty(parts, heads, tokens, tokens, dtype=torch.float32, device=dout.device)
    dout_strides, dout_align = output_strides(dout)
    with device_of(dout):
        _long_bwd_bias_kernel[(tiles * parts,)](
            call.query, call.key, call.value, dout, *split_statistics(statistics), delta, partials,
            *call.pointers, *call.strides, *dout_strides, *call.numbers, parts,
            **call.options(tile), DOUT_ALIGN=dout_align,
        )  # fmt: skip
    return partials
