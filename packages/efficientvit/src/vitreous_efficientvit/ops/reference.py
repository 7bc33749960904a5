"""The plain operations, on any device and in any floating dtype: the truth that the kernels answer to."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import AttentionWeights, ConvolutionWeights, DepthwiseWeights, FeedForwardWeights


def attention(x: Tensor, weights: AttentionWeights) -> Tensor:
    """`x` plus the projected heads of its windows; `x` `[B, C, height, width]`."""
    # Here, as these layers use an operator of this folder themselves.
    from ..attention import cascade, window_partition, window_reverse

    side, tokens = weights.window_size, weights.window_size**2
    height, width = x.shape[2:]
    padded = F.pad(x, (0, -width % side, 0, -height % side))
    windows = window_partition(padded, side)
    key_dim = weights.query_bias.shape[1]
    qkvs = [
        partial(F.conv2d, weight=weight[:, :, None, None], bias=bias)
        for weight, bias in zip(weights.qkv_weight, weights.qkv_bias, strict=True)
    ]
    taps = weights.query_weight.split([kernel**2 for kernel in weights.kernel_sizes])
    dws = [
        partial(
            F.conv2d, weight=tap.T.reshape(key_dim, 1, kernel, kernel), bias=bias, padding=kernel // 2, groups=key_dim
        )
        for tap, bias, kernel in zip(taps, weights.query_bias, weights.kernel_sizes, strict=True)
    ]
    heads = cascade(windows, qkvs, dws, weights.bias_tile[:, :tokens, :tokens])
    projected = F.conv2d(heads.relu(), weights.proj_weight[:, :, None, None], weights.proj_bias)
    return x + window_reverse(projected, *padded.shape[2:])[..., :height, :width]


def feed_forward(x: Tensor, weights: FeedForwardWeights) -> Tensor:
    """The depthwise convolution of `x` if there is one, plus the FFN of it; `x` `[B, C, height, width]`."""
    if weights.local_weight is not None:
        channels = x.shape[1]
        taps = weights.local_weight.T.reshape(channels, 1, 3, 3)
        x = F.conv2d(x, taps, weights.local_bias, padding=1, groups=channels)
    hidden = pointwise_convolution(x, weights.in_weight, weights.in_bias).relu()
    return x + pointwise_convolution(hidden, weights.out_weight, weights.out_bias)


def pointwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution; `x` `[B, C, height, width]`, `weight` `[outputs, C]`."""
    if x.dtype in (torch.float32, torch.float64):
        # As the layers do it: whether fp32 may be rounded to TF32, PyTorch asks of convolutions apart from products.
        return F.conv2d(x, weight[:, :, None, None], bias)
    # A product over rows of channels-last memory, whose bias cuBLAS adds.
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def halving_convolution(x: Tensor, weights: ConvolutionWeights, relu: bool) -> Tensor:
    """A 3x3 convolution of stride 2 with its bias, perhaps ReLU; `x` `[B, C, height, width]`."""
    taps = weights.weight.unflatten(1, (3, 3, x.shape[1])).permute(0, 3, 1, 2)
    y = F.conv2d(x, taps, weights.bias, stride=2, padding=1)
    return y.relu() if relu else y


def halving_depthwise(x: Tensor, weights: DepthwiseWeights) -> tuple[Tensor, Tensor]:
    """ReLU, a depthwise 3x3 convolution of stride 2 with its bias, ReLU; and the spatial mean of that."""
    channels = x.shape[1]
    taps = weights.weight.T.reshape(channels, 1, 3, 3)
    y = F.conv2d(x.relu(), taps, weights.bias, stride=2, padding=1, groups=channels).relu()
    return y, y.mean(dim=(2, 3))
