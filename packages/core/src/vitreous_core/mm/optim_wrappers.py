"""Optimizer wrappers that MMEngine lacks: adaptive gradient clipping, and mixed precision on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmpretrain.registry import OPTIM_WRAPPERS
from torch import Tensor, nn


@torch.no_grad()
def adaptive_clip_grad_(parameters: Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Scale down, in place, every unit's gradient that is large beside the unit's weights.

    Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization", eq. 3:
    `G_i <- clip_factor * W_i* / |G_i| * G_i` where `|G_i| / W_i* > clip_factor`, `W_i* = max(|W_i|, eps)`.
    A unit is one output row of a linear map or convolution; a bias, gain or scalar is one unit as a whole.

    Args:
        parameters: those without a gradient are left alone.
        clip_factor: largest allowed ratio of gradient norm to weight norm.
        eps: smallest weight norm, so that weights that start at zero can leave it.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        limit = _unit_norm(parameter).clamp_(min=eps).mul_(clip_factor)
        norm = _unit_norm(parameter.grad)
        # A gradient of zero divides by `limit`, not by itself.
        parameter.grad.mul_(limit / torch.maximum(norm, limit))


def _unit_norm(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


class _AdaptiveClipping:
    """Teaches an optimizer wrapper `clip_grad=dict(type="agc", clip_factor=..., eps=...)`."""

    def __init__(self, *args: Any, clip_grad: dict | None = None, **kwargs: Any) -> None:
        adaptive = clip_grad is not None and clip_grad.get("type") == "agc"
        arguments = {"clip_grad": None if adaptive else clip_grad, **kwargs}
        super().__init__(*args, **arguments)  # the wrapper that this is mixed into
        if adaptive:
            assert clip_grad is not None
            settings = {"clip_factor": 0.01, "eps": 1e-3} | {k: v for k, v in clip_grad.items() if k != "type"}
            if surplus := settings.keys() - {"clip_factor", "eps"}:
                raise ValueError(f"clip_grad of type 'agc' takes clip_factor and eps; got also {sorted(surplus)}")
            self.clip_func = adaptive_clip_grad_
            self.clip_grad_kwargs = settings
            self.grad_name = "agc"


@OPTIM_WRAPPERS.register_module()
class AGCOptimWrapper(_AdaptiveClipping, OptimWrapper):
    """MMEngine's `OptimWrapper` with adaptive gradient clipping, see `adaptive_clip_grad_`."""


@OPTIM_WRAPPERS.register_module()
class AGCAmpOptimWrapper(_AdaptiveClipping, AmpOptimWrapper):
    """MMEngine's `AmpOptimWrapper` with adaptive gradient clipping, applied to unscaled gradients."""


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """bfloat16 autocast on a CPU, where MMEngine's `AmpOptimWrapper` refuses to run. Needs no loss scale."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPERS.register_module()
class AGCCPUAmpOptimWrapper(_AdaptiveClipping, CPUAmpOptimWrapper):
    """bfloat16 autocast on a CPU with adaptive gradient clipping."""
