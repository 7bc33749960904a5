"""Inference kernel of two 1x1 convolutions with a GELU between and a residual.

    out = residual + W2 gelu(W1 x + b1) + b2

A program walks over tiles of positions with all channels. Hidden channels come in chunks: each is made, activated and
multiplied into the result before the next. Channels are cut into two powers of two, so that 96 or 192 need no padding.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of, launch_kernel

from .arguments import PLANS, Launch, resources
from .configs import plan_mlp
from .tile_math import gelu


@triton.jit(do_not_specialize=["positions", "tiles"])
def _mlp_kernel(
    x_ptr, residual_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, out_ptr,
    positions, tiles,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_P: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_H: tl.constexpr, CHUNKS: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid: programs that share the tiles. Maps `[positions, CHANNELS]`, weights `[out, in]`.

    RESIDENT programs keep all weights on chip and load maps AHEAD tiles; others read the weights of a tile chunk by
    chunk, STAGES ahead.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if RESIDENT:
        weights = ()
        for chunk in tl.static_range(CHUNKS):
            weights = weights + _load_weights(
                weight1_ptr, bias1_ptr, weight2_ptr, chunk * BLOCK_H, CHANNELS, HIDDEN, FIRST, SECOND, BLOCK_H
            )  # fmt: skip
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        position = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        x0 = _load_map(x_ptr, position, positions, CHANNELS, 0, FIRST)
        if SECOND:
            x1 = _load_map(x_ptr, position, positions, CHANNELS, FIRST, SECOND)
        out0 = tl.zeros([BLOCK_P, FIRST], tl.float32)
        if SECOND:
            out1 = tl.zeros([BLOCK_P, SECOND], tl.float32)
        if RESIDENT:
            for chunk in tl.static_range(CHUNKS):
                made = tl.dot(x0, weights[5 * chunk])
                if SECOND:
                    made = tl.dot(x1, weights[5 * chunk + 1], made)
                made = gelu(made + weights[5 * chunk + 2][None, :]).to(dtype)
                out0 = tl.dot(made, weights[5 * chunk + 3], out0)
                if SECOND:
                    out1 = tl.dot(made, weights[5 * chunk + 4], out1)
        else:
            for first in tl.range(0, CHUNKS * BLOCK_H, BLOCK_H, num_stages=STAGES):
                w10, w11, bias1, w20, w21 = _load_weights(
                    weight1_ptr, bias1_ptr, weight2_ptr, first, CHANNELS, HIDDEN, FIRST, SECOND, BLOCK_H
                )  # fmt: skip
                made = tl.dot(x0, w10)
                if SECOND:
                    made = tl.dot(x1, w11, made)
                made = gelu(made + bias1[None, :]).to(dtype)
                out0 = tl.dot(made, w20, out0)
                if SECOND:
                    out1 = tl.dot(made, w21, out1)
        _finish(out_ptr, residual_ptr, bias2_ptr, out0, position, positions, CHANNELS, 0, FIRST)
        if SECOND:
            _finish(out_ptr, residual_ptr, bias2_ptr, out1, position, positions, CHANNELS, FIRST, SECOND)


@triton.jit
def _load_weights(
    weight1_ptr, bias1_ptr, weight2_ptr, first, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Of a chunk of hidden channels: what makes it from both parts of the channels, its bias, and back."""
    hidden = first + tl.arange(0, BLOCK_H)
    w10, w20 = _load_part(weight1_ptr, weight2_ptr, hidden, CHANNELS, HIDDEN, 0, FIRST, BLOCK_H)
    if SECOND:
        w11, w21 = _load_part(weight1_ptr, weight2_ptr, hidden, CHANNELS, HIDDEN, FIRST, SECOND, BLOCK_H)
    else:
        w11, w21 = w10, w20
    if HIDDEN % BLOCK_H:
        bias1 = tl.load(bias1_ptr + hidden, mask=hidden < HIDDEN, other=0.0)
    else:
        bias1 = tl.load(bias1_ptr + hidden)
    return w10, w11, bias1.to(tl.float32), w20, w21


