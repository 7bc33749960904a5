"""The registered operators: schema, fakes, and the refusal of gradients. Kernels are imported when first run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .weights import AttentionWeights, ConvolutionWeights, DepthwiseWeights, FeedForwardWeights

_library = torch.library.Library("vitreous_efficientvit", "FRAGMENT")
_library.define(
    "cascaded_group_attention(Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor query_weight, Tensor query_bias, "
    "Tensor bias_tile, Tensor proj_weight, Tensor proj_bias, int[] kernel_sizes, int window_size) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "feed_forward(Tensor x, Tensor? local_weight, Tensor? local_bias, Tensor in_weight, Tensor in_bias, "
    "Tensor out_weight, Tensor out_bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "halving_convolution(Tensor x, Tensor weight, Tensor bias, bool relu) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "halving_depthwise(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_cascaded_group_attention = torch.ops.vitreous_efficientvit.cascaded_group_attention.default
_feed_forward = torch.ops.vitreous_efficientvit.feed_forward.default
_halving_convolution = torch.ops.vitreous_efficientvit.halving_convolution.default
_halving_depthwise = torch.ops.vitreous_efficientvit.halving_depthwise.default


def attention(x: Tensor, weights: AttentionWeights) -> Tensor:
    """Call the operator."""
    _refuse_gradients("cascaded_group_attention", x, *weights.tensors)
    result: Tensor = _cascaded_group_attention(x, *weights)
    return result


def feed_forward(x: Tensor, weights: FeedForwardWeights) -> Tensor:
    """Call the operator."""
    _refuse_gradients("feed_forward", x, *weights)
    result: Tensor = _feed_forward(x, *weights)
    return result


def halving_convolution(x: Tensor, weights: ConvolutionWeights, relu: bool) -> Tensor:
    """Call the operator."""
    _refuse_gradients("halving_convolution", x, *weights)
    result: Tensor = _halving_convolution(x, *weights, relu)
    return result


def halving_depthwise(x: Tensor, weights: DepthwiseWeights) -> tuple[Tensor, Tensor]:
    """Call the operator."""
    _refuse_gradients("halving_depthwise", x, *weights)
    result: tuple[Tensor, Tensor] = _halving_depthwise(x, *weights)
    return result


@torch.library.impl(_library, "cascaded_group_attention", "CompositeExplicitAutograd")
def _run_attention(x: Tensor, *weights: Any) -> Tensor:
    from .triton.attention import launch_attention

    return launch_attention(x, AttentionWeights(*weights))


@torch.library.impl(_library, "feed_forward", "CompositeExplicitAutograd")
def _run_feed_forward(x: Tensor, *weights: Any) -> Tensor:
    from .triton.feed_forward import launch_feed_forward

    return launch_feed_forward(x, FeedForwardWeights(*weights))


@torch.library.impl(_library, "halving_convolution", "CompositeExplicitAutograd")
def _run_convolution(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    from .triton.convolution import launch_convolution

    return launch_convolution(x, ConvolutionWeights(weight, bias), relu)


@torch.library.impl(_library, "halving_depthwise", "CompositeExplicitAutograd")
def _run_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from .triton.convolution import launch_depthwise

    return launch_depthwise(x, DepthwiseWeights(weight, bias))


@torch.library.register_fake("vitreous_efficientvit::cascaded_group_attention", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("vitreous_efficientvit::feed_forward", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("vitreous_efficientvit::halving_convolution", lib=_library)
def _(x: Tensor, _weight: Tensor, bias: Tensor, _relu: bool) -> Tensor:
    return _halved(x, bias.shape[0])


@torch.library.register_fake("vitreous_efficientvit::halving_depthwise", lib=_library)
def _(x: Tensor, _weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _halved(x, bias.shape[0]), x.new_empty(x.shape[:2])


def _halved(x: Tensor, channels: int) -> Tensor:
    """Channels-last, half as high and wide, rounded up."""
    batch, _, height, width = x.shape
    return x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, channels).permute(0, 3, 1, 2)


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{name} is for inference and has no gradient, but an input requires one. "
            "Call it under torch.no_grad(), or use backend='torch'"
        )
