"""FlexAttention adapter: the same problem through `torch.nn.attention.flex_attention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ...layout import BlockLayout
from .bias import Bias, RelativeBias1d, RelativeBias2d

_SMALLEST_HEAD_DIM = 16


def unsupported_reasons(
    query: Tensor, head_dim: int, layout: BlockLayout, needs_grad: bool, dropout_p: float = 0.0
) -> list[str]:
    """Why FlexAttention cannot run this; empty when it can. Of the query, device and dtype count."""
    reasons = []
    if dropout_p > 0:
        reasons.append(f"dropout is not supported; got dropout_p={dropout_p}")
    if needs_grad and not query.is_cuda:
        reasons.append(f"gradients need a GPU; got tensors on {query.device}")
    if query.dtype == torch.float64:
        reasons.append("float64 is not supported")
    if query.is_cuda and head_dim < _SMALLEST_HEAD_DIM:
        reasons.append(f"head_dim must be at least {_SMALLEST_HEAD_DIM}; got {head_dim}")
    for name, block in (("query_block", layout.query_block), ("key_block", layout.key_block)):
        if query.is_cuda and (block < 16 or block & (block - 1)):
            reasons.append(f"the layout's {name} must be a power of two of at least 16; got {block}")
    return reasons


def attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, bias: Bias | None, scale: float
) -> Tensor:
    """FlexAttention with the layout's own lists as its block mask; compiled on a GPU, eager on a CPU."""
    compiles = query.is_cuda and not torch.compiler.is_compiling()
    attend: Callable[..., object] = _compiled() if compiles else flex_attention  # type: ignore[assignment]
    out = attend(
        query, key, value, score_mod=_score_mod(bias), block_mask=layout.to_flex(), scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _score_mod(bias: Bias | None) -> Callable[..., Tensor] | None:
    match bias:
        case None:
            return None
        case RelativeBias2d():
            y, x = bias.coordinates()
            a, b = bias.reach
            table = bias.table

            def by_cells(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                rows = (y[q] - y[k]).clamp(1 - a, a - 1) + a - 1
                columns = (x[q] - x[k]).clamp(1 - b, b - 1) + b - 1
                return score + table[rows * (2 * b - 1) + columns, head]

            return by_cells
        case RelativeBias1d():
            kernel, distances = bias.kernel, bias.table

            def by_distance(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return score + distances[head, (k - q).clamp(1 - kernel, kernel - 1) + kernel - 1]

            return by_distance
        case Tensor():
            dense = bias

            def by_pair(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return score + dense[head, q, k]

            return by_pair
