"""Which implementation runs, and why a named one refuses. Everything here is a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vitreous_core.errors import BackendUnsupported

from . import triton

Backend = Literal["auto", "torch", "flex", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class Problem:
    """What a backend looks at to accept or refuse: facts about the call, no tensors.

    Args:
        device_type: e.g. `"cuda"`.
        dtype: of query, key and value.
        tokens: N, tokens per window.
        head_dim: D.
    """

    device_type: str
    dtype: torch.dtype
    tokens: int
    head_dim: int


def choose_backend(device_type: str, dtype: torch.dtype, tokens: int, head_dim: int) -> Backend:
    """What `backend="auto"` runs, as a function of the problem alone.

    This release holds the torch implementation only, so the answer is `"torch"` for every problem.

    Args:
        device_type: e.g. `"cuda"`.
        dtype: of query, key and value.
        tokens: N, tokens per window.
        head_dim: D.
    """
    return "torch"


def unsupported_reasons(backend: Backend, problem: Problem) -> list[str]:
    """Every reason why `backend` cannot run `problem`; empty when it can."""
    match backend:
        case "triton":
            return triton.unsupported_reasons(problem.device_type, problem.dtype)
        case "flex":
            return ["FlexAttention has no adapter for cut windows in this release"]
        case _:
            return []


def resolve(backend: Backend, problem: Problem) -> Backend:
    """The backend that runs: `auto` chosen, a named one checked and never replaced.

    Raises:
        ValueError: for a name that is not a backend.
        BackendUnsupported: listing every reason why the named backend cannot run this problem.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend == "auto":
        return choose_backend(problem.device_type, problem.dtype, problem.tokens, problem.head_dim)
    if reasons := unsupported_reasons(backend, problem):
        raise BackendUnsupported(backend, reasons)
    return backend
