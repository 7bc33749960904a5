"""A Swin V1 block between two sums as one node of autograd's graph, for eager training on the kernels.

Written out of modules, a block is some 40 nodes and hooks of autocast around a dozen kernels, and at the speed of a GPU
the host spends longer on them than the GPU on the kernels. Here the same operations run one after another below
autograd, forward and backward: results and gradients are the modules', bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.jit._trace import is_tracing
from torch.nn import functional as F

from vitreous_core.autocast import autocast_dtype
from vitreous_core.hooks import has_hooks
from vitreous_core.ops.sum_norm.api import unsupported_reasons

from .attention import FlashShiftWindowMSA, FlashWindowMSA
from .layers import DropPath, is_plain_norm
from .ops.backends import Problem, resolve

if TYPE_CHECKING:
    from .model import SwinBlock

Shape = tuple[int, int]

_attention = torch.ops.vitreous_flash_window.shifted_window_attention.default
_attention_backward = torch.ops.vitreous_flash_window.shifted_window_attention_backward.default


class Settings(NamedTuple):
    """What a block's node takes beside its tensors."""

    dtype: torch.dtype  # of products: autocast's, or that of all parameters
    shape: Shape
    attention: tuple[int, int, int, float, float]  # heads, window size, shift, scale, dropout
    eps: tuple[float, float]
    approximate: str


