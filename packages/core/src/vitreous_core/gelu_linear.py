"""GELU and a linear layer that keep one hidden map for the backward pass instead of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .autocast import to_autocast, without_autocast
from .hooks import has_hooks


def gelu_linear(hidden: Tensor, linear: nn.Module, approximate: str = "none") -> Tensor:
    """`linear(gelu(hidden))` that keeps `hidden` alone for the backward pass, and activates it again there.

    Both are the largest tensors of a transformer block; making the activated one again takes one pass over memory, or
    none where a compiler fuses it with the derivative. The plain operations run on a CPU, without gradients, in an
    exported graph, and where `linear` does more than its weight says: an adapter in its place, or a layer with hooks.

    Args:
        hidden: `[..., C]`, any floating dtype.
        linear: usually `nn.Linear` with C inputs.
        approximate: of `torch.nn.functional.gelu`.

    Returns:
        `[..., outputs]`, in the dtype that `linear` gives, autocast included.
    """
    is_plain = type(linear) is nn.Linear and not has_hooks(linear) and torch.is_grad_enabled()
    # Not by `is_exporting`, which Dynamo of PyTorch 2.11 takes for true in any graph.
    if is_plain and torch.compiler.is_dynamo_compiling():
        # By itself a compiler's partitioner keeps whatever a product of the backward pass takes: both.
        return linear(checkpoint(F.gelu, hidden, use_reentrant=False, approximate=approximate))
    if not is_plain or torch.compiler.is_compiling() or not hidden.is_cuda:
        return linear(F.gelu(hidden, approximate=approximate))
    hidden = to_autocast(hidden)
    bias = None if linear.bias is None else linear.bias.to(hidden.dtype)
    out: Tensor = GeluLinear.apply(hidden, linear.weight.to(hidden.dtype), bias, approximate)
    return out


class GeluLinear(torch.autograd.Function):
    """See `gelu_linear`; all tensors in one dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.approximate = approximate
        with without_autocast(hidden):
            return F.linear(F.gelu(hidden, approximate=approximate), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        rows, dweight, dbias = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ F.gelu(hidden, approximate=ctx.approximate).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return torch.ops.aten.gelu_backward(grad @ weight, hidden, approximate=ctx.approximate), dweight, dbias, None
