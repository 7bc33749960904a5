"""Hilbert-guided local attention: modules, and the backbones HWT and HNT (arXiv 2511.05832).

Importing this registers nothing; `import vitreous_hilbert_attn.mm` does.
"""

from .attention import (
    HilbertNeighborhoodAttention,
    HilbertSlideAttention,
    HilbertWindowAttention,
    permute_tokens,
    resize_bias_table,
)
from .model import HilbertNeighborhoodTransformer, HilbertWindowTransformer

__all__ = [
    "HilbertNeighborhoodAttention",
    "HilbertNeighborhoodTransformer",
    "HilbertSlideAttention",
    "HilbertWindowAttention",
    "HilbertWindowTransformer",
    "permute_tokens",
    "resize_bias_table",
]
