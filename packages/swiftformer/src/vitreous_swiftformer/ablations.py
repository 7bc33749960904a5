"""The attentions that the paper compares efficient additive attention with: for ablations, in plain PyTorch.

They take the place of `EfficientAdditiveAttention` in a `SwiftFormer(attention=...)`, tokens in and tokens out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops import Backend, additive_attention
from .ops.backends import check_backend
from .ops.reference import unit_length

_HEAD_DIM = 32


class KeyValueAdditiveAttention(nn.Module):
    """Additive attention with the interaction of keys and values that `EfficientAdditiveAttention` leaves out.

    `Q`, `K` and the global query `G` are as there; then the keys are summed to a global key, as the queries were, which
    multiplies the values:

        P_n = G * K_n               what `EfficientAdditiveAttention` passes on
        b = P w_k / sqrt(D)         one weight per token
        b = b / |b|                 length one over the tokens of an image
        out = final(Proj(sum_m b_m P_m * V) + Q)

    Paper: arXiv 2303.15446, section 3, "Efficient Additive Attention", which starts from additive attention with all
    three interactions (Fastformer, arXiv 2108.09084) and drops that of keys and values. The weights `b` are
    normalised as SwiftFormer's `a` is, not by Fastformer's softmax, so that nothing but the interaction differs. Values
    are not normalised.

    Args:
        dim: channels `D` of a token; there is one head.
        backend: of the interaction of queries and keys, as in `EfficientAdditiveAttention`.

    Raises:
        ValueError: for a `dim` out of range or an unknown backend.
    """

    def __init__(self, dim: int, backend: Backend = "auto") -> None:
        super().__init__()
        _check_dim(dim)
        check_backend(backend)
        self.dim = dim
        self.backend = backend
        self.scale = dim**-0.5
        self.w_g = nn.Parameter(torch.randn(dim, 1))
        self.w_k = nn.Parameter(torch.randn(dim, 1))
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim)
        self.to_value = nn.Linear(dim, dim)
        self.Proj = nn.Linear(dim, dim)
        self.final = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each image: `[B, L, dim]` in and out, as `EfficientAdditiveAttention.forward`."""
        _check_tokens(x, self.dim)
        query, mixed = additive_attention(
            self.to_query(x), self.to_key(x), self.w_g.flatten(), scale=self.scale, backend=self.backend
        )
        weights = unit_length(mixed @ self.w_k.to(mixed.dtype) * self.scale, dim=1)  # [B, L, 1]
        global_key = weights.mT @ mixed  # [B, 1, D]
        return self.final(self.Proj(global_key * self.to_value(x)) + query)


class SelfAttention(nn.Module):
    """Multi-head self-attention, `final(concat_h(softmax(Q_h K_h^T / sqrt(d)) V_h))`; no positional bias.

    Paper: arXiv 2303.15446, section 3, "Overview of Attention Modules", figure 2a; it has the four linear maps of
    `EfficientAdditiveAttention`, and so its parameters but for `w_g`.

    Args:
        dim: channels of a token. Heads are as many as divide them and have 32 channels at least, or one.

    Raises:
        ValueError: for a `dim` out of range.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        _check_dim(dim)
        self.dim = dim
        self.num_heads = next(heads for heads in range(max(dim // _HEAD_DIM, 1), 0, -1) if dim % heads == 0)
        self.scale = (dim // self.num_heads) ** -0.5
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim)
        self.to_value = nn.Linear(dim, dim)
        self.final = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each image: `[B, L, dim]` in and out, as `EfficientAdditiveAttention.forward`."""
        _check_tokens(x, self.dim)
        query, key, value = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, H, L, d]
            for layer in (self.to_query, self.to_key, self.to_value)
        )
        attention = (query * self.scale @ key.mT).softmax(dim=-1)
        return self.final((attention @ value).transpose(1, 2).flatten(2))


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim must be positive; got {dim}")


def _check_tokens(x: Tensor, dim: int) -> None:
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x must be tokens [B, L, {dim}]; got {tuple(x.shape)}")
