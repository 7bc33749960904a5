"""Casting the weights of several linear layers for autocast in one launch, and their gradients back in another.

Autocast casts each weight and each bias where it is used, and the backward pass casts each gradient back: for the four
linear layers of a transformer block 16 launches, which a slow host spends more time on than a GPU on the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.jit._trace import is_tracing
from torch.nn import functional as F

from .hooks import has_hooks

LinearCasts: TypeAlias = Mapping[nn.Module, tuple[Tensor, Tensor | None]]
"""Weight and bias of some layers in autocast's dtype; those of the others are autocast's own business."""

_DEVICE = "cuda"
"""Where casts are launches."""


def cast_linears(*layers: nn.Module) -> LinearCasts | None:
    """Weights and biases of linear layers in autocast's dtype, by one launch for all of them and one for all gradients.

    For eager PyTorch on a GPU under autocast: a compiler fuses casts itself. Nothing is kept between calls, so cast
    once for each pass of a block, inside whatever recomputes it or gathers its parameters. Results and gradients are
    autocast's own, bit by bit, unless a parameter is used several times in one region of autocast, which then casts it
    once and adds up the gradients in the low dtype.

    Args:
        layers: usually those of one block. Cast are the plain `nn.Linear` in fp32 among them: without hooks, adapters,
            parametrizations or shards.

    Returns:
        The casts by layer, for `apply_linear` and `gelu_linear`; None where there are none to make.
    """
    if torch.compiler.is_compiling() or is_tracing() or not torch.is_autocast_enabled(_DEVICE):
        return None
    dtype = torch.get_autocast_dtype(_DEVICE)
    castable = {layer: found for layer in layers if (found := _castable_parameters(layer))}
    if not castable or dtype == torch.float32:
        return None
    parameters = [parameter for found in castable.values() for parameter in found]
    casts = iter(_Cast.apply(dtype, *parameters) if torch.is_grad_enabled() else cast_together(parameters, dtype))
    return {layer: (next(casts), next(casts) if len(found) == 2 else None) for layer, found in castable.items()}


def apply_linear(x: Tensor, layer: nn.Module, casts: LinearCasts | None) -> Tensor:
    """`layer(x)`, from the layer's casts where it has some."""
    out: Tensor = layer(x) if casts is None or layer not in casts else F.linear(x, *casts[layer])
    return out


def weight_and_bias(layer: nn.Module, casts: LinearCasts | None) -> tuple[Tensor, Tensor | None]:
    """A linear layer's casts, or where it has none its parameters."""
    if casts is not None and layer in casts:
        return casts[layer]
    own: tuple[Any, Any] = layer.weight, layer.bias
    return own


def _castable_parameters(layer: nn.Module) -> list[Tensor]:
    """Weight and, if any, bias of a plain linear layer in fp32; nothing of other layers."""
    if type(layer) is not nn.Linear or has_hooks(layer):
        return []
    weight, bias = layer.weight, layer.bias
    parameters = [weight] if bias is None else [weight, bias]
    for parameter in parameters:
        # Exactly a parameter: subclasses (distributed, quantised) know better how to cast themselves.
        if type(parameter) is not nn.Parameter or parameter.dtype != torch.float32:
            return []
    is_whole = weight.shape == (layer.out_features, layer.in_features)
    return parameters if is_whole and weight.device.type == _DEVICE else []


def cast_together(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one dtype in another, in one launch, without gradients."""
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(casts, tensors)
    return casts


class _Cast(torch.autograd.Function):
    """fp32 parameters to another dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        casts = cast_together(parameters, dtype)
        # Else a frozen weight's gradient would be computed for nothing.
        ctx.mark_non_differentiable(*(c for c, p in zip(casts, parameters, strict=True) if not p.requires_grad))
        return tuple(casts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)]
        casts = iter(cast_together([grad for grad in wanted if grad is not None], torch.float32))
        return None, *(None if grad is None else next(casts) for grad in wanted)
