"""The operations of SwiftFormer: additive attention between its linear maps; for inference, blocks and convolutions."""

from .api import (
    additive_attention,
    additive_attention_packed,
    conv_encoder,
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
    "conv_encoder",
    "halving_convolution",
    "pointwise_mlp",
]
