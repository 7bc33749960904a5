"""1x1 convolutions for inference, as matrix products where maps are channels-last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """A biased 1x1 convolution that is one matrix product on half-precision channels-last maps.

    cuDNN convolves and adds the bias in a second pass over the result; a matrix product adds it before it writes. Other
    maps, and so what is exported, take the convolution. So does float32, whose convolutions and products round by
    settings of their own (`torch.backends.cudnn.allow_tf32`, `torch.set_float32_matmul_precision`).

    Args:
        in_channels, out_channels: sizes.
        place: `device` and `dtype`.
    """

    def __init__(self, in_channels: int, out_channels: int, **place: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, **place)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> PointwiseConv2d:
        """The same 1x1 convolution, with its parameters."""
        pointwise = cls(conv.in_channels, conv.out_channels, device="meta")
        assert conv.weight.shape == pointwise.weight.shape
        assert conv.bias is not None
        pointwise.weight, pointwise.bias = conv.weight, conv.bias
        return pointwise

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, height, width]` to `[B, out_channels, height, width]`."""
        if not is_half_channels_last(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def is_half_channels_last(x: Tensor) -> bool:
    """Whether a map or weight is channels-last in half precision; not if of one position or channel."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
