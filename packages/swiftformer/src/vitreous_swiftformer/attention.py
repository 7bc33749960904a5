"""Efficient additive attention, the token mixer of SwiftFormer (arXiv 2303.15446)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


class EfficientAdditiveAttention(nn.Module):
    """Attention linear in the tokens: all queries become one global query, which multiplies every key.

    With `Q`, `K` the projections of the tokens, each token normalised to length one:

        a = Q w_g / sqrt(D)         one weight per token
        a = a / |a|                 length one over the tokens of an image: neither positive nor of sum one
        G = sum_n a_n Q_n           the global query of the image
        out = final(Proj(G * K) + Q)

    Paper: arXiv 2303.15446, section 3, "Efficient Additive Attention". The paper shows neither the
    normalisation of `a` nor that of `K`; both are what the released code and weights do. The first weights that
    were released (same names and shapes) were trained with `a = 1` and are no good here.

    Args:
        dim: channels `D` of a token; there is one head.

    Numerics: lengths are accumulated in fp32 or wider, because the floor of 1e-12 and a sum of squares leave the
    range of fp16.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive; got {dim}")
        self.dim = dim
        self.scale = dim**-0.5
        self.w_g = nn.Parameter(torch.randn(dim, 1))
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim)
        self.Proj = nn.Linear(dim, dim)
        self.final = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each image.

        Args:
            x: `[B, L, dim]`, any strides, any number of tokens from one up.

        Returns:
            `[B, L, dim]`, the dtype of `x` (or of autocast).

        Raises:
            ValueError: for another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be tokens [B, L, {self.dim}]; got {tuple(x.shape)}")
        query = _unit_length(self.to_query(x), dim=-1)
        key = _unit_length(self.to_key(x), dim=-1)
        weights = _unit_length(query @ self.w_g * self.scale, dim=1)  # [B, L, 1]
        global_query = weights.transpose(1, 2) @ query  # [B, 1, D]
        return self.final(self.Proj(global_query * key) + query)


def _unit_length(x: Tensor, dim: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.normalize(x.to(wide), dim=dim, eps=EPS).to(x.dtype)
