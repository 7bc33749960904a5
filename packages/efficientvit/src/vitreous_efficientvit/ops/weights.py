"""The weights of the operators in the order in which the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

BIAS_TILE = 64
"""Side of the bias tile of a head: the tokens that one matrix tile holds."""


class AttentionWeights(NamedTuple):
    """Of cascaded group attention with its batch norms folded, `1 / sqrt(K)` in the query's convolution.

    H heads of d = C / H channels, K key channels, windows of r x r = N tokens.

    Args:
        qkv_weight: `[H, 2K + d, d]`, rows of query, key, value.
        qkv_bias: `[H, 2K + d]`.
        query_weight: `[sum of kernel_sizes squared, K]`: for each head the taps of its convolution, row by row.
        query_bias: `[H, K]`.
        bias_tile: `[H, 64, 64]`: the bias of query and key of as many whole windows as fit, minus infinity between
            tokens of different windows. Its upper left corner is the tile of fewer windows.
        proj_weight: `[C, C]`, rows are outputs.
        proj_bias: `[C]`.
        kernel_sizes: side of each head's query convolution.
        window_size: r, at most 8.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    bias_tile: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    kernel_sizes: Sequence[int]
    window_size: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All but the two last."""
        return self[:7]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What shape each tensor must have, going by the first."""
        heads, mixed, value_dim = self.qkv_weight.shape
        channels, key_dim = heads * value_dim, (mixed - value_dim) // 2
        taps = sum(kernel**2 for kernel in self.kernel_sizes)
        return {
            "qkv_weight": (heads, 2 * key_dim + value_dim, value_dim), "qkv_bias": (heads, mixed),
            "query_weight": (taps, key_dim), "query_bias": (heads, key_dim),
            "bias_tile": (heads, BIAS_TILE, BIAS_TILE), "proj_weight": (channels, channels), "proj_bias": (channels,),
        }  # fmt: skip


class FeedForwardWeights(NamedTuple):
    """Of an FFN of C channels and M hidden ones, perhaps behind a depthwise convolution, batch norms folded.

    Args:
        local_weight: `[9, C]`, the taps of a depthwise 3x3 convolution that has its residual folded in; None without.
        local_bias: `[C]`; None without.
        in_weight: `[M, C]`.
        in_bias: `[M]`.
        out_weight: `[C, M]`.
        out_bias: `[C]`.
    """

    local_weight: Tensor | None
    local_bias: Tensor | None
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What shape each tensor that is there must have, going by the biases."""
        hidden, channels = self.in_bias.shape[0], self.out_bias.shape[0]
        shapes: dict[str, tuple[int, ...]] = {
            "in_weight": (hidden, channels), "in_bias": (hidden,), "out_weight": (channels, hidden),
            "out_bias": (channels,),
        }  # fmt: skip
        if self.local_weight is not None:
            shapes |= {"local_weight": (9, channels), "local_bias": (channels,)}
        return shapes


class ConvolutionWeights(NamedTuple):
    """Of a dense 3x3 convolution from C to O channels, batch norm folded.

    Args:
        weight: `[O, 9 * C]`, the taps row by row, channels innermost.
        bias: `[O]`.
    """

    weight: Tensor
    bias: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What shape each tensor must have, going by the bias."""
        return {"weight": (self.bias.shape[0], *self.weight.shape[1:]), "bias": (self.bias.shape[0],)}


class DepthwiseWeights(NamedTuple):
    """Of a depthwise 3x3 convolution of C channels, batch norm folded.

    Args:
        weight: `[9, C]`, the taps row by row.
        bias: `[C]`.
    """

    weight: Tensor
    bias: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What shape each tensor must have, going by the bias."""
        return {"weight": (9, self.bias.shape[0]), "bias": (self.bias.shape[0],)}


def pack_bias(biases: Tensor) -> Tensor:
    """The bias tile `[H, 64, 64]` of `AttentionWeights` from the biases `[H, N, N]` of one window."""
    heads, tokens = biases.shape[:2]
    token = torch.arange(BIAS_TILE, device=biases.device)
    slot, place = token // tokens, token % tokens
    tile = biases[:, place[:, None], place]
    return tile.masked_fill(slot[:, None] != slot, float("-inf")).reshape(heads, BIAS_TILE, BIAS_TILE)


def pack_convolution(conv: nn.Module) -> Tensor:
    """The taps `[O, k * k * C]` of a dense convolution, channels innermost."""
    assert isinstance(conv, nn.Conv2d)
    return conv.weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def pack_depthwise(conv: nn.Module) -> Tensor:
    """The taps `[k * k, C]` of a depthwise convolution."""
    assert isinstance(conv, nn.Conv2d)
    return conv.weight.flatten(1).T.contiguous()


def pack_linear(conv: nn.Module) -> Tensor:
    """The matrix `[out, in]` of a 1x1 convolution."""
    assert isinstance(conv, nn.Conv2d)
    return conv.weight.flatten(1)


def bias_of(conv: nn.Module) -> Tensor:
    """The bias of a folded convolution."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    return conv.bias
