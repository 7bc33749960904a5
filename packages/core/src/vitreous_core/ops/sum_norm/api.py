"""The public functions and module: contract, plain path, derivative and choice of backend.

A pre-norm transformer block adds a branch to its tokens and normalises the sum. In eager PyTorch under autocast that is
a scaling, a sum, a layer norm in fp32 and a cast, each a pass over memory, and at the few channels of early vision
stages the layer norm alone takes several times as long as its memory traffic. Here it is one kernel each way.
Layer norm: Ba et al., arXiv 1607.06450; stochastic depth: Huang et al., arXiv 1603.09382.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...autocast import autocast_dtype, without_autocast
from ...errors import BackendUnsupported
from ...triton_support import DTYPES, device_reasons

Backend = Literal["auto", "torch", "triton"]

_MOST_CHANNELS = 8192


def sum_norm(
    shortcut: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    factor: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`tokens = shortcut + factor * branch` and its layer norm over the last axis.

    Args:
        shortcut: `[B, ..., C]`.
        branch: of the same shape, any floating dtype; None adds nothing. Use the tokens returned even then: their
            gradient and that of the norm are summed inside the kernel.
        weight, bias: `[C]`.
        factor: fp32 `[B]`, a factor for each sample (stochastic depth); gets no gradient. None is 1.
        eps: added to the variance.
        dtype: of the norm; None is that of autocast where it is on, else that of the tokens.
        backend: `"torch"` (plain operations, differentiable twice), `"triton"`, or `"auto"`: Triton on a GPU where it
            takes the problem, except under `torch.compile`, which fuses the plain operations with their neighbours.

    Returns:
        The tokens in the dtype of `shortcut`, and their norm.

    Raises:
        ValueError: for shapes that do not fit together or an unknown backend.
        BackendUnsupported: when `backend="triton"` cannot run this.

    Numerics: sums and statistics in fp32 (fp64 for fp64); the norm is that of the rounded tokens.
    """
    _check(shortcut, branch, weight, bias, factor)
    dtype = dtype or _default_dtype(shortcut)
    if backend == "auto":
        plain = torch.compiler.is_compiling() or not shortcut.is_cuda or unsupported_reasons(shortcut, branch, weight)
        backend = "torch" if plain else "triton"
    if backend == "torch":
        return _plain(shortcut, branch, weight, bias, factor, eps, dtype)
    if backend != "triton":
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton'; got {backend!r}")
    reasons = unsupported_reasons(shortcut, branch, weight)
    if reasons:
        raise BackendUnsupported(backend, reasons)
    return _SumNorm.apply(shortcut, branch, weight, bias, factor, eps, dtype)


def unsupported_reasons(shortcut: Tensor, branch: Tensor | None, weight: Tensor) -> list[str]:
    """Why the Triton kernels cannot run this; empty when they can."""
    reasons = device_reasons(shortcut.device)
    for name, tensor in (("shortcut", shortcut), ("branch", branch), ("weight", weight)):
        if tensor is not None and tensor.dtype not in DTYPES:
            reasons.append(f"{name} must be float16, bfloat16 or float32; got {tensor.dtype}")
    if shortcut.shape[-1] > _MOST_CHANNELS:
        reasons.append(f"channels must be at most {_MOST_CHANNELS}; got {shortcut.shape[-1]}")
    return reasons


class SumNorm(nn.LayerNorm):
    """`nn.LayerNorm` over channels, of the sum of a shortcut and a branch; see `sum_norm`.

    Same parameters and state as `nn.LayerNorm(channels, eps)`.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)

    def forward(  # type: ignore[override]  # a norm of a sum has more arguments
        self, shortcut: Tensor, branch: Tensor | None = None, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum and its norm."""
        return sum_norm(shortcut, branch, self.weight, self.bias, factor=factor, eps=self.eps)


def add_branch(shortcut: Tensor, branch: Tensor, factor: Tensor | None = None) -> Tensor:
    """`shortcut + factor * branch` where no norm follows, in the dtype that the two promote to.

    Args:
        shortcut, branch: `[B, ...]`, of one shape, any floating dtypes.
        factor: fp32 `[B]`, a factor for each sample (stochastic depth); gets no gradient. None is 1.
    """
    if factor is None:
        return shortcut + branch
    factor = factor.view(-1, *[1] * (branch.ndim - 1))
    dtype = torch.promote_types(shortcut.dtype, branch.dtype)
    # Compilers fuse the plain form themselves, and Dynamo of PyTorch 2.11 loses the gradients of the other.
    if shortcut.is_cuda and shortcut.dtype == dtype and not torch.compiler.is_compiling():
        total: Tensor = _ScaledSum.apply(shortcut, branch, factor)
        return total
    return (shortcut + branch * factor).to(dtype)


def _default_dtype(shortcut: Tensor) -> torch.dtype:
    # As PyTorch's own rules have it, fp64 stays.
    return shortcut.dtype if shortcut.dtype == torch.float64 else autocast_dtype(shortcut.device) or shortcut.dtype


def _plain(
    shortcut: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, factor: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = shortcut
    if branch is not None:
        if factor is not None:
            branch = branch * factor.view(-1, *[1] * (branch.ndim - 1))
        tokens = (shortcut + branch).to(shortcut.dtype)
    # Not only autocast makes tokens and parameters differ in dtype.
    wide = torch.promote_types(tokens.dtype, weight.dtype)
    return tokens, F.layer_norm(tokens.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)


class _SumNorm(torch.autograd.Function):
    """Saves the tokens and the parameters; the statistics are made again."""

    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, factor: Tensor | None,
        eps: float, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from .kernels import launch_forward

        tokens, normed = launch_forward(shortcut, branch, weight, bias, factor, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.branch_dtype = eps, None if branch is None else branch.dtype
        ctx.save_for_backward(tokens, weight, bias, factor)
        return tokens, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtokens: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        from .kernels import launch_backward

        tokens, weight, bias, factor = ctx.saved_tensors
        gradients = launch_backward(dtokens, dnormed, tokens, weight, bias, factor, ctx.eps, ctx.branch_dtype)
        return *gradients, None, None, None


class _ScaledSum(torch.autograd.Function):
    """One pass over memory each way.

    Written as it stands, autocast would first copy the branch to the wider dtype of the shortcut, and its gradient
    back.
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = branch.dtype
        with without_autocast(shortcut):
            return torch.addcmul(shortcut, branch, factor, out=torch.empty_like(shortcut))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad, torch.mul(grad, factor, out=torch.empty_like(grad, dtype=ctx.dtype)), None


def _check(shortcut: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, factor: Tensor | None) -> None:
    channels = (shortcut.shape[-1],)
    if weight.shape != channels or bias.shape != channels:
        raise ValueError(
            f"weight and bias must have shape {channels}, the channels of shortcut; "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if branch is not None and branch.shape != shortcut.shape:
        raise ValueError(f"branch must have the shape of shortcut, {tuple(shortcut.shape)}; got {tuple(branch.shape)}")
    if factor is not None and (branch is None or factor.shape != shortcut.shape[:1]):
        raise ValueError(
            f"factor must have shape {tuple(shortcut.shape[:1])}, one for each sample of a branch; "
            f"got {tuple(factor.shape)}{'' if branch is not None else ' without a branch'}"
        )
