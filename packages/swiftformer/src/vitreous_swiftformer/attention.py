"""Efficient additive attention, the token mixer of SwiftFormer (arXiv 2303.15446)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitreous_core.fold import exact

from .ops import Backend, additive_attention, additive_attention_packed
from .ops.backends import check_backend, resolve
from .ops.reference import unit_length
from .pointwise import PointwiseConv2d


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
        backend: what computes the part between the linear maps: `"torch"`, `"triton"`, or `"auto"`, which chooses (see
            `ops.choose_backend`).

    Raises:
        ValueError: for a `dim` out of range or an unknown backend.

    Numerics: lengths are accumulated in fp32 or wider, because the floor of 1e-12 and a sum of squares leave the
    range of fp16.
    """

    def __init__(self, dim: int, backend: Backend = "auto") -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive; got {dim}")
        check_backend(backend)
        self.dim = dim
        self.backend = backend
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
            BackendUnsupported: when the named backend cannot run this.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be tokens [B, L, {self.dim}]; got {tuple(x.shape)}")
        query, mixed = additive_attention(
            self.to_query(x), self.to_key(x), self.w_g.flatten(), scale=self.scale, backend=self.backend
        )
        return self.final(self.Proj(mixed) + query)

    def folded(self, layer_scale: Tensor) -> FoldedAdditiveAttention:
        """What this module, its result times `layer_scale` (one factor per channel), is for inference only."""
        return FoldedAdditiveAttention(self, layer_scale)


class FoldedAdditiveAttention(nn.Module):
    """`EfficientAdditiveAttention` for inference, on maps instead of tokens, in two linear maps instead of four.

    After the normalisations everything is linear, so with `M = final Proj`

        out = M (G * K) + final Q + const = out_proj([Q, G * K])

    one convolution of 1x1 makes queries and keys, another the result, on the map as it lies in memory: no change
    between maps and tokens. `1 / sqrt(D)` is in `w_g`, the layer scale in `out_proj`.

    What cannot be folded: the biases of queries and keys and the norms of tokens, which are not linear; `G`, which
    depends on the image.

    Args:
        attention: the module to fold.
        layer_scale: factor on each channel of its result, of any shape with `dim` entries.

    Numerics: weights are multiplied in fp64 and rounded once to the module's dtype; the rest as in
    `EfficientAdditiveAttention`.
    """

    w_g: Tensor

    def __init__(self, attention: EfficientAdditiveAttention, layer_scale: Tensor) -> None:
        super().__init__()
        dim = self.dim = attention.dim
        self.backend = attention.backend
        place: dict[str, Any] = {"device": attention.w_g.device, "dtype": attention.w_g.dtype}
        self.qk_proj = PointwiseConv2d(dim, 2 * dim, **place)
        self.out_proj = PointwiseConv2d(2 * dim, dim, **place)
        self.register_buffer("w_g", torch.empty(dim, 1, **place))

        scale = exact(layer_scale).flatten()
        final, proj = exact(attention.final.weight) * scale[:, None], exact(attention.Proj.weight)
        sources = (attention.to_query, attention.to_key)
        with torch.no_grad():
            self.w_g.copy_(exact(attention.w_g) * attention.scale)
            self.qk_proj.weight.copy_(torch.cat([exact(layer.weight) for layer in sources])[:, :, None, None])
            self.qk_proj.bias.copy_(torch.cat([exact(layer.bias) for layer in sources]))
            self.out_proj.weight.copy_(torch.cat([final, final @ proj], dim=1)[:, :, None, None])
            self.out_proj.bias.copy_(exact(attention.final.bias) * scale + final @ exact(attention.Proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of each map.

        Args:
            x: `[B, dim, height, width]`.

        Returns:
            `[B, dim, height, width]`, times the layer scale.

        Raises:
            BackendUnsupported: when the named backend cannot run this.
        """
        query_key = self.qk_proj(x)
        height, width = x.shape[2:]
        chosen = resolve(
            self.backend, query_key.device, query_key.dtype, self.w_g.dtype, height * width, self.dim
        )  # fmt: skip
        if chosen == "triton":
            packed = additive_attention_packed(
                query_key.flatten(2).mT, self.w_g.flatten(), scale=1.0, backend=chosen
            )  # fmt: skip
            return self.out_proj(packed.mT.reshape(query_key.shape))
        query, key = (unit_length(half, dim=1) for half in query_key.chunk(2, dim=1))
        tokens = query.flatten(2)  # [B, D, N]
        weights = unit_length(tokens.mT @ self.w_g, dim=1)  # [B, N, 1]
        global_query = (tokens @ weights).unsqueeze(-1)  # [B, D, 1, 1]
        return self.out_proj(torch.cat([query, global_query * key], dim=1))