def run(
    block: SwinBlock, x: Tensor, branch: Tensor | None, factor: Tensor | None, shape: Shape, attn_factor: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """`SwinBlock.attend_and_feed` up to the last branch's dropout; arguments as there.

    Returns:
        Tokens, and the branch to be added to them; None where the modules must run: without gradients or kernels,
        compiled, with other layers in the place of the usual ones, dropout inside branches, or somebody listening.
    """
    if torch.compiler.is_compiling() or is_tracing() or not torch.is_grad_enabled() or x.dtype == torch.float64:
        return None
    attn, ffn, norm1, norm2 = block.attn, block.ffn, block.norm1, block.norm2
    window, drop = attn.w_msa, attn.drop
    is_usual = type(attn) is FlashShiftWindowMSA and type(window) is FlashWindowMSA and type(drop) is DropPath
    if not is_usual or len(ffn.layers) != 3 or has_hooks(attn) or has_hooks(ffn):
        return None
    hidden, last, dropout = ffn.layers
    first, activation, hidden_dropout = hidden
    linears = window.qkv, window.proj, first, last
    if not _are_plain(linears, (window.attn_drop, window.proj_drop, hidden_dropout, dropout), activation):
        return None
    if not is_plain_norm(norm1) or not is_plain_norm(norm2):
        return None
    autocast = autocast_dtype(x.device)
    settings = Settings(
        autocast or x.dtype,
        shape,
        (window.num_heads, attn.window_size, attn.shift_on(*shape), float(window.scale), 0.0),
        (norm1.eps, norm2.eps),
        activation.approximate,
    )
    norms = norm1.weight, norm1.bias, norm2.weight, norm2.bias
    parameters = [parameter for layer in linears for parameter in (layer.weight, layer.bias)]
    expected = torch.float32 if autocast else x.dtype
    # Exactly a parameter: subclasses (distributed, quantised) know better how to cast themselves.
    if any(type(parameter) is not nn.Parameter or parameter.dtype != expected for parameter in parameters):
        return None
    table = window.relative_position_bias_table
    if not _fit(settings, x, branch, norms, table) or not _run_on_kernels(settings, x, branch, norms, window):
        return None
    if attn_factor is None:
        attn_factor = drop.factor(x)
    out: tuple[Tensor, Tensor] = _Block.apply(settings, x, branch, factor, attn_factor, *norms, table, *parameters)
    return out


def _are_plain(linears: Sequence[nn.Module], dropouts: Sequence[nn.Module], activation: nn.Module) -> bool:
    """Whether nothing is in the place of the usual layers, nobody listens to them, and no dropout acts."""
    for layer in linears:
        if type(layer) is not nn.Linear or layer.bias is None or has_hooks(layer):
            return False
    for layer in dropouts:
        if type(layer) is not nn.Dropout or (layer.p > 0.0 and layer.training) or has_hooks(layer):
            return False
    return type(activation) is nn.GELU and not has_hooks(activation)


def _fit(settings: Settings, x: Tensor, branch: Tensor | None, norms: Sequence[Tensor], table: Tensor) -> bool:
    """Whether shapes and dtypes are the usual ones; where they are not the modules know what to do or to say."""
    (height, width), (heads, side, *_), dtype = settings.shape, settings.attention, settings.dtype
    return (
        x.ndim == 3
        and x.shape[1:] == (height * width, norms[0].shape[0])
        and norms[2].shape == norms[0].shape
        and table.shape == ((2 * side - 1) ** 2, heads)
        and table.dtype in (dtype, torch.float32)
        and table.device == x.device
        # Tokens stay as wide as they are.
        and torch.promote_types(x.dtype, dtype) == x.dtype
        and (branch is None or branch.dtype == dtype)
    )


def _run_on_kernels(
    settings: Settings, x: Tensor, branch: Tensor | None, norms: Sequence[Tensor], window: FlashWindowMSA
) -> bool:
    tokens, precision = settings.attention[1] ** 2, torch.get_float32_matmul_precision()
    problem = Problem(x.device, settings.dtype, tokens, window.head_dim, matmul_precision=precision, on_image=True)
    return resolve(window.backend, problem) == "triton" and not unsupported_reasons(x, branch, norms[0])


def _cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one dtype in another, by one launch; autocast makes one for each."""
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(casts, tensors)
    return casts


def _parameter_gradients(
    grad: Tensor, inputs: Tensor, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of a linear layer's weight and bias, from the gradient of its output and its inputs, `[B * L, channels]`."""
    return grad.t().mm(inputs) if needs_weight else None, grad.sum(0) if needs_bias else None


class _Block(torch.autograd.Function):
    """Saves what its kernels take: tokens, norms, qkv, the attended map and the hidden one; never scores."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        x: Tensor,
        branch: Tensor | None,
        factor: Tensor | None,
        attn_factor: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from vitreous_core.ops.sum_norm.kernels import launch_forward

        dtype, shape, numbers, eps, approximate = settings
        *norms, table = parameters[:5]
        linears = parameters[5:]
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.branch_dtype = settings, None if branch is None else branch.dtype
        ctx.is_cast = linears[0].dtype != dtype
        with torch._C._AutoDispatchBelowAutograd():
            qkv_weight, qkv_bias, proj_weight, proj_bias, *ffn = (
                _cast_together(linears, dtype) if ctx.is_cast else linears
            )
            tokens, normed = launch_forward(x, branch, norms[0], norms[1], factor, eps[0], dtype)
            normed = normed.flatten(0, 1)
            qkv = F.linear(normed, qkv_weight, qkv_bias).view(x.shape[0], *shape, qkv_bias.shape[0])
            # As everywhere, padded tokens are the bias; where nothing is padded they would get a gradient of zeros.
            pad = parameters[6] if shape[0] % numbers[1] or shape[1] % numbers[1] else None
            attended, statistics = _attention(qkv, table, pad, None, None, *numbers)
            attended = attended.flatten(0, 2)
            mixed = F.linear(attended, proj_weight, proj_bias).view(x.shape)
            total, fed = launch_forward(tokens, mixed, norms[2], norms[3], attn_factor, eps[1], dtype)
            fed = fed.flatten(0, 1)
            hidden = F.linear(fed, ffn[0], ffn[1])
            out = F.linear(F.gelu(hidden, approximate=approximate), ffn[2], ffn[3]).view(x.shape)
        kept = statistics if statistics.numel() else None
        ctx.save_for_backward(
            tokens, normed, qkv, attended, kept, total, fed, hidden, factor, attn_factor, table, pad, *norms,
            qkv_weight, proj_weight, ffn[0], ffn[2],
        )  # fmt: skip
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        from vitreous_core.ops.sum_norm.kernels import launch_backward

        (
            tokens, normed, qkv, attended, statistics, total, fed, hidden, factor, attn_factor, table, pad, *norms,
            qkv_weight, proj_weight, first_weight, last_weight,
        ) = ctx.saved_tensors  # fmt: skip
        dtype, _, numbers, eps, approximate = ctx.settings
        needs = ctx.needs_input_grad[5:]
        needs_table, needs_linears = needs[4], needs[5:]
        if dout is None:
            dout = torch.zeros_like(total, dtype=dtype)
        with torch._C._AutoDispatchBelowAutograd():
            dout = dout.flatten(0, 1)
            dlast = _parameter_gradients(dout, F.gelu(hidden, approximate=approximate), *needs_linears[6:])
            dhidden = torch.ops.aten.gelu_backward(dout.mm(last_weight), hidden, approximate=approximate)
            dfirst = _parameter_gradients(dhidden, fed, *needs_linears[4:6])
            dtokens, dmixed, *dnorm2 = launch_backward(
                dtotal, dhidden.mm(first_weight), total, norms[2], norms[3], attn_factor, eps[1], dtype
            )
            dmixed = dmixed.flatten(0, 1)
            dproj = _parameter_gradients(dmixed, attended, *needs_linears[2:4])
            attended_shape = *qkv.shape[:3], attended.shape[1]
            dattended = dmixed.mm(proj_weight).view(attended_shape)
            kept = (None, None) if statistics is None else (attended.view(attended_shape), statistics)
            needs_pad = pad is not None and needs_linears[1]
            dqkv, dtable, dpad, _ = _attention_backward(
                dattended, qkv, *kept, table, pad, None, None, *numbers, needs_table, needs_pad, False
            )
            dqkv = dqkv.flatten(0, 2)
            dlinears = [*_parameter_gradients(dqkv, normed, *needs_linears[:2]), *dproj, *dfirst, *dlast]
            dx, dbranch, *dnorm1 = launch_backward(
                dtokens, dqkv.mm(qkv_weight), tokens, norms[0], norms[1], factor, eps[0], ctx.branch_dtype
            )
            given = [gradient for gradient in dlinears if gradient is not None]
            wide = iter(_cast_together(given, torch.float32) if ctx.is_cast else given)
            dlinears = [None if gradient is None else next(wide) for gradient in dlinears]
            if needs_pad:
                dlinears[1] = dlinears[1] + dpad
        return None, dx, dbranch, None, None, *dnorm1, *dnorm2, dtable if needs_table else None, *dlinears
