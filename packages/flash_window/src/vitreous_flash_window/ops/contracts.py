"""The registered operators of cut windows: schema, fakes, autograd. Kernels are imported when first run.

Both operators are functional: outputs never alias inputs. Autocast is applied above them, in `api`, since
`torch.library` can only cast to one fixed dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton.arguments import new_statistics
from .triton.configs import is_short, keeps_statistics, tiles_channels, tiles_channels_backward

# `custom_op` would be shorter; its Python layers cost ten times as much per call as these, more than a small kernel.
_library = torch.library.Library("vitreous_flash_window", "FRAGMENT")
_library.define(
    "window_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? seed, "
    "float scale, float dropout_p) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "window_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? out, Tensor? statistics, "
    "Tensor? bias, Tensor? mask, Tensor? seed, float scale, float dropout_p, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_window_attention = torch.ops.vitreous_flash_window.window_attention.default
_window_attention_backward = torch.ops.vitreous_flash_window.window_attention_backward.default


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Call the operator; arguments as its implementation's."""
    out, _ = _window_attention(query, key, value, bias, mask, seed, scale, dropout_p)
    return out


@torch.library.impl(_library, "window_attention", "CompositeExplicitAutograd")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output, strides ordered as those of query, and statistics of the rows of scores.

    The latter are fp32 `[1 or 2, B*W, H, N]`, see `triton.arguments.rows_of_statistics`, and `[0]` unless
    `configs.keeps_statistics`.

    Args:
        query, key, value, bias, mask: as in `api.window_attention`.
        seed: int64 `[]`, of the dropout; None without.
        scale, dropout_p: as in `api.window_attention`.
    """
    if _is_short(query):
        from .triton.window_forward import launch_forward

        return launch_forward(query, key, value, bias, mask, seed, scale, dropout_p)
    if tiles_channels(query.dtype, query.shape[2], query.shape[3]):
        from .triton.window_channels import launch_channels_forward

        return launch_channels_forward(query, key, value, bias, mask, seed, scale, dropout_p)
    from .triton.long_forward import launch_long_forward

    return launch_long_forward(query, key, value, bias, mask, seed, scale, dropout_p)


@torch.library.register_fake("vitreous_flash_window::window_attention", lib=_library)
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    if _keeps_statistics(query):
        statistics = new_statistics(query, *query.shape[:3])
    else:
        statistics = query.new_empty(0, dtype=torch.float32)
    return torch.empty_like(query), statistics


@torch.library.impl(_library, "window_attention_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    statistics: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty unless `needs_bias`); `out`, `statistics` as `_forward` keeps."""
    if tiles_channels_backward(query.dtype, query.shape[2], query.shape[3]):
        from .triton.window_channels import launch_channels_backward

        return launch_channels_backward(dout, query, key, value, bias, mask, seed, scale, dropout_p, needs_bias)
    if _is_short(query):
        from .triton.window_backward import launch_backward

        return launch_backward(dout, query, key, value, out, statistics, bias, mask, seed, scale, dropout_p, needs_bias)
    from .triton.long_backward import launch_long_backward

    assert out is not None
    assert statistics is not None
    return launch_long_backward(
        dout, query, key, value, out, statistics, bias, mask, seed, scale, dropout_p, needs_bias
    )  # fmt: skip


@torch.library.register_fake("vitreous_flash_window::window_attention_backward", lib=_library)
def _(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor | None, statistics: Tensor | None,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    needs_bias = rest[-1]
    if needs_bias:
        assert bias is not None
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    else:
        dbias = query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), dbias


def _is_short(query: Tensor) -> bool:
    return is_short(query.dtype, query.shape[2], query.shape[3])


def _keeps_statistics(query: Tensor) -> bool:
    return keeps_statistics(int(query.shape[2]))  # it can be a symbol, which has to become a number


class _WindowAttention(torch.autograd.Function):
    """Saves query, key, value, bias and mask; where needed the output and statistics; never scores."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, statistics = _window_attention(*arguments)
        query, key, value, bias, mask, seed, *ctx.numbers = arguments
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # no zeros for the statistics'
        kept = (out, statistics) if _keeps_statistics(query) else (None, None)
        ctx.save_for_backward(query, key, value, *kept, bias, mask, seed)
        return out, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
        query, key, value, out, statistics, bias, mask, seed = ctx.saved_tensors
        needs_bias = bias is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dbias = _window_attention_backward(
            dout, query, key, value, out, statistics, bias, mask, seed, *ctx.numbers, needs_bias
        )
        return dq, dk, dv, dbias if needs_bias else None, *[None] * 4


@torch.library.impl(_library, "window_attention", "Autograd")
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments[:4]):
        return _WindowAttention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _window_attention(*arguments)
