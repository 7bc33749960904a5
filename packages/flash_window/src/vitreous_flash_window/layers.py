"""Small layers of Swin, and building them from the dict configs that MMPretrain users write.

A config is a dict with `type`, a name listed here or an `nn.Module` subclass, and keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitreous_core.hooks import has_hooks
from vitreous_core.ops.sum_norm import add_branch, sum_norm

LayerConfig = Mapping[str, Any]

LAYER_NORM: LayerConfig = {"type": "LN"}

_NORMS = {"LN": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
_ACTIVATIONS = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


class DropPath(nn.Module):
    """Stochastic depth per image (Huang et al. 2016): in training a branch is zero with `drop_prob`, else rescaled.

    Args:
        drop_prob: in `[0, 1)`.
    """

    def __init__(self, drop_prob: float = 0.1) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1); got {drop_prob}")
        self.drop_prob = drop_prob

    def factor(self, x: Tensor) -> Tensor | None:
        """What each image of `x` `[B, ...]` is multiplied by, `[B]`: zero or `1 / (1 - drop_prob)`; None for one."""
        if not self.training or self.drop_prob == 0.0:
            return None
        keep = 1.0 - self.drop_prob
        # Drawn in at least float32: bfloat16 has too few values near 1 for the rate to come out right.
        noise = torch.rand(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return noise.add_(keep).floor_().div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` to the same shape."""
        factor = self.factor(x)
        return x if factor is None else scale_images(x, factor)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def scale_images(x: Tensor, factor: Tensor) -> Tensor:
    """`x` `[B, ...]` with each image times its factor `[B]`, in the dtype of `x`."""
    return (x * factor.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def drop_rate(drop: nn.Module) -> float:
    """The rate at which `drop` leaves out whole images now; zero for other dropout."""
    return drop.drop_prob if isinstance(drop, DropPath) and drop.training else 0.0


def apply_drop(drop: nn.Module, branch: Tensor, factor: Tensor | None = None) -> Tensor:
    """`drop(branch)`, with the factor `[B]` that stochastic depth puts on its images if that is drawn already."""
    return drop(branch) if factor is None else scale_images(branch, factor)


def split_drop(drop: nn.Module, branch: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A branch and the factor `[B]` that `drop` puts on its images, for a sum to apply; other dropout acts at once.

    The factor is drawn unless it is given.
    """
    if not isinstance(drop, DropPath):
        return drop(branch), None
    return branch, drop.factor(branch) if factor is None else factor


def sum_and_norm(
    norm: nn.Module, shortcut: Tensor, branch: Tensor | None = None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`shortcut + factor * branch` and its norm, for a linear layer to take: in autocast's dtype.

    One kernel each way where it is a plain layer norm on a GPU; see `vitreous_core.ops.sum_norm`.
    """
    if is_plain_norm(norm) and (branch is None or torch.promote_types(shortcut.dtype, branch.dtype) == shortcut.dtype):
        return sum_norm(shortcut, branch, norm.weight, norm.bias, factor=factor, eps=norm.eps)
    total = shortcut if branch is None else add_branch(shortcut, branch, factor)
    return total, norm(total)


def apply_norm(norm: nn.Module, x: Tensor, to_linear: bool = False) -> Tensor:
    """The norm of `x`: float32 under autocast as PyTorch has it, or, for a linear layer to take, autocast's dtype."""
    if not is_plain_norm(norm) or not x.is_cuda:
        return norm(x)
    autocast = torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
    dtype = None if to_linear or not autocast else torch.float32
    return sum_norm(x, None, norm.weight, norm.bias, eps=norm.eps, dtype=dtype)[1]


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether `norm` is a layer norm with both parameters and nobody listens to its calls."""
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return False
    return not has_hooks(norm)


_DROPOUTS = {"DropPath": DropPath, "Dropout": nn.Dropout}


def build_norm(config: LayerConfig | None, channels: int) -> nn.Module:
    """A norm over the last dimension; identity for None. `requires_grad=False` freezes it."""
    if config is None:
        return nn.Identity()
    layer, arguments = _layer_type("norm_cfg", config, _NORMS)
    requires_grad = arguments.pop("requires_grad", True)
    return layer(channels, **{"eps": 1e-5, **arguments}).requires_grad_(requires_grad)


def build_activation(config: LayerConfig) -> nn.Module:
    """An activation layer."""
    layer, arguments = _layer_type("act_cfg", config, _ACTIVATIONS)
    return layer(**arguments)


def build_dropout(config: LayerConfig | None) -> nn.Module:
    """A `DropPath` or `Dropout` with its `drop_prob`; identity for None."""
    if config is None:
        return nn.Identity()
    layer, arguments = _layer_type("dropout_layer", config, _DROPOUTS)
    if layer is nn.Dropout and "drop_prob" in arguments:
        arguments["p"] = arguments.pop("drop_prob")
    return layer(**arguments)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """`(height, width)` from one number or two."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    raise TypeError(f"{name} must be an int or a pair of ints; got {value!r}")


def _layer_type(
    argument: str, config: LayerConfig, known: Mapping[str, type[nn.Module]]
) -> tuple[type[nn.Module], dict[str, Any]]:
    if not isinstance(config, Mapping) or "type" not in config:
        raise TypeError(f"{argument} must be a dict with the key 'type', or None; got {config!r}")
    arguments = dict(config)
    kind = arguments.pop("type")
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind, arguments
    if kind not in known:
        raise ValueError(f"{argument}: type must be one of {sorted(known)} or an nn.Module class; got {kind!r}")
    return known[kind], arguments
