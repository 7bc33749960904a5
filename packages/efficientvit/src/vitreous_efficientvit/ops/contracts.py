"""The registered operators: schema, fakes, and the refusal of gradients. Kernels are imported when first run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .weights import AttentionWeights, FeedForwardWeights

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
_operators = torch.ops.vitreous_efficientvit


def attention(x: Tensor, weights: AttentionWeights) -> Tensor:
    """Call the operator."""
    result: Tensor = _operators.cascaded_group_attention.default(x, *weights)
    return result


def feed_forward(x: Tensor, weights: FeedForwardWeights) -> Tensor:
    """Call the operator."""
    result: Tensor = _operators.feed_forward.default(x, *weights)
    return result


@torch.library.impl(_library, "cascaded_group_attention", "CompositeExplicitAutograd")
def _attention(x: Tensor, *weights: Any) -> Tensor:
    from .triton.attention import launch_attention

    return launch_attention(x, AttentionWeights(*weights))


@torch.library.impl(_library, "feed_forward", "CompositeExplicitAutograd")
def _feed_forward(x: Tensor, *weights: Any) -> Tensor:
    from .triton.feed_forward import launch_feed_forward

    return launch_feed_forward(x, FeedForwardWeights(*weights))


@torch.library.register_fake("vitreous_efficientvit::cascaded_group_attention", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("vitreous_efficientvit::feed_forward", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.impl(_library, "cascaded_group_attention", "Autograd")
def _attention_without_gradient(*arguments: Any) -> Tensor:
    _refuse_gradients("cascaded_group_attention", arguments)
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _operators.cascaded_group_attention.default(*arguments)
    return result


@torch.library.impl(_library, "feed_forward", "Autograd")
def _feed_forward_without_gradient(*arguments: Any) -> Tensor:
    _refuse_gradients("feed_forward", arguments)
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _operators.feed_forward.default(*arguments)
    return result


def _refuse_gradients(name: str, arguments: Sequence[Any]) -> None:
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{name} is for inference and has no gradient, but an input requires one. "
            "Call it under torch.no_grad(), or use backend='torch'"
        )
