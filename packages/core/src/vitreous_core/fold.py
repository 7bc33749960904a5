"""Exact folding of batch norms, residuals and per-channel gains into the linear maps beside them (evaluation mode).

In evaluation mode a batch norm is the affine map `y = s x + t` per channel, `s = gamma / sqrt(var + eps)` and
`t = beta - mean s`. Everything is computed in fp64 and rounded once, so that folding an fp64 model is exact to
1e-15 relative and folding an fp32 model costs one rounding. The arithmetic runs on the CPU, as not every device has
fp64; new modules keep the device and dtype of the old.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def exact(tensor: Tensor) -> Tensor:
    """A copy in fp64 on the CPU, out of any graph: what folding computes with."""
    return tensor.detach().cpu().double()


def batch_norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C]` of a batch norm, in fp64 on the CPU, in evaluation mode.

    Raises:
        ValueError: when the norm keeps no running statistics and so is no fixed affine map.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm must track running statistics to be folded; got track_running_stats=False")
    scale = torch.rsqrt(exact(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -exact(norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + exact(norm.bias)
    return scale, shift


def fold_conv_norm(conv: nn.Conv2d, norm: _BatchNorm, *, gain: float = 1.0, residual: bool = False) -> nn.Conv2d:
    """The biased convolution equal to `gain * norm(conv(x))`, for any groups, stride and padding.

    Args:
        conv: the convolution.
        norm: the batch norm after it.
        gain: a factor on the result.
        residual: fold `x +` in front too, as one more tap in the middle of the kernel.

    Raises:
        ValueError: for a residual around a convolution that changes the shape of its input.
    """
    scale, shift = batch_norm_affine(norm)
    weight = exact(conv.weight) * (gain * scale)[:, None, None, None]
    bias = gain * (shift if conv.bias is None else shift + exact(conv.bias) * scale)
    if residual:
        weight = weight + _identity_kernel(conv)
    return _conv_like(conv, weight, bias)


def fold_norm_conv(norm: _BatchNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """The biased convolution equal to `conv(norm(x))`; exact only without zero padding, hence for 1x1.

    Raises:
        ValueError: for a padded convolution, whose border would see the shift where it must see zero.
    """
    scale, shift = batch_norm_affine(norm)
    return _fold_affine_conv(scale, shift, conv)


def fold_conv_norm_conv(first: nn.Conv2d, norm: _BatchNorm, second: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A bias-free and a biased convolution that in turn equal `second(norm(first(x)))`.

    The scale of the norm goes back into `first`. Its shift and the bias of `first` are the same at every position and
    go on into the bias of `second`, one addition per value less.

    Raises:
        ValueError: when `second` is padded.
    """
    scale, shift = batch_norm_affine(norm)
    if first.bias is not None:
        shift = shift + exact(first.bias) * scale
    scaled = _conv_like(first, exact(first.weight) * scale[:, None, None, None], None)
    return scaled, _fold_affine_conv(torch.ones_like(shift), shift, second)


def fold_norm_linear(norm: _BatchNorm, linear: nn.Linear) -> nn.Linear:
    """The linear layer equal to `linear(norm(x))`."""
    scale, shift = batch_norm_affine(norm)
    weight = exact(linear.weight)
    bias = weight @ shift
    if linear.bias is not None:
        bias = bias + exact(linear.bias)
    return _linear_like(linear, weight * scale, bias)


def fold_mean(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """The linear layer equal to the mean of two biased ones of the same shape."""
    weight = (exact(first.weight) + exact(second.weight)) / 2
    return _linear_like(first, weight, (exact(first.bias) + exact(second.bias)) / 2)


def fold_gain(conv: nn.Conv2d, gain: Tensor) -> nn.Conv2d:
    """The convolution equal to `gain * conv(x)`.

    Args:
        conv: a biased convolution.
        gain: a factor for each output channel, of any shape with that many entries.
    """
    assert conv.bias is not None
    factors = exact(gain).flatten()
    return _conv_like(conv, exact(conv.weight) * factors[:, None, None, None], exact(conv.bias) * factors)


def _fold_affine_conv(scale: Tensor, shift: Tensor, conv: nn.Conv2d) -> nn.Conv2d:
    """`conv(scale x + shift)`."""
    if any(p != 0 for p in conv.padding):
        raise ValueError(f"conv must be unpadded to absorb a norm before it; got padding={conv.padding}")
    weight = exact(conv.weight)
    per_group = scale.reshape(conv.groups, -1)
    rows = weight.reshape(conv.groups, conv.out_channels // conv.groups, *weight.shape[1:])
    offset = (rows.sum(dim=(-2, -1)) * shift.reshape(conv.groups, 1, -1)).sum(-1).flatten()
    weight = (rows * per_group[:, None, :, None, None]).reshape(weight.shape)
    bias = offset if conv.bias is None else offset + exact(conv.bias)
    return _conv_like(conv, weight, bias)


def _identity_kernel(conv: nn.Conv2d) -> Tensor:
    """The kernel with which a convolution of this geometry returns its input."""
    same = all(side % 2 == 1 for side in conv.kernel_size)
    same = same and conv.padding == tuple(
        side // 2 * dilation for side, dilation in zip(conv.kernel_size, conv.dilation, strict=True)
    )
    if not same or set(conv.stride) != {1} or conv.in_channels != conv.out_channels:
        raise ValueError(
            "conv must keep the shape of its input to take a residual in (stride 1, as many channels out as in, odd "
            f"kernel, padding of half of it); got {conv}"
        )
    kernel = torch.zeros(conv.weight.shape, dtype=torch.float64)
    channel = torch.arange(conv.out_channels)
    kernel[channel, channel % kernel.shape[1], kernel.shape[2] // 2, kernel.shape[3] // 2] = 1.0
    return kernel


def _conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    # torch annotates these attributes as tuples of any length and the arguments as pairs.
    window: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, **window, groups=conv.groups, bias=bias is not None,
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    _assign(folded, weight, bias)
    return folded


def _linear_like(linear: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    folded = nn.Linear(linear.in_features, linear.out_features, **like)
    _assign(folded, weight, bias)
    return folded


def _assign(module: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            assert module.bias is not None
            module.bias.copy_(bias)
