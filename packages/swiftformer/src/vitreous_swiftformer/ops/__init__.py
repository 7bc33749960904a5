"""The operation of SwiftFormer: the part of efficient additive attention between its linear maps."""

from .api import additive_attention, additive_attention_packed
from .backends import BACKENDS, Backend, choose_backend

__all__ = ["BACKENDS", "Backend", "additive_attention", "additive_attention_packed", "choose_backend"]
