"""Fused operators of EfficientViT; see README.md beside this file."""

from .api import (
    Backend,
    Operator,
    cascaded_group_attention,
    choose_backend,
    feed_forward,
    halving_convolution,
    halving_depthwise,
)
from .convolution import Convolution, choose_convolution_backend, convolution
from .head_attention import choose_head_backend, head_attention
from .weights import AttentionWeights, ConvolutionWeights, DepthwiseWeights, FeedForwardWeights

__all__ = [
    "AttentionWeights",
    "Backend",
    "Convolution",
    "ConvolutionWeights",
    "DepthwiseWeights",
    "FeedForwardWeights",
    "Operator",
    "cascaded_group_attention",
    "choose_backend",
    "choose_convolution_backend",
    "choose_head_backend",
    "convolution",
    "feed_forward",
    "halving_convolution",
    "halving_depthwise",
    "head_attention",
]
