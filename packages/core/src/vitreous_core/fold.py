"""Exact folding of batch norms into the linear map before or after them (evaluation mode).

In evaluation mode a batch norm is the affine map `y = s x + t` per channel, `s = gamma / sqrt(var + eps)` and
`t = beta - mean s`. Scales are computed in fp64 and rounded once, so that folding an fp64 model is exact to
1e-15 relative and folding an fp32 model costs one rounding. The arithmetic runs on the CPU, as not every device has
fp64; new modules keep the device and dtype of the old.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C]` of a batch norm, in fp64 on the CPU, in evaluation mode.

    Raises:
        ValueError: when the norm keeps no running statistics and so is no fixed affine map.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm must track running statistics to be folded; got track_running_stats=False")
    scale = torch.rsqrt(_exact(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -_exact(norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + _exact(norm.bias)
    return scale, shift


def fold_conv_norm(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """The biased convolution equal to `norm(conv(x))`, for any groups, stride and padding."""
    scale, shift = batch_norm_affine(norm)
    weight = _exact(conv.weight) * scale[:, None, None, None]
    bias = shift if conv.bias is None else shift + _exact(conv.bias) * scale
    return _conv_like(conv, weight, bias)


def fold_norm_conv(norm: _BatchNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """The biased convolution equal to `conv(norm(x))`; exact only without zero padding, hence for 1x1.

    Raises:
        ValueError: for a padded convolution, whose border would see the shift where it must see zero.
    """
    if any(p != 0 for p in conv.padding):
        raise ValueError(f"conv must be unpadded to absorb a norm before it; got padding={conv.padding}")
    scale, shift = batch_norm_affine(norm)
    weight = _exact(conv.weight)
    per_group = scale.reshape(conv.groups, -1)
    rows = weight.reshape(conv.groups, conv.out_channels // conv.groups, *weight.shape[1:])
    offset = (rows.sum(dim=(-2, -1)) * shift.reshape(conv.groups, 1, -1)).sum(-1).flatten()
    weight = (rows * per_group[:, None, :, None, None]).reshape(weight.shape)
    bias = offset if conv.bias is None else offset + _exact(conv.bias)
    return _conv_like(conv, weight, bias)


def fold_norm_linear(norm: _BatchNorm, linear: nn.Linear) -> nn.Linear:
    """The linear layer equal to `linear(norm(x))`."""
    scale, shift = batch_norm_affine(norm)
    weight = _exact(linear.weight)
    bias = weight @ shift
    if linear.bias is not None:
        bias = bias + _exact(linear.bias)
    like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    folded = nn.Linear(linear.in_features, linear.out_features, **like)
    _assign(folded, weight * scale, bias)
    return folded


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    # torch annotates these attributes as tuples of any length and the arguments as pairs.
    window: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, **window, groups=conv.groups, bias=True,
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    _assign(folded, weight, bias)
    return folded


def _assign(module: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    assert module.bias is not None
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
