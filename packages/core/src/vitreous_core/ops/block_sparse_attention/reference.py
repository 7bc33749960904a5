"""The truth: dense masked attention in plain torch, any device, any floating dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import BlockLayout
from .bias import Bias, RelativeBias1d, RelativeBias2d
from .dropout import keep_mask


def attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, bias: Bias | None, scale: float,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`softmax(scale q k^T + bias)` over visible keys, times v; dropped weights are 0, kept ones `1 / (1 - p)` larger.

    Numerics: scores, softmax and sums in fp32 (fp64 for fp64 inputs); rounded once to the input dtype. A row that
    sees no key is zero.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1).to(wide)
    value = value.repeat_interleave(groups, dim=1).to(wide)

    scores = query.to(wide) @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + _dense_bias(bias, layout.length).to(wide)
    visible = layout.to_dense()
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    # A row of -inf alone gives NaN; masking it again also gives its gradient the zero it must have.
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    if dropout_seed is not None:
        keep = keep_mask(dropout_seed, dropout_p, *query.shape[:3])
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    return (weights @ value).to(query.dtype)


def _dense_bias(bias: Bias, length: int) -> Tensor:
    match bias:
        case RelativeBias2d():
            return bias.dense()
        case RelativeBias1d():
            return bias.dense(length)
        case Tensor():
            return bias
