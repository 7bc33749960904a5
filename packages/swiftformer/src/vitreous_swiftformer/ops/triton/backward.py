"""Backward kernel: keys first, for the gradient of the global query; then queries. Launches as in `forward`.

With `u = q / |q|`, `v = k / |k|`, `s = scale w u`, `r = |s|` over the tokens, `a = s / r`, `G = sum a u`, and gradients
`du` of the unit queries and `dm` of `m = G v`:

    dG = sum dm v           dv = dm G
    ds = (u dG - a (G dG)) / r
    du + a dG + ds scale w  is the whole gradient of u        dw = scale sum ds u
    dx = (d - u (u d)) / |x|  for a vector x of unit u whose gradient is d

A length that the floor replaces is a constant: its terms drop out.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from .arguments import plan_passes
from .configs import BACKWARD_REGISTERS
from .tile_math import EPS, STAGES, load_vector, row_lengths, sum_vectors, tile_mask, tile_offsets


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_ql", "stride_kb", "stride_kl", "stride_ub", "stride_ul", "stride_mb", "stride_ml",
        "stride_dqb", "stride_dql", "stride_dkb", "stride_dkl", "tokens", "parts", "tokens_per_part",
    ]
)  # fmt: skip
def _additive_bwd_kernel(
    q_ptr, k_ptr, dunit_ptr, dmixed_ptr, dq_ptr, dk_ptr, w_ptr, statistics_ptr, partial_ptr, dw_ptr,
    stride_qb, stride_ql, stride_qc, stride_kb, stride_kl, stride_kc,
    stride_ub, stride_ul, stride_uc, stride_mb, stride_ml, stride_mc,
    stride_dqb, stride_dql, stride_dqc, stride_dkb, stride_dkl, stride_dkc,
    tokens, parts, tokens_per_part, scale,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, ALIGN: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid: images x parts, the last fastest. Partial sums `[B, parts, CHANNELS]`, of `dG` and (`dw_ptr`) of `dw`."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    first = part * tokens_per_part
    end = first + tokens_per_part
    columns = tl.arange(0, BLOCK_C)
    statistics_ptr += image * (CHANNELS + 1)
    global_query = load_vector(statistics_ptr, CHANNELS, BLOCK_C)
    if KEYS:
        dglobal = _keys_backward(
            k_ptr + image * stride_kb * ALIGN, dmixed_ptr + image * stride_mb * ALIGN,
            dk_ptr + image * stride_dkb * ALIGN, global_query, first, end, tokens,
            stride_kl, stride_kc, stride_ml, stride_mc, stride_dkl, stride_dkc, ALIGN, CHANNELS, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        if not QUERIES:
            tl.store(partial_ptr + (image * parts + part) * CHANNELS + columns, dglobal, mask=columns < CHANNELS)
    if QUERIES:
        if not KEYS:
            dglobal = sum_vectors(
                partial_ptr + image * parts * CHANNELS, parts, CHANNELS, CHANNELS, PARTS, BLOCK_C
            )  # fmt: skip
        dw = _queries_backward(
            q_ptr + image * stride_qb * ALIGN, dunit_ptr + image * stride_ub * ALIGN,
            dq_ptr + image * stride_dqb * ALIGN, w_ptr, global_query, tl.load(statistics_ptr + CHANNELS), dglobal,
            first, end, tokens, stride_ql, stride_qc, stride_ul, stride_uc, stride_dql, stride_dqc, scale,
            ALIGN, CHANNELS, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        tl.store(dw_ptr + (image * parts + part) * CHANNELS + columns, dw, mask=columns < CHANNELS)


@triton.jit
def _keys_backward(
    k_ptr, dmixed_ptr, dk_ptr, global_query, first, end, tokens,
    stride_kl, stride_kc, stride_ml, stride_mc, stride_dkl, stride_dkc,
    ALIGN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the keys of tokens `first` to `end`; return their share of `dG`."""
    dglobal = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for start in tl.range(first, end, BLOCK_L, num_stages=STAGES):
        mask = tile_mask(start, tokens, CHANNELS, BLOCK_L, BLOCK_C)
        offsets = tile_offsets(start, stride_kl, stride_kc, ALIGN, BLOCK_L, BLOCK_C)
        key = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = tile_offsets(start, stride_ml, stride_mc, ALIGN, BLOCK_L, BLOCK_C)
        dmixed = tl.load(dmixed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        length, inverse = row_lengths(key)
        unit = key * inverse[:, None]
        dglobal += dmixed * unit
        dkey = _through_unit(unit, dmixed * global_query[None, :], length, inverse)
        offsets = tile_offsets(start, stride_dkl, stride_dkc, ALIGN, BLOCK_L, BLOCK_C)
        tl.store(dk_ptr + offsets, dkey.to(dk_ptr.dtype.element_ty), mask=mask)
    return tl.sum(dglobal, 0)


@triton.jit
def _queries_backward(
    q_ptr, dunit_ptr, dq_ptr, w_ptr, global_query, weights_length, dglobal, first, end, tokens,
    stride_ql, stride_qc, stride_ul, stride_uc, stride_dql, stride_dqc, scale,
    ALIGN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the queries of tokens `first` to `end`; return their share of `dw`."""
    w = load_vector(w_ptr, CHANNELS, BLOCK_C) * scale
    has_length = weights_length >= EPS
    along_all = tl.where(has_length, tl.sum(global_query * dglobal, 0), 0.0)
    # The weight of an only token is a sign: what rounding leaves of its gradient would be divided by its length.
    is_sign = (tokens == 1) & has_length
    weights_length = tl.maximum(weights_length, EPS)
    dw = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    along_weights = tl.zeros([BLOCK_L], tl.float32)
    for start in tl.range(first, end, BLOCK_L, num_stages=STAGES):
        mask = tile_mask(start, tokens, CHANNELS, BLOCK_L, BLOCK_C)
        offsets = tile_offsets(start, stride_ql, stride_qc, ALIGN, BLOCK_L, BLOCK_C)
        query = tl.load(q_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = tile_offsets(start, stride_ul, stride_uc, ALIGN, BLOCK_L, BLOCK_C)
        dunit = tl.load(dunit_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        length, inverse = row_lengths(query)
        unit = query * inverse[:, None]
        weight = tl.sum(unit * w[None, :], 1) / weights_length
        dweight = (tl.sum(unit * dglobal[None, :], 1) - weight * along_all) / weights_length
        dweight = tl.where(is_sign, 0.0, dweight)
        dw += dweight[:, None] * unit
        along_weights += weight * dweight
        dunit += weight[:, None] * dglobal[None, :] + dweight[:, None] * w[None, :]
        dquery = _through_unit(unit, dunit, length, inverse)
        offsets = tile_offsets(start, stride_dql, stride_dqc, ALIGN, BLOCK_L, BLOCK_C)
        tl.store(dq_ptr + offsets, dquery.to(dq_ptr.dtype.element_ty), mask=mask)
    # The sum of `a ds` over all tokens is zero but for rounding, which `dw`, small beside its terms, has times `G`.
    rest = tl.where(has_length, tl.sum(along_weights, 0), 0.0)
    return (tl.sum(dw, 0) - rest * global_query) * scale


@triton.jit
def _through_unit(unit, dunit, length, inverse):
    """Gradient of vectors of these lengths, from that of their unit vectors."""
    along = tl.where(length >= EPS, tl.sum(unit * dunit, 1), 0.0)
    return (dunit - unit * along[:, None]) * inverse[:, None]


def launch_backward(
    dunit: Tensor, dmixed: Tensor, query: Tensor, key: Tensor, w_g: Tensor, statistics: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and w_g, in their dtypes; those of query and key have strides in the same order."""
    batch, _, channels = query.shape
    dquery, dkey = torch.empty_like(query), torch.empty_like(key)
    if not query.numel():
        return dquery, dkey, torch.zeros_like(w_g)
    parts, launches = plan_passes(
        query.shape, query.device, ("KEYS", "QUERIES"), BACKWARD_REGISTERS,
        query.stride(), key.stride(), dunit.stride(), dmixed.stride(), dquery.stride(), dkey.stride(),
    )  # fmt: skip
    partial = query.new_empty((batch, parts, channels), dtype=torch.float32) if parts > 1 else None
    dw = query.new_empty((batch * parts, channels), dtype=torch.float32)
    pointers = (query, key, dunit, dmixed, dquery, dkey, w_g.contiguous(), statistics, partial, dw)
    with device_of(query):
        for grid, numbers, constants in launches:
            launch_kernel(_additive_bwd_kernel, grid, pointers, (*numbers, scale), constants)
    return dquery, dkey, dw.sum(0).to(w_g.dtype)
