"""A residual sum and the layer norm after it, in one pass over memory."""

from .api import SumNorm, add_branch, sum_norm

__all__ = ["SumNorm", "add_branch", "sum_norm"]
