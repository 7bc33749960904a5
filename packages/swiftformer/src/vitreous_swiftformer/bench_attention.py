"""Additive attention between its linear maps as a benchmark problem, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitreous_core.bench.attention import BOTH, FORWARD, relative_error
from vitreous_core.bench.case import Gate, Prepared, Provider, Work

from .ops import Backend, additive_attention
from .ops.backends import resolve

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokensProblem:
    """Queries and keys as two projections leave them, `[batch, tokens, channels]`.

    Args:
        batch, tokens, channels: sizes.
        dtype: of queries and keys, by name; `w_g` is float32.
        series: family of cases that a plot shows, over `batch`.
    """

    batch: int
    tokens: int
    channels: int
    dtype: str = "float16"
    series: str = ""

    def work(self, mode: str) -> Work:
        """q and k read, two results written; the backward reads q, k and two gradients and writes two.

        No matrix products.
        """
        tensor = self.batch * self.tokens * self.channels * getattr(torch, self.dtype).itemsize
        return Work((4 if mode == FORWARD else 10) * tensor, 0)

    def facts(self) -> Mapping[str, Any]:
        """For the row."""
        return {
            "series": self.series, "axis": "batch", "batch": self.batch, "tokens": self.tokens,
            "channels": self.channels, "dtype": self.dtype,
        }  # fmt: skip

    def draw(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves (query, key, w_g) and cotangents of both results."""
        generator = torch.Generator(device).manual_seed(0)
        dtype, shape = getattr(torch, self.dtype), (self.batch, self.tokens, self.channels)
        query, key, *cotangents = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)
        )  # fmt: skip
        w_g = torch.randn(self.channels, generator=generator, device=device)
        # Weights of one sign, as a global query of nothing but noise would have no digits to compare.
        return [(query + w_g.to(dtype)).requires_grad_(), key.requires_grad_(), w_g.requires_grad_()], cotangents


def tokens_provider(name: str, backend: Backend, *, compiled: bool = False) -> Provider:
    """A provider that computes the operation by a backend, under `torch.compile` if asked."""
    return Provider(name, partial(_prepare, backend=backend, compiled=compiled))


def _prepare(problem: TokensProblem, device: torch.device, *, backend: Backend, compiled: bool) -> Prepared:
    leaves, cotangents = problem.draw(device)
    query, _, w_g = leaves
    resolve(backend, device, query.dtype, w_g.dtype, problem.tokens, problem.channels)
    attend: Attend = partial(additive_attention, backend=backend)
    if compiled:
        attend = torch.compile(attend, dynamic=False)

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, cotangents)

    standing = sum(tensor.numel() * tensor.element_size() for tensor in (*leaves, *cotangents)) / 2**20
    gate = partial(_gate, leaves, cotangents, forward, both)
    return Prepared({FORWARD: forward, BOTH: both}, gate, facts={"compiled": compiled, "standing_mib": standing})


def _gate(
    leaves: list[Tensor],
    cotangents: list[Tensor],
    forward: Callable[[], tuple[Tensor, ...]],
    both: Callable[[], tuple[Tensor, ...]],
    modes: Collection[str],
) -> Gate:
    got: dict[str, Tensor] = {}
    if FORWARD in modes:
        got |= zip(("unit", "mixed"), forward(), strict=True)
    if BOTH in modes:
        got |= zip(("dquery", "dkey", "dw_g"), both(), strict=True)
    truth = _truth(leaves, cotangents, torch.float64)
    plain = _truth(leaves, cotangents, leaves[0].dtype)
    rounding = torch.finfo(leaves[0].dtype).eps / 2
    errors = {name: relative_error(tensor, truth[name]) for name, tensor in got.items()}
    limits = {name: 2 * (relative_error(plain[name], truth[name]) + rounding) for name in got}
    return Gate(errors, limits, "the torch path in float64")


def _truth(leaves: list[Tensor], cotangents: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that the torch path computes in a dtype; `w_g` is no narrower than float32."""
    wide = [leaf.detach().to(torch.promote_types(dtype, leaf.dtype)).requires_grad_() for leaf in leaves]
    results = additive_attention(wide[0], wide[1], wide[2], backend="torch")
    gradients = torch.autograd.grad(results, wide, [cotangent.to(dtype) for cotangent in cotangents])
    names = ("unit", "mixed", "dquery", "dkey", "dw_g")
    return dict(zip(names, (*(result.detach() for result in results), *gradients), strict=True))
