"""The registered operators on the packed image: schema, fakes, autograd. Kernels are imported when first run.

Both operators are functional: outputs never alias inputs. Autocast is applied above them, in `api`, since
`torch.library` can only cast to one fixed dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton.arguments import rows_of_statistics
from .triton.shifted_arguments import Problem, with_contiguous_rows
from .triton.shifted_configs import LARGEST_TILE, fits_on_chip

# As in `contracts`: `custom_op` would be shorter, and its Python layers cost more than a small kernel.
_library = torch.library.Library("vitreous_flash_window", "FRAGMENT")
_NUMBERS = "int num_heads, int window_size, int shift_size, float scale, float dropout_p"
_library.define(
    "shifted_window_attention(Tensor qkv, Tensor? bias_table, Tensor? pad_qkv, Tensor? logit_scale, Tensor? seed, "
    f"{_NUMBERS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "shifted_window_attention_backward(Tensor dout, Tensor qkv, Tensor? out, Tensor? statistics, Tensor? bias_table, "
    f"Tensor? pad_qkv, Tensor? logit_scale, Tensor? seed, {_NUMBERS}, bool needs_table, bool needs_pad, "
    "bool needs_logit) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_shifted_window_attention = torch.ops.vitreous_flash_window.shifted_window_attention.default
_shifted_window_attention_backward = torch.ops.vitreous_flash_window.shifted_window_attention_backward.default


def shifted_window_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    logit_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window_size: int,
    shift_size: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Call the operator; arguments as its implementation's."""
    out, _ = _shifted_window_attention(
        qkv, bias_table, pad_qkv, logit_scale, seed, num_heads, window_size, shift_size, scale, dropout_p
    )
    return out


@torch.library.impl(_library, "shifted_window_attention", "CompositeExplicitAutograd")
def _forward(
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    logit_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window_size: int,
    shift_size: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, height, width, C]` and statistics of the rows of scores.

    The latter are fp32 `[1 or 2, B*W, H, N]`, see `triton.arguments.rows_of_statistics`; `[0]` for windows of one tile.

    Args:
        qkv, bias_table, pad_qkv, logit_scale, num_heads, window_size, shift_size: as in `api`.
        seed: int64 `[]`, of the dropout; None without.
        scale, dropout_p: as in `api`; the scale is not used with `logit_scale`.
    """
    problem = Problem(
        with_contiguous_rows(qkv), bias_table, pad_qkv, logit_scale, seed,
        num_heads, window_size, shift_size, scale, dropout_p,
    )  # fmt: skip
    if _is_short(qkv, num_heads, window_size):
        from .triton.shifted_forward import launch_shifted_forward

        return launch_shifted_forward(problem)
    from .triton.shifted_long_forward import launch_shifted_long_forward

    return launch_shifted_long_forward(*problem)


@torch.library.register_fake("vitreous_flash_window::shifted_window_attention", lib=_library)
def _(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    num_heads, window_size = rest[4:6]
    batch, height, width, packed = qkv.shape
    out = qkv.new_empty((batch, height, width, packed // 3))
    rows: tuple[Any, ...] = (0,)
    if _keeps_output(qkv, num_heads, window_size):
        windows = batch * (-(-height // window_size)) * (-(-width // window_size))
        rows = (rows_of_statistics(qkv.dtype), windows, num_heads, window_size**2)
    return out, qkv.new_empty(rows, dtype=torch.float32)


@torch.library.impl(_library, "shifted_window_attention_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    statistics: Tensor | None,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    logit_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window_size: int,
    shift_size: int,
    scale: float,
    dropout_p: float,
    needs_table: bool,
    needs_pad: bool,
    needs_logit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv (contiguous), table, padding and logit scale, the last three empty unless needed.

    `out` and `statistics` are given where the forward pass left the latter.
    """
    dout = with_contiguous_rows(dout)
    problem = Problem(
        with_contiguous_rows(qkv), bias_table, pad_qkv, logit_scale, seed,
        num_heads, window_size, shift_size, scale, dropout_p,
    )  # fmt: skip
    needs = (needs_table, needs_pad, needs_logit)
    if _is_short(qkv, num_heads, window_size):
        from .triton.shifted_backward import launch_shifted_backward

        return launch_shifted_backward(dout, out, statistics, problem, *needs)
    from .triton.shifted_long_backward import launch_shifted_long_backward

    assert out is not None
    assert statistics is not None
    return launch_shifted_long_backward(dout, problem.qkv, out, statistics, *problem[1:], *needs)


@torch.library.register_fake("vitreous_flash_window::shifted_window_attention_backward", lib=_library)
def _(dout: Tensor, qkv: Tensor, out: Tensor | None, statistics: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    shared = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else qkv.new_empty(0)
        for tensor, needed in zip(rest[:3], rest[-3:], strict=True)
    )
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), *shared


def _is_short(qkv: Tensor, num_heads: int, window_size: int) -> bool:
    # A head dim is a constant even where sizes are symbols: kernels are compiled for it.
    return fits_on_chip(window_size**2, int(qkv.shape[3]) // 3 // num_heads, qkv.element_size())


def _keeps_output(qkv: Tensor, num_heads: int, window_size: int) -> bool:
    """Whether the backward pass needs output and statistics: not where it holds a whole window."""
    return window_size**2 > LARGEST_TILE or not _is_short(qkv, num_heads, window_size)


class _ShiftedWindowAttention(torch.autograd.Function):
    """Saves the inputs; of windows of several chunks the output and statistics too; never the scores."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, statistics = _shifted_window_attention(*arguments)
        qkv, *others = arguments[:5]
        ctx.numbers = arguments[5:]
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # no zeros for the statistics'
        num_heads, window_size, *_ = ctx.numbers
        kept = (out, statistics) if _keeps_output(qkv, num_heads, window_size) else (None, None)
        ctx.save_for_backward(qkv, *kept, *others)
        return out, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: recomputation (torch.utils.checkpoint) gives them out a single time
        needs = [
            tensor is not None and needed for tensor, needed in zip(saved[3:6], ctx.needs_input_grad[1:4], strict=True)
        ]
        dqkv, *shared = _shifted_window_attention_backward(dout, *saved, *ctx.numbers, *needs)
        shared = [gradient if needed else None for gradient, needed in zip(shared, needs, strict=True)]
        return dqkv, *shared, *[None] * 6


@torch.library.impl(_library, "shifted_window_attention", "Autograd")
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments[:4]):
        return _ShiftedWindowAttention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _shifted_window_attention(*arguments)
