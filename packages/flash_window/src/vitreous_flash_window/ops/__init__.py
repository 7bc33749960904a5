"""The operations of Flash Window Attention: attention on cut windows, and on the packed image."""

from .api import shifted_window_attention, window_attention
from .backends import BACKENDS, Backend, choose_backend

__all__ = ["BACKENDS", "Backend", "choose_backend", "shifted_window_attention", "window_attention"]
