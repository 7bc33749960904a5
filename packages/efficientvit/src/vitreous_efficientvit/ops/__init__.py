"""Fused operators of EfficientViT's inference; see README.md beside this file."""

from .api import (
    Backend,
    Operator,
    cascaded_group_attention,
    choose_backend,
    feed_forward,
    halving_convolution,
    halving_depthwise,
)
from .weights import AttentionWeights, ConvolutionWeights, DepthwiseWeights, FeedForwardWeights

__all__ = [
    "AttentionWeights",
    "Backend",
    "ConvolutionWeights",
    "DepthwiseWeights",
    "FeedForwardWeights",
    "Operator",
    "cascaded_group_attention",
    "choose_backend",
    "feed_forward",
    "halving_convolution",
    "halving_depthwise",
]
