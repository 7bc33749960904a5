"""Hilbert-guided local attention: modules, and the backbones HWT, HNT and NAT (arXiv 2511.05832, 2204.07143).

Importing this registers nothing; `import vitreous_hilbert_attn.mm` does.
"""

from .attention import (
    HilbertNeighborhoodAttention,
    HilbertSlideAttention,
    HilbertWindowAttention,
    resize_bias_table,
)
from .attention_2d import NeighborhoodAttention2d, SlideAttention2d, WindowAttention2d
from .model import HilbertNeighborhoodTransformer, HilbertWindowTransformer, NeighborhoodAttentionTransformer
from .reorder import Curve, permute_tokens

__all__ = [
    "Curve",
    "HilbertNeighborhoodAttention",
    "HilbertNeighborhoodTransformer",
    "HilbertSlideAttention",
    "HilbertWindowAttention",
    "HilbertWindowTransformer",
    "NeighborhoodAttention2d",
    "NeighborhoodAttentionTransformer",
    "SlideAttention2d",
    "WindowAttention2d",
    "permute_tokens",
    "resize_bias_table",
]
