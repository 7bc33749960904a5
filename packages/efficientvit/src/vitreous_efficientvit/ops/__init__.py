"""Fused operators of EfficientViT's inference; see README.md beside this file."""

from .api import Backend, cascaded_group_attention, choose_backend, feed_forward
from .weights import AttentionWeights, FeedForwardWeights

__all__ = [
    "AttentionWeights",
    "Backend",
    "FeedForwardWeights",
    "cascaded_group_attention",
    "choose_backend",
    "feed_forward",
]
