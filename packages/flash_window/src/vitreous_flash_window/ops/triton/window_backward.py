"""Backward passes of short windows. Weights are recomputed; no atomics, so reruns agree bitwise.

Where one tile holds all scores of a window, the pass over queries computes every gradient. Else it computes those of
queries and, as long as there are registers for it, of the bias, which has a pass of its own in larger windows; the pass
over keys computes those of keys and values.
"""

# mypy: ignore-errors

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from .arguments import (
    addend_kind,
    addend_pointer,
    addend_strides,
    aligned_strides,
    dot_precision,
    dropout_numbers,
    padded_head_dim,
    split_statistics,
)
from .bias_gradient import fold_rows
from .configs import choose_bias_gradient, choose_keys, choose_rows, count_parts, count_parts_and_rest, tile_constants
from .tile_math import LOG2E
from .window_bias_gradient import launch_bias_gradient
from .window_key_gradient import _window_bwd_keys_kernel
from .window_query_gradient import _window_bwd_rows_kernel


def launch_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor | None, statistics: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias (empty unless `needs_bias`); arguments as the operator's."""
    windows, heads, tokens, head_dim = query.shape
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
    dbias = query.new_empty((heads, tokens, tokens), dtype=bias.dtype) if needs_bias else query.new_empty(0)
    if query.numel() == 0:
        return dq, dk, dv, dbias.zero_()
    align, strides = aligned_strides(query, key, value, dout, query if out is None else out, dq, dk, dv)
    addends = bias, addend_pointer(mask), seed
    strides_of_addends = addend_strides(bias, mask)
    threshold, keep_scale = dropout_numbers(dropout_p)
    numbers = [heads, windows, 1 if mask is None else mask.shape[0]]
    factors = [scale, scale * LOG2E.value, threshold, keep_scale]
    constants = {
        "BIAS": addend_kind(bias), "MASK": addend_kind(mask), "DROPOUT": seed is not None, "ALIGN": align,
        "TOKENS": tokens, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": dot_precision(query.dtype),
        "SAME_STRIDES": all(own == strides[0] for own in strides),
    }  # fmt: skip
    lse, inverse = (None, None) if statistics is None else split_statistics(statistics)
    delta = None if lse is None else torch.empty_like(lse)
    bias_tile = choose_bias_gradient(query.dtype, tokens, head_dim, mask is not None) if needs_bias else None
    sums_bias = needs_bias and bias_tile is None
    with device_of(query):
        for tile in choose_rows(query.dtype, tokens, head_dim):
            parts, rest_parts = count_parts_and_rest(query.device, tile, windows, heads)
            end = min(tile.first + tile.strips * tile.rows, tokens)
            partials = rest_partials = None
            if sums_bias:
                partials = query.new_empty((parts, heads, end - tile.first, tokens), dtype=torch.float32)
                rest_partials = query.new_empty((rest_parts, heads, tokens - end, tokens), dtype=torch.float32)
            launch_kernel(
                _window_bwd_rows_kernel, ((parts * tile.strips + rest_parts) * heads,),
                (query, key, value, dout, out, lse, inverse, dq, dk, dv, *addends, partials, rest_partials, delta),
                (*chain(*strides), *strides_of_addends, *numbers, parts, rest_parts, *factors),
                {"NEEDS_BIAS": sums_bias, "FIRST": tile.first, "REST": tile.rest, "HALVED": tile.halved,
                 **tile_constants(tile), **constants},
            )  # fmt: skip
            if sums_bias:
                fold_rows(partials, dbias, tile.first)
                if tile.rest:
                    fold_rows(rest_partials, dbias, end)
        if lse is not None:
            for tile in choose_keys(query.dtype, tokens, head_dim):
                parts = count_parts(query.device, tile, windows, heads)
                launch_kernel(
                    _window_bwd_keys_kernel, (parts * heads * tile.strips,),
                    (query, key, value, dout, lse, inverse, delta, dk, dv, *addends),
                    (*chain(*strides[:4], *strides[6:]), *strides_of_addends, *numbers, parts, *factors),
                    {"FIRST": tile.first, "HALVED": tile.halved, **tile_constants(tile), **constants},
                )  # fmt: skip
        if bias_tile is not None:
            launch_bias_gradient(
                dbias, bias_tile, (query, key, value, dout, lse, inverse, delta, *addends),
                [*chain(*strides[:4]), *strides_of_addends], numbers, factors[1:], constants,
            )  # fmt: skip
    return dq, dk, dv, dbias
