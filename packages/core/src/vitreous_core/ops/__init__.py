"""Operations: one folder each, with its contract, its plain-torch truth and its fast backends.

The function stands here under its folder's name; `from vitreous_core.ops.block_sparse_attention import ...` still
reaches the rest of the folder.
"""

from .block_sparse_attention import RelativeBias1d, RelativeBias2d, block_sparse_attention, packed_attention
from .sum_norm import SumNorm, sum_norm

__all__ = ["RelativeBias1d", "RelativeBias2d", "SumNorm", "block_sparse_attention", "packed_attention", "sum_norm"]
