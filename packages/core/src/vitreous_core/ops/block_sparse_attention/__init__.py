"""Attention restricted to the visible pairs of a `BlockLayout`."""

from .api import BACKENDS, Backend, block_sparse_attention, choose_backend, packed_attention
from .bias import DENSE_BIAS_LIMIT, Bias, RelativeBias1d, RelativeBias2d

__all__ = [
    "BACKENDS",
    "DENSE_BIAS_LIMIT",
    "Backend",
    "Bias",
    "RelativeBias1d",
    "RelativeBias2d",
    "block_sparse_attention",
    "choose_backend",
    "packed_attention",
]
