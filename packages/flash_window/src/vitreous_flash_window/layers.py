"""Small layers of Swin, and building them from the dict configs that MMPretrain users write.

A config is a dict with `type`, a name listed here or an `nn.Module` subclass, and keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` to the same shape."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        # Drawn in at least float32: bfloat16 has too few values near 1 for the rate to come out right.
        noise = torch.rand(
            (x.shape[0],) + (1,) * (x.ndim - 1),
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        return x / keep * (noise + keep).floor().to(x.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


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
