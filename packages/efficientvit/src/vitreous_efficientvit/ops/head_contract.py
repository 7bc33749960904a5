"""The registered operator of one head's attention: schema, fakes, autograd. Kernels are imported when first run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("vitreous_efficientvit", "FRAGMENT")
_library.define(
    "head_attention(Tensor query, Tensor key, Tensor value, Tensor table, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "head_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor table, float scale, "
    "bool needs_table) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_head_attention = torch.ops.vitreous_efficientvit.head_attention.default
_head_attention_backward = torch.ops.vitreous_efficientvit.head_attention_backward.default


def head_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """Call the operator; arguments as in `head_attention.head_attention`."""
    out: Tensor = _head_attention(query, key, value, table, scale)
    return out


@torch.library.impl(_library, "head_attention", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    from .triton.head_attention import launch_forward

    return launch_forward(query, key, value, table, scale)


@torch.library.impl(_library, "head_attention_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float, needs_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and table (`[0]` unless `needs_table`)."""
    from .triton.head_attention import launch_backward

    return launch_backward(dout, query, key, value, table, scale, needs_table)


@torch.library.register_fake("vitreous_efficientvit::head_attention", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    return empty_map(value)


@torch.library.register_fake("vitreous_efficientvit::head_attention_backward", lib=_library)
def _(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float, needs_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtable = torch.empty_like(table, memory_format=torch.contiguous_format) if needs_table else table.new_empty(0)
    return empty_map(query), empty_map(key), empty_map(value), dtable


def empty_map(source: Tensor) -> Tensor:
    """Dense, channels-last where the channels of `source`, which may be a slice, lie side by side."""
    is_last = source.stride(1) == 1
    return torch.empty_like(source, memory_format=torch.channels_last if is_last else torch.contiguous_format)


class _HeadAttention(torch.autograd.Function):
    """Saves what came in; the softmax is made again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, table)
        ctx.scale = scale
        with torch._C._AutoDispatchBelowAutograd():
            return head_attention(query, key, value, table, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs_table = ctx.needs_input_grad[3]
        *gradients, dtable = _head_attention_backward(dout, *ctx.saved_tensors, ctx.scale, needs_table)
        return *gradients, dtable if needs_table else None, None


@torch.library.impl(_library, "head_attention", "Autograd")
def _differentiable(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value, table)):
        out: Tensor = _HeadAttention.apply(query, key, value, table, scale)
        return out
    with torch._C._AutoDispatchBelowAutograd():
        return head_attention(query, key, value, table, scale)
