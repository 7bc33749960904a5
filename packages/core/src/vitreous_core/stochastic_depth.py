"""Stochastic depth (Huang et al., arXiv 1603.09382) of many branches, drawn in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily


def branch_factors(rates: Sequence[float], batch: int, device: torch.device) -> list[Tensor | None]:
    """What each sample of each branch is multiplied by in training: 0 with the branch's rate p, else `1 / (1 - p)`.

    One draw for all of them: with a draw for each, a network of 24 branches spends 100 launches on it.

    Args:
        rates: p of each branch, in `[0, 1)`.
        batch: B.
        device: where.

    Returns:
        fp32 `[B]` per branch, from PyTorch's default generator; None for a rate of zero.
    """
    if not any(rates):
        return [None] * len(rates)
    (kept,) = _kept(tuple(rates), str(device))
    factors = kept.expand(-1, batch).bernoulli().div_(kept).unbind(0)
    return [factor if rate > 0 else None for factor, rate in zip(factors, rates, strict=True)]


@torch.compiler.assume_constant_result
def _kept(rates: tuple[float, ...], device: str) -> tuple[Tensor]:
    """One minus the rates, fp32 `[len(rates), 1]`. Not a buffer: DDP would send it round at every step.

    In a tuple: Dynamo of PyTorch 2.11 takes a bare tensor from one call of a graph alone.
    """
    return (_cached_kept(rates, device),)


@lru_cache
def _cached_kept(rates: tuple[float, ...], device: str) -> Tensor:
    # It outlives inference mode and tracing.
    with torch.inference_mode(False), unset_fake_temporarily():
        return 1 - torch.tensor(rates, dtype=torch.float32, device=device)[:, None]
