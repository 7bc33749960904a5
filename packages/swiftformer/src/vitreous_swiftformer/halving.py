"""3x3 convolutions of stride 2 for inference, with their ReLU where they have one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .ops import Backend, halving_convolution
from .pointwise import is_half_channels_last


class HalvingConv2d(nn.Conv2d):
    """A biased 3x3 convolution of stride 2 and its ReLU, in one kernel where `ops.choose_halving_backend` says so.

    The kernel is for channels-last networks in half precision. Others, and so what is exported, convolve.

    Args:
        in_channels, out_channels: sizes.
        relu: whether ReLU follows.
        backend: `"torch"`, `"triton"`, or `"auto"`, which chooses.
        place: `device` and `dtype`.
    """

    def __init__(self, in_channels: int, out_channels: int, relu: bool, backend: Backend, **place: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2, padding=1, **place)
        self.relu = relu
        self.backend = backend

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, relu: bool, backend: Backend) -> HalvingConv2d:
        """The same convolution, with its parameters."""
        halving = cls(conv.in_channels, conv.out_channels, relu, backend, device="meta")
        assert conv.weight.shape == halving.weight.shape
        assert conv.bias is not None
        halving.weight, halving.bias = conv.weight, conv.bias
        return halving

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, height, width]` to `[B, out_channels, (height + 1) // 2, (width + 1) // 2]`."""
        is_last = is_half_channels_last(self.weight) or is_half_channels_last(x)
        if self.backend == "triton" or (self.backend == "auto" and is_last):
            assert self.bias is not None
            return halving_convolution(x, self.weight, self.bias, relu=self.relu, backend=self.backend)
        out = super().forward(x)
        return F.relu(out) if self.relu else out
