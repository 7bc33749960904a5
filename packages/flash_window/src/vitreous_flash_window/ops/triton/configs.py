"""Which windows the short kernels take, and their tile shapes, as data.

Nothing here depends on the number of windows, so a shape compiles once.
"""

from __future__ import annotations

from .arguments import padded_head_dim

LARGEST_TOKENS = 256
_LARGEST_TENSOR = 64 * 1024


def fits_on_chip(tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether the short kernels take windows of N tokens: keys and values of one head, 64 KiB each at most, on chip."""
    rows = -(-tokens // 16) * 16
    return tokens <= LARGEST_TOKENS and rows * padded_head_dim(head_dim) * itemsize <= _LARGEST_TENSOR
