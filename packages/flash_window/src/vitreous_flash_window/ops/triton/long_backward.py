"""Backward of long windows, for cut windows and for the image: each pass recomputes the weights.

`_long_bwd_dq_kernel` walks over keys and also leaves `delta = rowsum(dout * out)` for the others;
`_long_bwd_dkv_kernel` walks over queries; `long_bias_gradient` sums over windows. No atomics: reruns agree bitwise.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton's language cannot unpack one tuple into another

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of
from vitreous_core.ops.block_sparse_attention.triton.primitives import dropout_keep, operand

from ..reference import NORM_EPS as _NORM_EPS
from .arguments import split_statistics
from .long_arguments import COUNTS, Call, cut_call, deliver, output_strides, rows_contiguous, writable
from .long_bias import prepare_bias
from .long_bias_gradient import bias_partials
from .long_tiles import (
    NO_MASK,
    REGIONS,
    bias_tile,
    is_real,
    load_input,
    load_output,
    mask_tile,
    pad_distance,
    place_tokens,
    plain_addend,
    project_out,
    regions,
    split_norm,
    split_program,
    store_output,
)
from .tile_math import LOG2E, channel_product

NORM_EPS = tl.constexpr(_NORM_EPS)


@triton.jit(do_not_specialize=COUNTS[:-1])
def _long_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, inverse_ptr, delta_ptr, dq_ptr, logit_ptr,
    bias_ptr, mask_ptr, pad_ptr, seed_ptr, norm_ptr, factor_ptr,
    stride_qi, stride_qh, stride_qy, stride_qx, stride_ki, stride_kh, stride_ky, stride_kx,
    stride_vi, stride_vh, stride_vy, stride_vx, stride_oi, stride_oh, stride_oy, stride_ox,
    stride_gi, stride_gh, stride_gy, stride_gx, stride_dqi, stride_dqh, stride_dqy, stride_dqx,
    bias_head, bias_row,
    images, windows, heads, tokens, columns, height, width, padded_height, padded_width, shift,
    scale_log2, threshold, keep_scale, scale,
    SIDE: tl.constexpr, PADDED: tl.constexpr,
    ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, DOUT_ALIGN: tl.constexpr, DQ_ALIGN: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, COSINE: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPANIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq = scale (P * (dP - delta)) k` with `dP = dout v^T`. Grid: strips x image groups x windows x heads.

    `delta = dout out` inherits the rounding of `out`. Cosines can make scores so large that `dP - delta` cancels, and
    their factor's gradient is one sum of all that is left; so for them what `delta` lacks, `sum P (dP - delta)`, is
    found on the way, and dq and the factor's gradient put right at the end, by the mean key and the mean cosine.
    """
    geometry = (columns, height, width, padded_height, padded_width, shift)
    q_strides = (stride_qi, stride_qh, stride_qy, stride_qx)
    k_strides = (stride_ki, stride_kh, stride_ky, stride_kx)
    v_strides = (stride_vi, stride_vh, stride_vy, stride_vx)
    o_strides = (stride_oi, stride_oh, stride_oy, stride_ox)
    g_strides = (stride_gi, stride_gh, stride_gy, stride_gx)
    dq_strides = (stride_dqi, stride_dqh, stride_dqy, stride_dqx)
    first, first_image, window, head = split_program(tl.program_id(0), tokens, images, windows, BLOCK_M, COMPANIONS)

    offs_d = tl.arange(0, BLOCK_D)
    query = first + tl.arange(0, BLOCK_M)
    last = tokens - 1
    row = tl.minimum(query, last)
    q_y, q_x = place_tokens(row, window, geometry, SIDE)
    q_region = regions(tl.minimum(query, last), window, geometry, SIDE)[:, None] if MASK == REGIONS else 0
    bias_base = bias_ptr + head.to(tl.int64) * bias_head if BIAS else 0
    mask_base = mask_ptr + window.to(tl.int64) * tokens * tokens if MASK != NO_MASK and MASK != REGIONS else 0
    factor = tl.load(factor_ptr + head) if COSINE else 1.0
    q_pad = pad_distance(pad_ptr, q_ptr, 0, heads, HEAD_DIM, ALIGN) if PADDED else 0
    k_pad = pad_distance(pad_ptr, k_ptr, 1, heads, HEAD_DIM, ALIGN) if PADDED else 0
    v_pad = pad_distance(pad_ptr, v_ptr, 2, heads, HEAD_DIM, ALIGN) if PADDED else 0

    queries, douts, query_norms, lses, inverses, deltas, totals = (), (), (), (), (), (), ()
    masses, errors, mean_keys, mean_cosines, cosine_sums = (), (), (), (), ()
    for g in tl.static_range(COMPANIONS):
        image = tl.minimum(first_image + g, images - 1)
        q = load_input(
            q_ptr, q_pad, image, window, head, windows, q_y, q_x, q_strides, geometry, offs_d,
            SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        queries = queries + (q,)
        out = load_output(
            out_ptr, image, window, head, windows, q_y, q_x, o_strides, geometry, offs_d,
            SIDE, PADDED, OUT_ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dout = load_output(
            dout_ptr, image, window, head, windows, q_y, q_x, g_strides, geometry, offs_d,
            SIDE, PADDED, DOUT_ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        douts = douts + (dout,)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        deltas = deltas + (delta,)
        unit_row = ((image * windows + window).to(tl.int64) * heads + head) * tokens + row
        is_own = query < tl.where(first_image + g < images, tokens, 0)
        lses = lses + (tl.load(lse_ptr + unit_row),)
        if inverse_ptr is not None:
            inverses = inverses + (tl.load(inverse_ptr + unit_row),)
        totals = totals + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
        if COSINE:
            query_norms = query_norms + (tl.load(norm_ptr + unit_row),)
            mean_keys = mean_keys + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
            masses = masses + (tl.zeros([BLOCK_M], tl.float32),)
            errors = errors + (tl.zeros([BLOCK_M], tl.float32),)
            mean_cosines = mean_cosines + (tl.zeros([BLOCK_M], tl.float32),)
            cosine_sums = cosine_sums + (tl.zeros([BLOCK_M], tl.float32),)
        else:
            tl.store(delta_ptr + unit_row, delta, mask=is_own)

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
        new_totals = ()
        new_masses, new_errors, new_keys, new_cosines, new_sums = (), (), (), (), ()
        for g in tl.static_range(COMPANIONS):
            image = tl.minimum(first_image + g, images - 1)
            k = load_input(
                k_ptr, k_pad, image, window, head, windows, k_y, k_x, k_strides, geometry, offs_d,
                SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            v = load_input(
                v_ptr, v_pad, image, window, head, windows, k_y, k_x, v_strides, geometry, offs_d,
                SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
            )  # fmt: skip

            scores = channel_product(queries[g], k, PRECISION)
            if COSINE:
                unit_head = ((images + image) * windows + window).to(tl.int64) * heads + head
                key_norms = tl.load(norm_ptr + unit_head * tokens + inside)
                scores *= (query_norms[g] * (factor * LOG2E))[:, None] * key_norms[None, :]
                cosines = scores
            else:
                scores *= scale_log2
            if BIAS or (MASK != NO_MASK) or TAIL:
                scores += addend
            weights = tl.exp2(scores - lses[g][:, None])
            if inverse_ptr is not None:
                weights *= inverses[g][:, None]
            dweights = channel_product(douts[g], v, PRECISION)
            if DROPOUT:
                window_head = (image * windows + window) * heads + head
                keep = dropout_keep(seed_ptr, window_head, query[:, None], key[None, :], threshold)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            dscores = weights * (dweights - deltas[g][:, None])
            if COSINE:
                new_masses = new_masses + (masses[g] + tl.sum(weights, 1),)
                new_errors = new_errors + (errors[g] + tl.sum(dscores, 1),)
                new_cosines = new_cosines + (mean_cosines[g] + tl.sum(weights * cosines, 1),)
                new_sums = new_sums + (cosine_sums[g] + tl.sum(dscores * cosines, 1),)
                power, rest = split_norm(key_norms)
                k = (k.to(tl.float32) * power[:, None]).to(k.dtype)
                dscores *= rest[None, :]
                weights *= rest[None, :]
                mean_key = tl.dot(operand(weights, k, PRECISION), k, mean_keys[g], input_precision=PRECISION)
                new_keys = new_keys + (mean_key,)
            total = tl.dot(operand(dscores, k, PRECISION), k, totals[g], input_precision=PRECISION)
            new_totals = new_totals + (total,)
        totals = new_totals
        masses, errors, mean_keys = new_masses, new_errors, new_keys
        mean_cosines, cosine_sums = new_cosines, new_sums

    for g in tl.static_range(COMPANIONS):
        image = tl.minimum(first_image + g, images - 1)
        is_own = query < tl.where(first_image + g < images, tokens, 0)
        if COSINE:
            # One, but for rounding.
            mass = tl.where(masses[g] > 0.0, masses[g], 1.0)
            error = errors[g] / mass
            gradient = totals[g] - error[:, None] * mean_keys[g]
            gradient = project_out(gradient * factor, queries[g], query_norms[g], NORM_EPS)
            unit_row = ((image * windows + window).to(tl.int64) * heads + head) * tokens + row
            tl.store(delta_ptr + unit_row, deltas[g] + error, mask=is_own)
            of_logit = (cosine_sums[g] - error * mean_cosines[g]) / LOG2E
            tl.store(logit_ptr + unit_row, of_logit, mask=is_own)
        else:
            gradient = totals[g] * scale
        store_output(
            dq_ptr, gradient, is_own, image, window, head, windows, q_y, q_x, dq_strides, geometry,
            offs_d, SIDE, PADDED, DQ_ALIGN, HEAD_DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS[:-1])
def _long_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, inverse_ptr, delta_ptr, dk_ptr, dv_ptr, dpad_ptr,
    bias_ptr, mask_ptr, pad_ptr, seed_ptr, norm_ptr, factor_ptr,
    stride_qi, stride_qh, stride_qy, stride_qx, stride_ki, stride_kh, stride_ky, stride_kx,
    stride_vi, stride_vh, stride_vy, stride_vx, stride_gi, stride_gh, stride_gy, stride_gx,
    stride_dki, stride_dkh, stride_dky, stride_dkx, stride_dvi, stride_dvh, stride_dvy, stride_dvx,
    bias_head, bias_row,
    images, windows, heads, tokens, columns, height, width, padded_height, padded_width, shift,
    scale_log2, threshold, keep_scale, scale,
    SIDE: tl.constexpr, PADDED: tl.constexpr,
    ALIGN: tl.constexpr, DOUT_ALIGN: tl.constexpr, DK_ALIGN: tl.constexpr, DV_ALIGN: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr, COSINE: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPANIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dv = P^T dout`, `dk = scale dS^T q`, and their sums over the padding of each strip. Grid: as that of dq.

    Tiles are `[keys, queries]`, and `bias_ptr` is the transposed bias: read across its rows, each element would come
    alone.
    """
    geometry = (columns, height, width, padded_height, padded_width, shift)
    q_strides = (stride_qi, stride_qh, stride_qy, stride_qx)
    k_strides = (stride_ki, stride_kh, stride_ky, stride_kx)
    v_strides = (stride_vi, stride_vh, stride_vy, stride_vx)
    g_strides = (stride_gi, stride_gh, stride_gy, stride_gx)
    dk_strides = (stride_dki, stride_dkh, stride_dky, stride_dkx)
    dv_strides = (stride_dvi, stride_dvh, stride_dvy, stride_dvx)
    first, first_image, window, head = split_program(tl.program_id(0), tokens, images, windows, BLOCK_M, COMPANIONS)

    offs_d = tl.arange(0, BLOCK_D)
    key = first + tl.arange(0, BLOCK_M)
    last = tokens - 1
    row = tl.minimum(key, last)
    k_y, k_x = place_tokens(row, window, geometry, SIDE)
    k_region = regions(tl.minimum(key, last), window, geometry, SIDE)[:, None] if MASK == REGIONS else 0
    bias_base = bias_ptr + head.to(tl.int64) * bias_head if BIAS else 0
    mask_base = mask_ptr + window.to(tl.int64) * tokens * tokens if MASK != NO_MASK and MASK != REGIONS else 0
    factor = tl.load(factor_ptr + head) if COSINE else 1.0
    q_pad = pad_distance(pad_ptr, q_ptr, 0, heads, HEAD_DIM, ALIGN) if PADDED else 0
    k_pad = pad_distance(pad_ptr, k_ptr, 1, heads, HEAD_DIM, ALIGN) if PADDED else 0
    v_pad = pad_distance(pad_ptr, v_ptr, 2, heads, HEAD_DIM, ALIGN) if PADDED else 0

    keys, values, key_norms, dks, dvs = (), (), (), (), ()
    for g in tl.static_range(COMPANIONS):
        image = tl.minimum(first_image + g, images - 1)
        k = load_input(
            k_ptr, k_pad, image, window, head, windows, k_y, k_x, k_strides, geometry, offs_d,
            SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        keys = keys + (k,)
        v = load_input(
            v_ptr, v_pad, image, window, head, windows, k_y, k_x, v_strides, geometry, offs_d,
            SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        values = values + (v,)
        if COSINE:
            unit_head = ((images + image) * windows + window).to(tl.int64) * heads + head
            key_norms = key_norms + (tl.load(norm_ptr + unit_head * tokens + row),)
        dks = dks + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
        dvs = dvs + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)

    for query_start in range(0, tokens, BLOCK_N):
        query = query_start + tl.arange(0, BLOCK_N)
        inside = tl.minimum(query, last) if TAIL else query
        q_y, q_x = place_tokens(inside, window, geometry, SIDE)
        q_region = regions(tl.minimum(query, last), window, geometry, SIDE)[None, :] if MASK == REGIONS else 0
        if BIAS or (MASK != NO_MASK):
            if BIAS:
                addend = bias_tile(bias_base, key[:, None], query[None, :], bias_row, tokens)
            else:
                addend = plain_addend(key[:, None], query[None, :], tokens, False)
            addend = mask_tile(addend, mask_base, query[None, :], key[:, None], q_region, k_region, tokens, MASK)
        new_dks, new_dvs = (), ()
        for g in tl.static_range(COMPANIONS):
            image = tl.minimum(first_image + g, images - 1)
            q = load_input(
                q_ptr, q_pad, image, window, head, windows, q_y, q_x, q_strides, geometry, offs_d,
                SIDE, PADDED, ALIGN, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            dout = load_output(
                dout_ptr, image, window, head, windows, q_y, q_x, g_strides, geometry, offs_d,
                SIDE, PADDED, DOUT_ALIGN, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            unit_row = ((image * windows + window).to(tl.int64) * heads + head) * tokens
            delta = tl.load(delta_ptr + unit_row + inside)
            if TAIL:
                # A query past the end gives every key the weight 0.
                lse = tl.load(lse_ptr + unit_row + query, mask=query < tokens, other=float("inf"))
            else:
                lse = tl.load(lse_ptr + unit_row + query)
            if inverse_ptr is not None:
                inverse = tl.load(inverse_ptr + unit_row + inside)

            scores = channel_product(keys[g], q, PRECISION)  # [keys, queries]
            if COSINE:
                query_norms = tl.load(norm_ptr + unit_row + inside)
                scores *= (key_norms[g] * (factor * LOG2E))[:, None] * query_norms[None, :]
            else:
                scores *= scale_log2
            if BIAS or (MASK != NO_MASK):
                scores += addend
            weights = tl.exp2(scores - lse[None, :])
            if inverse_ptr is not None:
                weights *= inverse[None, :]
            dweights = channel_product(values[g], dout, PRECISION)
            kept = weights
            if DROPOUT:
                window_head = (image * windows + window) * heads + head
                keep = dropout_keep(seed_ptr, window_head, query[None, :], key[:, None], threshold)
                kept = tl.where(keep, weights * keep_scale, 0.0)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            new_dvs = new_dvs + (tl.dot(operand(kept, dout, PRECISION), dout, dvs[g], input_precision=PRECISION),)
            dscores = weights * (dweights - delta[None, :])
            if COSINE:
                power, rest = split_norm(query_norms)
                q = (q.to(tl.float32) * power[:, None]).to(q.dtype)
                dscores *= rest[None, :]
            new_dks = new_dks + (tl.dot(operand(dscores, q, PRECISION), q, dks[g], input_precision=PRECISION),)
        dks, dvs = new_dks, new_dvs

    k_real = is_real(k_y, k_x, geometry)
    strips = tl.cdiv(tokens, BLOCK_M)
    for g in tl.static_range(COMPANIONS):
        image = tl.minimum(first_image + g, images - 1)
        is_own = key < tl.where(first_image + g < images, tokens, 0)
        if COSINE:
            dk = project_out(dks[g] * factor, keys[g], key_norms[g], NORM_EPS)
        else:
            dk = dks[g] * scale
        store_output(
            dk_ptr, dk, is_own, image, window, head, windows, k_y, k_x, dk_strides, geometry,
            offs_d, SIDE, PADDED, DK_ALIGN, HEAD_DIM,
        )  # fmt: skip
        store_output(
            dv_ptr, dvs[g], is_own, image, window, head, windows, k_y, k_x, dv_strides, geometry,
            offs_d, SIDE, PADDED, DV_ALIGN, HEAD_DIM,
        )  # fmt: skip
        if PADDED:
            is_pad = ((key < tokens) & ~k_real)[:, None]
            unit = ((image * windows + window) * strips + first // BLOCK_M).to(tl.int64)
            to_key = dpad_ptr + ((2 * unit) * heads + head) * HEAD_DIM + offs_d
            to_value = dpad_ptr + ((2 * unit + 1) * heads + head) * HEAD_DIM + offs_d
            # Companions that repeat the last image write the same numbers again.
            tl.store(to_key, tl.sum(tl.where(is_pad, dk, 0.0), 0), mask=offs_d < HEAD_DIM)
            tl.store(to_value, tl.sum(tl.where(is_pad, dvs[g], 0.0), 0), mask=offs_d < HEAD_DIM)


class Gradients(NamedTuple):
    """Where the passes write.

    Args:
        dquery, dkey, dvalue: shaped as query, key and value of the call.
        logit_rows: fp32 `[B*W, H, N]` or None: what each query adds to the gradient of its head's logit scale.
        padding: fp32 `[B*W, strips, 2, H, D]` or None: sums of dk and dv over the padding of each strip.
    """

    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor
    logit_rows: Tensor | None = None
    padding: Tensor | None = None


def launch_long_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, bias: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of cut windows; see `contracts.window_attention_backward`."""
    wanted = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    dbias = query.new_empty(0)
    if not query.numel():
        if needs_bias:
            dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
        return *wanted, dbias
    prepared = None if bias is None else prepare_bias(bias, turned=False)
    call = cut_call(query, key, value, prepared, mask, seed, scale, dropout_p)
    dout = rows_contiguous(dout)
    turned_bias = None if bias is None else prepare_bias(bias, turned=True)
    written = Gradients(*(writable(tensor) for tensor in wanted))
    delta = run_backward(call, turned_bias, dout, rows_contiguous(out), statistics, written)
    for source, target in zip(written[:3], wanted, strict=True):
        deliver(source, target)
    if needs_bias:
        # A sum over the first of several dimensions: in order, without atomics.
        dbias = bias_partials(call, dout, statistics, delta).sum(0).to(bias.dtype)
    return *wanted, dbias


def run_backward(
    call: Call, turned_bias: Tensor | None, dout: Tensor, out: Tensor, statistics: Tensor, gradients: Gradients
) -> Tensor:
    """Fill the gradients of query, key and value; `turned_bias` is the bias transposed.

    Returns:
        `delta`, fp32 `[B*W, H, N]`, as the gradient of the bias needs it.
    """
    config = call.config
    lse, inverse = split_statistics(statistics)
    delta = torch.empty_like(lse)
    out_strides, out_align = output_strides(out)
    dout_strides, dout_align = output_strides(dout)
    dq_strides, dq_align = output_strides(gradients.dquery)
    dk_strides, dk_align = output_strides(gradients.dkey)
    dv_strides, dv_align = output_strides(gradients.dvalue)
    with device_of(dout):
        _long_bwd_dq_kernel[(call.programs(config.dq),)](
            call.query, call.key, call.value, out, dout, lse, inverse, delta, gradients.dquery, gradients.logit_rows,
            *call.pointers, *call.strides, *out_strides, *dout_strides, *dq_strides, *call.numbers, call.scale,
            **call.options(config.dq), OUT_ALIGN=out_align, DOUT_ALIGN=dout_align, DQ_ALIGN=dq_align,
        )  # fmt: skip
        turned = replace(call, bias=turned_bias)
        _long_bwd_dkv_kernel[(call.programs(config.dkv),)](
            call.query, call.key, call.value, dout, lse, inverse, delta, gradients.dkey, gradients.dvalue,
            gradients.padding, *turned.pointers, *call.strides, *dout_strides, *dk_strides, *dv_strides,
            *turned.numbers, call.scale,
            **call.options(config.dkv), DOUT_ALIGN=dout_align, DK_ALIGN=dk_align, DV_ALIGN=dv_align,
        )  # fmt: skip
    return delta
