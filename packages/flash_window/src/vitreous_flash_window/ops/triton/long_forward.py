"""Forward of long windows: online softmax over blocks of keys, for cut windows and for the image.

One program owns a strip of queries of one head in some companions (see `long_tiles`): the tile of bias and mask is
read once for all of them, which at a head dimension of 32 would else be most of the traffic.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton's language cannot unpack one tuple into another

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep, operand

from .arguments import new_statistics, split_statistics
from .long_arguments import COUNTS, Call, cut_call, deliver, output_strides, writable
from .long_bias import prepare_bias
from .long_tiles import (
    NO_MASK,
    REGIONS,
    bias_tile,
    load_input,
    mask_tile,
    pad_distance,
    place_tokens,
    plain_addend,
    regions,
    split_program,
    store_output,
)
from .tile_math import LOG2E, channel_product


@triton.jit(do_not_specialize=COUNTS[:-1])
def _long_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, inverse_ptr, bias_ptr, mask_ptr, pad_ptr, seed_ptr, norm_ptr, factor_ptr,
    stride_qi, stride_qh, stride_qy, stride_qx, stride_ki, stride_kh, stride_ky, stride_kx,
    stride_vi, stride_vh, stride_vy, stride_vx, stride_oi, stride_oh, stride_oy, stride_ox,
    bias_head, bias_row,
    images, windows, heads, tokens, columns, height, width, padded_height, padded_width, shift,
    scale_log2, threshold, keep_scale,
    SIDE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, COSINE: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPANIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out = softmax(scores) v`, and the statistics of the rows as in `arguments.split_statistics`.

    Grid: strips x image groups x windows x heads.
    """
    geometry = (columns, height, width, padded_height, padded_width, shift)
    q_strides = (stride_qi, stride_qh, stride_qy, stride_qx)
    k_strides = (stride_ki, stride_kh, stride_ky, stride_kx)
    v_strides = (stride_vi, stride_vh, stride_vy, stride_vx)
    o_strides = (stride_oi, stride_oh, stride_oy, stride_ox)
    first, first_image, window, head = split_program(tl.program_id(0), tokens, images, windows, BLOCK_M, COMPANIONS)

    offs_d = tl.arange(0, BLOCK_D)
    query = first + tl.arange(0, BLOCK_M)
    last = tokens - 1
    q_y, q_x = place_tokens(tl.minimum(query, last), window, geometry, SIDE)
    q_region = regions(tl.minimum(query, last), window, geometry, SIDE)[:, None] if MASK == REGIONS else 0
    bias_base = bias_ptr + head.to(tl.int64) * bias_head if BIAS else 0
    mask_base = mask_ptr + window.to(tl.int64) * tokens * tokens if MASK != NO_MASK and MASK != REGIONS else 0
    factor = tl.load(factor_ptr + head) * LOG2E if COSINE else 1.0

    q_pad = pad_distance(pad_ptr, q_ptr, 0, heads, HEAD_DIM, ALIGN) if PADDED else 0
    k_pad = pad_distance(pad_ptr, k_ptr, 1, heads, HEAD_DIM, ALIGN) if PADDED else 0
    v_pad = pad_distance(pad_ptr, v_ptr, 2, heads, HEAD_DIM, ALIGN) if PADDED else 0

    queries, query_factors, peaks, sums, totals = (), (), (), (), ()
    for g in tl.static_range(COMPANIONS):
        image = tl.minimum(first_image + g, images - 1)
        q = load_input(
            q_ptr, q_pad, image, window, head, windows, q_y, q_x, q_strides, geometry, offs_d,
            SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        queries = queries + (q,)
        if COSINE:
            unit_head = (image * windows + window).to(tl.int64) * heads + head
            inverse = tl.load(norm_ptr + unit_head * tokens + tl.minimum(query, last))
            query_factors = query_factors + (inverse * factor,)
        peaks = peaks + (tl.full([BLOCK_M], -float("inf"), tl.float32),)
        sums = sums + (tl.zeros([BLOCK_M], tl.float32),)
        totals = totals + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)

    for key_start in range(0, tokens, BLOCK_N):
        key = key_start + tl.arange(0, BLOCK_N)
        inside = tl.minimum(key, last) if TAIL else key
        k_y, k_x = place_tokens(inside, window, geometry, SIDE)
        k_region = regions(tl.minimum(key, last), window, geometry, SIDE)[None, :] if MASK == REGIONS else 0
        if BIAS or (MASK != NO_MASK) or TAIL:
            if BIAS:
                addend = bias_tile(bias_base, query[:, None], key[None, :], bias_row, tokens)
            else:
                addend = plain_addend(query[:, None], key[None, :], tokens, TAIL)
            addend = mask_tile(addend, mask_base, query[:, None], key[None, :], q_region, k_region, tokens, MASK)
        new_peaks, new_sums, new_totals = (), (), ()
        for g in tl.static_range(COMPANIONS):
            image = tl.minimum(first_image + g, images - 1)
            k = load_input(
                k_ptr, k_pad, image, window, head, windows, k_y, k_x, k_strides, geometry, offs_d,
                SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            scores = channel_product(queries[g], k, PRECISION)
            if COSINE:
                unit_head = ((images + image) * windows + window).to(tl.int64) * heads + head
                key_norms = tl.load(norm_ptr + unit_head * tokens + inside)
                scores *= query_factors[g][:, None] * key_norms[None, :]
            else:
                scores *= scale_log2
            if BIAS or (MASK != NO_MASK) or TAIL:
                scores += addend

            peak = tl.maximum(peaks[g], tl.max(scores, 1))
            # Zero for a row that has seen nothing: then its weights are exp2(-inf - 0) = 0.
            ground = tl.where(peak == -float("inf"), 0.0, peak)
            decay = tl.exp2(peaks[g] - ground)
            weights = tl.exp2(scores - ground[:, None])
            new_peaks = new_peaks + (peak,)
            new_sums = new_sums + (sums[g] * decay + tl.sum(weights, 1),)
            if DROPOUT:
                window_head = (image * windows + window) * heads + head
                keep = dropout_keep(seed_ptr, window_head, query[:, None], key[None, :], threshold)
                weights = tl.where(keep, weights * keep_scale, 0.0)
            v = load_input(
                v_ptr, v_pad, image, window, head, windows, k_y, k_x, v_strides, geometry, offs_d,
                SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            total = tl.dot(operand(weights, v, PRECISION), v, totals[g] * decay[:, None], input_precision=PRECISION)
            new_totals = new_totals + (total,)
        peaks, sums, totals = new_peaks, new_sums, new_totals

    for g in tl.static_range(COMPANIONS):
        image = tl.minimum(first_image + g, images - 1)
        is_own = query < tl.where(first_image + g < images, tokens, 0)
        sees = sums[g] > 0.0
        row_sum = tl.where(sees, sums[g], 1.0)
        lse = peaks[g]
        unit_head = (image * windows + window).to(tl.int64) * heads + head
        if inverse_ptr is None:
            lse += tl.log2(row_sum)
        else:
            tl.store(inverse_ptr + unit_head * tokens + query, 1.0 / row_sum, mask=is_own)
        tl.store(lse_ptr + unit_head * tokens + query, tl.where(sees, lse, float("inf")), mask=is_own)
        store_output(
            out_ptr, totals[g] / row_sum[:, None], is_own, image, window, head, windows, q_y, q_x, o_strides, geometry,
            offs_d, SIDE, PADDED, OUT_ALIGN, HEAD_DIM,
        )  # fmt: skip


def launch_long_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and statistics of cut windows; see `contracts.window_attention`."""
    out = torch.empty_like(query)
    statistics = new_statistics(query, *query.shape[:3])
    if query.numel():
        bias = None if bias is None else prepare_bias(bias, turned=False)
        call = cut_call(query, key, value, bias, mask, seed, scale, dropout_p)
        written = writable(out)
        run_forward(call, written, statistics)
        deliver(written, out)
    return out, statistics


def run_forward(call: Call, out: Tensor, statistics: Tensor) -> None:
    """Fill `out` and `statistics`."""
    tile = call.config.forward
    out_strides, out_align = output_strides(out)
    with device_of(out):
        _long_fwd_kernel[(call.programs(tile),)](
            call.query, call.key, call.value, out, *split_statistics(statistics), *call.pointers,
            *call.strides, *out_strides, *call.numbers,
            **call.options(tile), OUT_ALIGN=out_align,
        )  # fmt: skip
