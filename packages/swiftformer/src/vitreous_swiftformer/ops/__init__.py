"""The operations of SwiftFormer: additive attention between its linear maps; for inference, MLPs and convolutions."""

from .api import (
    additive_attention,
    additive_attention_packed,
    halving_convolution,
    pointwise_mlp,
)
from .backends import BACKENDS, Backend, choose_backend, choose_halving_backend, choose_mlp_backend

__all__ = [
    "BACKENDS",
    "Backend",
    "additive_attention",
    "additive_attention_packed",
    "choose_backend",
    "choose_halving_backend",
    "choose_mlp_backend",
    "halving_convolution",
    "pointwise_mlp",
]
