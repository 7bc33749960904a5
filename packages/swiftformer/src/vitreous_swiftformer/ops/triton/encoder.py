"""Inference kernel of the convolutional block: depthwise 3x3, 1x1, GELU, 1x1 and residual, the middle on chip.

A program owns a run of positions. It sums the nine taps for all channels, which its neighbours' reads have mostly
brought into the caches, and then walks over the hidden channels: each chunk is made, activated and multiplied into the
result before the next.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import alignment, device_of
from .configs import plan_encoder

INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)


@triton.jit(
    do_not_specialize=[
        "stride_xb", "stride_xy", "stride_xx", "stride_ob", "stride_oy", "stride_ox", "positions", "height", "width",
    ]
)  # fmt: skip
def _encoder_kernel(
    x_ptr, taps_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, out_ptr,
    stride_xb, stride_xy, stride_xx, stride_xc, stride_ob, stride_oy, stride_ox, stride_oc,
    positions, height, width,
    ALIGN: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of positions, counted through all images. Weights are `[out, in]`."""
    position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = position < positions
    column, row = (position % width).to(tl.int32), (position // width % height).to(tl.int32)
    image = position // width // height
    channels = tl.arange(0, BLOCK_C)
    is_channel = channels < CHANNELS
    x_ptrs = x_ptr + _offsets(image, row, column, stride_xb, stride_xy, stride_xx, ALIGN)[:, None]
    x_ptrs += channels.to(tl.int64)[None, :] * stride_xc

    local = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # Unrolled, all nine loads come first and spill.
    for tap in tl.range(0, 9, num_stages=1, loop_unroll_factor=1):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = exists & (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        shift = (down * tl.cast(stride_xy, tl.int64) + right * tl.cast(stride_xx, tl.int64)) * ALIGN
        values = tl.load(x_ptrs + shift, mask=inside[:, None] & is_channel[None, :], other=0.0)
        weight = tl.load(taps_ptr + channels * 9 + tap, mask=is_channel, other=0.0)
        local += values.to(tl.float32) * weight.to(tl.float32)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    local = local.to(dtype)

    out = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in tl.range(0, HIDDEN, BLOCK_H, num_stages=STAGES):
        hidden = first + tl.arange(0, BLOCK_H)
        is_hidden = hidden < HIDDEN
        weight1 = tl.load(
            weight1_ptr + hidden[:, None] * CHANNELS + channels[None, :],
            mask=is_hidden[:, None] & is_channel[None, :], other=0.0,
        )  # fmt: skip
        weight2 = tl.load(
            weight2_ptr + channels[:, None] * HIDDEN + hidden[None, :],
            mask=is_channel[:, None] & is_hidden[None, :], other=0.0,
        )  # fmt: skip
        bias1 = tl.load(bias1_ptr + hidden, mask=is_hidden, other=0.0).to(tl.float32)
        made = tl.dot(local, tl.trans(weight1)) + bias1[None, :]
        made = 0.5 * made * (1.0 + tl.erf(made * INVERSE_SQRT_2))
        out = tl.dot(made.to(dtype), tl.trans(weight2), out)

    out += tl.load(bias2_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    mask = exists[:, None] & is_channel[None, :]
    out += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    offsets = _offsets(image, row, column, stride_ob, stride_oy, stride_ox, ALIGN)[:, None]
    offsets += channels.to(tl.int64)[None, :] * stride_oc
    tl.store(out_ptr + offsets, out.to(dtype), mask=mask)


@triton.jit
def _offsets(image, row, column, stride_b, stride_y, stride_x, ALIGN: tl.constexpr):
    """64-bit; strides are over `ALIGN`."""
    return (image * stride_b + row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x) * ALIGN


def launch_encoder(
    x: Tensor, taps: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:  # fmt: skip
    """`[B, C, height, width]`, strides in the order of those of x."""
    out = torch.empty_like(x)
    if not x.numel():
        return out
    batch, channels, height, width = x.shape
    plan = plan_encoder(channels)
    parameters = [tensor.contiguous() for tensor in (taps, weight1, bias1, weight2, bias2)]
    outer = [
        stride if tensor.shape[dim] > 1 else 0
        for tensor in (x, out)
        for dim, stride in ((0, tensor.stride(0)), (2, tensor.stride(2)), (3, tensor.stride(3)))
    ]
    align = alignment(outer)
    strides = [stride // align for stride in outer]
    positions = batch * height * width
    with device_of(x):
        _encoder_kernel[(triton.cdiv(positions, plan.block_p),)](
            x, *parameters, out, *strides[:3], x.stride(1), *strides[3:], out.stride(1),
            positions, height, width, ALIGN=align, CHANNELS=channels, HIDDEN=weight1.shape[0], BLOCK_P=plan.block_p,
            BLOCK_C=plan.block_c, BLOCK_H=plan.block_h, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
    return out
