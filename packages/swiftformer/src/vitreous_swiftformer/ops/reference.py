"""The truth, in plain PyTorch: additive attention between its linear maps; MLPs and convolutions in deploy mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12
"""No length counts as less."""


def additive_attention(query: Tensor, key: Tensor, w_g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Unit queries and the product of global query and unit keys; arguments as in `api.additive_attention`."""
    query, key = unit_length(query, dim=-1), unit_length(key, dim=-1)
    weights = unit_length(query @ w_g.to(query.dtype)[:, None] * scale, dim=1)  # [B, L, 1]
    global_query = weights.transpose(1, 2) @ query  # [B, 1, D]
    return query, global_query * key


def pointwise_mlp(
    x: Tensor, residual: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:  # fmt: skip
    """Arguments as in `api.pointwise_mlp`."""
    return residual + F.conv2d(F.gelu(F.conv2d(x, weight1, bias1)), weight2, bias2)


def halving_convolution(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """Arguments as in `api.halving_convolution`."""
    out = F.conv2d(x, weight, bias, stride=2, padding=1)
    return out.relu() if relu else out


def unit_length(x: Tensor, dim: int) -> Tensor:
    """`x` over its length along `dim`, which is summed in fp32 or wider: squares leave the range of fp16."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    return (x / length.clamp_min(EPS)).to(x.dtype)
