"""The registered operators: schema, fakes, autograd. Kernels are imported when first run.

All are functional: outputs alias neither inputs nor each other. Autocast is applied above them, in `api`, since
`torch.library` can only cast to one fixed dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# `custom_op` would be shorter; its Python layers cost ten times as much per call as these, more than a small kernel.
_library = torch.library.Library("vitreous_swiftformer", "FRAGMENT")
_library.define(
    "additive_attention(Tensor query, Tensor key, Tensor w_g, float scale) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "additive_attention_backward(Tensor dunit, Tensor dmixed, Tensor query, Tensor key, Tensor w_g, "
    "Tensor statistics, float scale) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "additive_attention_packed(Tensor query_key, Tensor w_g, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "pointwise_mlp(Tensor x, Tensor residual, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "halving_convolution(Tensor x, Tensor weight, Tensor bias, bool relu) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_additive_attention = torch.ops.vitreous_swiftformer.additive_attention.default
_additive_attention_backward = torch.ops.vitreous_swiftformer.additive_attention_backward.default
_additive_attention_packed = torch.ops.vitreous_swiftformer.additive_attention_packed.default
_pointwise_mlp = torch.ops.vitreous_swiftformer.pointwise_mlp.default
_halving_convolution = torch.ops.vitreous_swiftformer.halving_convolution.default


def additive_attention(query: Tensor, key: Tensor, w_g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Call the operator; arguments as in `api.additive_attention`."""
    unit, mixed, _ = _additive_attention(query, key, w_g, scale)
    return unit, mixed


def additive_attention_packed(query_key: Tensor, w_g: Tensor, scale: float) -> Tensor:
    """Call the operator, which has no derivative; arguments as in `api.additive_attention_packed`."""
    packed: Tensor = _additive_attention_packed(query_key, w_g, scale)
    return packed


@torch.library.impl(_library, "additive_attention", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, w_g: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Results, strides ordered as those of query and key; fp32 `[B, D + 1]`, global query and length of weights."""
    from .triton.forward import launch_forward

    unit, mixed = torch.empty_like(query), torch.empty_like(key)
    return unit, mixed, launch_forward(query, key, w_g, unit, mixed, scale)


@torch.library.register_fake("vitreous_swiftformer::additive_attention", lib=_library)
def _(query: Tensor, key: Tensor, w_g: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = query.shape
    statistics = query.new_empty(batch, channels + 1, dtype=torch.float32)
    return torch.empty_like(query), torch.empty_like(key), statistics


@torch.library.impl(_library, "additive_attention_packed", "CompositeExplicitAutograd")
def _packed(query_key: Tensor, w_g: Tensor, scale: float) -> Tensor:
    """Both results side by side, strides ordered as those of `query_key`."""
    from .triton.forward import launch_forward

    packed = torch.empty_like(query_key)
    (query, key), (unit, mixed) = query_key.chunk(2, -1), packed.chunk(2, -1)
    launch_forward(query, key, w_g, unit, mixed, scale)
    return packed


@torch.library.register_fake("vitreous_swiftformer::additive_attention_packed", lib=_library)
def _(query_key: Tensor, w_g: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query_key)


@torch.library.impl(_library, "additive_attention_backward", "CompositeExplicitAutograd")
def _backward(
    dunit: Tensor, dmixed: Tensor, query: Tensor, key: Tensor, w_g: Tensor, statistics: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and w_g."""
    from .triton.backward import launch_backward

    return launch_backward(dunit, dmixed, query, key, w_g, statistics, scale)


@torch.library.register_fake("vitreous_swiftformer::additive_attention_backward", lib=_library)
def _(
    dunit: Tensor, dmixed: Tensor, query: Tensor, key: Tensor, w_g: Tensor, statistics: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(w_g)


class _AdditiveAttention(torch.autograd.Function):
    """Saves queries, keys, w_g and the global queries; unit vectors are made again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, w_g: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            unit, mixed, statistics = _additive_attention(query, key, w_g, scale)
        ctx.scale = scale
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # for the statistics zeros would be filled in at every call
        ctx.save_for_backward(query, key, w_g, statistics)
        return unit, mixed, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dunit: Tensor | None, dmixed: Tensor | None, _: None) -> tuple[Any, ...]:
        query, key, *others = ctx.saved_tensors
        dunit = torch.zeros_like(query) if dunit is None else dunit
        dmixed = torch.zeros_like(key) if dmixed is None else dmixed
        gradients = _additive_attention_backward(dunit, dmixed, query, key, *others, ctx.scale)
        return *gradients, None


@torch.library.impl(_library, "additive_attention", "Autograd")
def _differentiable(query: Tensor, key: Tensor, w_g: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, w_g)):
        return _AdditiveAttention.apply(query, key, w_g, scale)
    with torch._C._AutoDispatchBelowAutograd():
        return _additive_attention(query, key, w_g, scale)


def pointwise_mlp(
    x: Tensor, residual: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:  # fmt: skip
    """Call the operator, which has no derivative; arguments as in `api.pointwise_mlp`."""
    out: Tensor = _pointwise_mlp(x, residual, weight1, bias1, weight2, bias2)
    return out


@torch.library.impl(_library, "pointwise_mlp", "CompositeExplicitAutograd")
def _mlp(
    x: Tensor, residual: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:  # fmt: skip
    """The sum, channels-last."""
    from .triton.mlp import launch_mlp

    return launch_mlp(x, residual, weight1, bias1, weight2, bias2)


@torch.library.register_fake("vitreous_swiftformer::pointwise_mlp", lib=_library)
def _(x: Tensor, *_: Tensor) -> Tensor:
    return _channels_last(x, *x.shape[1:])


def halving_convolution(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """Call the operator, which has no derivative; arguments as in `api.halving_convolution`."""
    out: Tensor = _halving_convolution(x, weight, bias, relu)
    return out


@torch.library.impl(_library, "halving_convolution", "CompositeExplicitAutograd")
def _halving(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """The map of half the height and width, channels-last."""
    from .triton.halving import launch_halving

    return launch_halving(x, weight, bias, relu)


@torch.library.register_fake("vitreous_swiftformer::halving_convolution", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return _channels_last(x, weight.shape[0], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)


def _channels_last(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], height, width, channels).permute(0, 3, 1, 2)