@triton.jit
def _load_part(
    weight1_ptr, weight2_ptr, hidden, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, START: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Transposed: `[BLOCK_C, BLOCK_H]` and `[BLOCK_H, BLOCK_C]`."""
    channels = START + tl.arange(0, BLOCK_C)
    ptrs1 = weight1_ptr + hidden[:, None] * CHANNELS + channels[None, :]
    ptrs2 = weight2_ptr + channels[:, None] * HIDDEN + hidden[None, :]
    if HIDDEN % BLOCK_H == 0 and START + BLOCK_C <= CHANNELS:
        w1 = tl.load(ptrs1)
        w2 = tl.load(ptrs2)
    elif HIDDEN % BLOCK_H == 0:
        w1 = tl.load(ptrs1, mask=(channels < CHANNELS)[None, :], other=0.0)
        w2 = tl.load(ptrs2, mask=(channels < CHANNELS)[:, None], other=0.0)
    else:
        w1 = tl.load(ptrs1, mask=(hidden < HIDDEN)[:, None] & (channels < CHANNELS)[None, :], other=0.0)
        w2 = tl.load(ptrs2, mask=(channels < CHANNELS)[:, None] & (hidden < HIDDEN)[None, :], other=0.0)
    return tl.trans(w1), tl.trans(w2)


@triton.jit
def _map_mask(position, positions, CHANNELS: tl.constexpr, START: tl.constexpr, BLOCK_C: tl.constexpr):
    channels = START + tl.arange(0, BLOCK_C)
    if START + BLOCK_C <= CHANNELS:
        return (position < positions)[:, None] & (channels >= 0)[None, :]
    return (position < positions)[:, None] & (channels < CHANNELS)[None, :]


@triton.jit
def _load_map(ptr, position, positions, CHANNELS: tl.constexpr, START: tl.constexpr, BLOCK_C: tl.constexpr):
    channels = START + tl.arange(0, BLOCK_C)
    mask = _map_mask(position, positions, CHANNELS, START, BLOCK_C)
    return tl.load(ptr + position[:, None] * CHANNELS + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _finish(
    out_ptr, residual_ptr, bias2_ptr, out, position, positions, CHANNELS: tl.constexpr, START: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a part of the channels with bias and residual."""
    channels = START + tl.arange(0, BLOCK_C)
    mask = _map_mask(position, positions, CHANNELS, START, BLOCK_C)
    offsets = position[:, None] * CHANNELS + channels[None, :]
    out += tl.load(bias2_ptr + channels, mask=channels < CHANNELS, other=0.0).to(tl.float32)[None, :]
    out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=PLANS)
def _plan(shape: tuple[int, ...], hidden: int, device: torch.device) -> Launch:
    batch, channels, height, width = shape
    multiprocessors, shared_memory = resources(device)
    plan = plan_mlp(channels, hidden, shared_memory)
    positions = batch * height * width
    tiles = triton.cdiv(positions, plan.block_p)
    programs = min(plan.programs * multiprocessors, tiles) if plan.programs else tiles
    constants = {
        "CHANNELS": channels, "HIDDEN": hidden, "BLOCK_P": plan.block_p, "FIRST": plan.first, "SECOND": plan.second,
        "BLOCK_H": plan.block_h, "CHUNKS": triton.cdiv(hidden, plan.block_h), "RESIDENT": plan.programs > 0,
        "STAGES": 1 if plan.programs else plan.stages, "AHEAD": plan.stages if plan.programs else 1,
        "num_warps": plan.warps,
    }  # fmt: skip
    return Launch((programs,), (positions, tiles), constants)


def launch_mlp(
    x: Tensor, residual: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:  # fmt: skip
    """Channels-last; so are the maps, unless copies are made."""
    same = residual is x
    x = x.contiguous(memory_format=torch.channels_last)
    residual = x if same else residual.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return out
    launch = _plan(x.shape, bias1.shape[0], x.device)
    parameters = (tensor.contiguous() for tensor in (weight1, bias1, weight2, bias2))
    with device_of(x):
        launch_kernel(_mlp_kernel, launch.grid, (x, residual, *parameters, out), *launch[1:])
    return out
