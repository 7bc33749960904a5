"""The registered operator of trained convolutions: schema, fakes, autograd. Kernels are imported when first run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("vitreous_efficientvit", "FRAGMENT")
_library.define("convolution(Tensor x, Tensor weight, int stride) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    "convolution_backward(Tensor dout, Tensor x, Tensor weight, int stride, bool needs_x, bool needs_weight) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_convolution = torch.ops.vitreous_efficientvit.convolution.default
_convolution_backward = torch.ops.vitreous_efficientvit.convolution_backward.default

NARROW = 16
"""Channels of dense convolutions above which cuDNN's forward is the faster one, and fp32 has no kernel."""


def convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Call the operator; arguments as in `convolution.convolution`."""
    out: Tensor = _convolution(x, weight, stride)
    return out


def is_depthwise(weight: Tensor) -> bool:
    """Whether each channel has its own kernel; else all channels have one together."""
    return weight.shape[1] == 1 and weight.shape[0] > 1


@torch.library.impl(_library, "convolution", "CompositeExplicitAutograd")
def _forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    if is_depthwise(weight) or weight.shape[1] > NARROW:
        return convolve_by_torch(x, weight, stride)
    from .triton.strided import launch_forward

    return launch_forward(x, weight)


@torch.library.impl(_library, "convolution_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, stride: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, channels-last, and of the weight; `[0]` where not needed."""
    from .triton import depthwise, strided

    if is_depthwise(weight):
        return depthwise.launch_backward(dout, x, weight, stride, needs_x, needs_weight)
    if weight.shape[1] > NARROW and x.dtype == torch.float32:
        return differentiate_by_torch(dout, x, weight, needs_x, needs_weight)
    return strided.launch_backward(dout, x, weight, needs_x, needs_weight)


@torch.library.register_fake("vitreous_efficientvit::convolution", lib=_library)
def _(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return empty_output(x, weight, stride)


@torch.library.register_fake("vitreous_efficientvit::convolution_backward", lib=_library)
def _(dout: Tensor, x: Tensor, weight: Tensor, stride: int, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last) if needs_x else x.new_empty(0)
    if not needs_weight:
        return dx, weight.new_empty(0)
    memory_format = torch.contiguous_format if is_depthwise(weight) else torch.channels_last
    return dx, torch.empty_like(weight, memory_format=memory_format)


def pixel_of(x: Tensor) -> int:
    """Elements between two cells of a map whose channels lie side by side, all of them evenly; 0 for other maps.

    A slice of the channels of a channels-last map is such a map.
    """
    batch, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return channels
    image, channel, row, pixel = x.stride()
    is_even = channel == 1 and width > 1 and (height == 1 or row == width * pixel)
    return pixel if is_even and (batch == 1 or image == height * width * pixel) else 0


def convolve_by_torch(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """PyTorch's convolution, channels-last, with the weight in the dtype of x."""
    x = x.contiguous(memory_format=torch.channels_last)
    groups, padding = x.shape[1] if is_depthwise(weight) else 1, weight.shape[-1] // 2
    arguments = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups
    out = torch.ops.aten.convolution.default(x, weight.to(x.dtype), None, *arguments)
    return out.contiguous(memory_format=torch.channels_last)


def differentiate_by_torch(
    dout: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch's gradients of a dense convolution of stride 2, channels-last."""
    x, dout = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dout))
    dx, dweight, _ = torch.ops.aten.convolution_backward.default(
        dout, x, weight.to(x.dtype), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [needs_x, needs_weight, False]
    )
    dx = dx.contiguous(memory_format=torch.channels_last) if needs_x else x.new_empty(0)
    if not needs_weight:
        return dx, weight.new_empty(0)
    return dx, dweight.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def empty_output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Channels-last, dtype of x."""
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    channels = weight.shape[0]
    strides = (height * width * channels, 1, width * channels, channels)
    return x.new_empty_strided((x.shape[0], channels, height, width), strides)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        with torch._C._AutoDispatchBelowAutograd():
            return convolution(x, weight, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx, dweight = _convolution_backward(dout, *ctx.saved_tensors, ctx.stride, needs_x, needs_weight)
        return dx if needs_x else None, dweight if needs_weight else None, None


@torch.library.impl(_library, "convolution", "Autograd")
def _differentiable(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Convolution.apply(x, weight, stride)
        return out
    with torch._C._AutoDispatchBelowAutograd():
        return convolution(x, weight, stride)
