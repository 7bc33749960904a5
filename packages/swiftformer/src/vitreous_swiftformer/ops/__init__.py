"""The operations of SwiftFormer: additive attention between its linear maps, and the convolutional block."""

from .api import additive_attention, additive_attention_packed, conv_encoder
from .backends import BACKENDS, Backend, choose_backend

__all__ = ["BACKENDS", "Backend", "additive_attention", "additive_attention_packed", "choose_backend", "conv_encoder"]
