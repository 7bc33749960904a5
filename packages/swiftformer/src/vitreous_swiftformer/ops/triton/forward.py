"""Forward kernel: queries first, for the global query; then keys. Two launches, or one where a program has an image.

Every tensor is read or written once: the first pass stores the unit queries while it sums them up.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from .arguments import plan_passes
from .configs import FORWARD_REGISTERS
from .tile_math import EPS, STAGES, load_vector, row_lengths, sum_numbers, sum_vectors, tile_mask, tile_offsets


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_ql", "stride_kb", "stride_kl", "stride_ub", "stride_ul", "stride_mb", "stride_ml",
        "tokens", "parts", "tokens_per_part",
    ]
)  # fmt: skip
def _additive_fwd_kernel(
    q_ptr, k_ptr, w_ptr, unit_ptr, mixed_ptr, partial_ptr, statistics_ptr,
    stride_qb, stride_ql, stride_qc, stride_kb, stride_kl, stride_kc,
    stride_ub, stride_ul, stride_uc, stride_mb, stride_ml, stride_mc,
    tokens, parts, tokens_per_part, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid: images x parts, the last fastest. `QUERIES` and `KEYS` say which passes this launch makes.

    Partial sums `[B, parts, CHANNELS + 1]` of `s u` and `s^2`; statistics `[B, CHANNELS + 1]`, the global query and the
    length of all `s`.
    """
    PITCH: tl.constexpr = CHANNELS + 1
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    first = part * tokens_per_part
    end = first + tokens_per_part
    columns = tl.arange(0, BLOCK_C)
    if QUERIES:
        gathered, squares = _sum_queries(
            q_ptr + image * stride_qb * ALIGN, unit_ptr + image * stride_ub * ALIGN, w_ptr, first, end, tokens,
            stride_ql, stride_qc, stride_ul, stride_uc, scale, ALIGN, CHANNELS, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        if not KEYS:
            slot = partial_ptr + (image * parts + part) * PITCH
            tl.store(slot + columns, gathered, mask=columns < CHANNELS)
            tl.store(slot + CHANNELS, squares)
    if KEYS:
        if not QUERIES:
            slot = partial_ptr + image * parts * PITCH
            gathered = sum_vectors(slot, parts, PITCH, CHANNELS, PARTS, BLOCK_C)
            squares = sum_numbers(slot + CHANNELS, parts, PITCH, PARTS)
        length = tl.maximum(tl.sqrt_rn(squares), EPS)
        global_query = gathered / length
        if part == 0:
            tl.store(statistics_ptr + image * PITCH + columns, global_query, mask=columns < CHANNELS)
            tl.store(statistics_ptr + image * PITCH + CHANNELS, tl.sqrt_rn(squares))
        _multiply_keys(
            k_ptr + image * stride_kb * ALIGN, mixed_ptr + image * stride_mb * ALIGN, global_query, first, end, tokens,
            stride_kl, stride_kc, stride_ml, stride_mc, ALIGN, CHANNELS, BLOCK_L, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _sum_queries(
    q_ptr, unit_ptr, w_ptr, first, end, tokens, stride_ql, stride_qc, stride_ul, stride_uc, scale,
    ALIGN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store `u = q / |q|` of tokens `first` to `end`; with `s = scale w u` return the sums of `s u` and `s^2`."""
    w = load_vector(w_ptr, CHANNELS, BLOCK_C) * scale
    # Summed over rows once at the end: sums across warps cost barriers.
    gathered = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_L], tl.float32)
    for start in tl.range(first, end, BLOCK_L, num_stages=STAGES):
        mask = tile_mask(start, tokens, CHANNELS, BLOCK_L, BLOCK_C)
        offsets = tile_offsets(start, stride_ql, stride_qc, ALIGN, BLOCK_L, BLOCK_C)
        query = tl.load(q_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        _, inverse = row_lengths(query)
        unit = query * inverse[:, None]
        weight = tl.sum(unit * w[None, :], 1)
        gathered += weight[:, None] * unit
        squares += weight * weight
        offsets = tile_offsets(start, stride_ul, stride_uc, ALIGN, BLOCK_L, BLOCK_C)
        tl.store(unit_ptr + offsets, unit.to(unit_ptr.dtype.element_ty), mask=mask)
    return tl.sum(gathered, 0), tl.sum(squares, 0)


@triton.jit
def _multiply_keys(
    k_ptr, mixed_ptr, global_query, first, end, tokens, stride_kl, stride_kc, stride_ml, stride_mc,
    ALIGN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store `global_query * k / |k|` of tokens `first` to `end`."""
    for start in tl.range(first, end, BLOCK_L, num_stages=STAGES):
        mask = tile_mask(start, tokens, CHANNELS, BLOCK_L, BLOCK_C)
        offsets = tile_offsets(start, stride_kl, stride_kc, ALIGN, BLOCK_L, BLOCK_C)
        key = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        _, inverse = row_lengths(key)
        mixed = key * inverse[:, None] * global_query[None, :]
        offsets = tile_offsets(start, stride_ml, stride_mc, ALIGN, BLOCK_L, BLOCK_C)
        tl.store(mixed_ptr + offsets, mixed.to(mixed_ptr.dtype.element_ty), mask=mask)


def launch_forward(query: Tensor, key: Tensor, w_g: Tensor, unit: Tensor, mixed: Tensor, scale: float) -> Tensor:
    """Fill `unit` and `mixed`, of any strides; returns the statistics, fp32 `[B, D + 1]`."""
    batch, _, channels = query.shape
    statistics = query.new_empty(batch, channels + 1, dtype=torch.float32)
    if not query.numel():
        return statistics.zero_()
    parts, launches = plan_passes(
        query.shape, query.device, ("QUERIES", "KEYS"), FORWARD_REGISTERS,
        query.stride(), key.stride(), unit.stride(), mixed.stride(),
    )  # fmt: skip
    partial = query.new_empty((batch, parts, channels + 1), dtype=torch.float32) if parts > 1 else None
    pointers = (query, key, w_g.contiguous(), unit, mixed, partial, statistics)
    with device_of(query):
        for grid, numbers, constants in launches:
            launch_kernel(_additive_fwd_kernel, grid, pointers, (*numbers, scale), constants)
    return statistics
