"""A residual sum and the layer norm after it, in one pass over memory."""

from .api import SumNorm, sum_norm

__all__ = ["SumNorm", "sum_norm"]
