"""Triton kernels of block-sparse attention. Nothing is built yet: `unsupported_reasons` refuses every problem."""

from __future__ import annotations

from torch import Tensor

from ....layout import BlockLayout


def unsupported_reasons(query: Tensor, layout: BlockLayout, needs_grad: bool) -> list[str]:
    """Why the Triton kernels cannot run this; empty when they can."""
    reasons = ["the Triton kernels of block_sparse_attention are not part of this release"]
    if not query.is_cuda:
        reasons.append(f"tensors must be on a CUDA device; got {query.device}")
    return reasons
