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
        device: of all tensors.
        dtype: of query, key and value.
        tokens: N, tokens per window.
        head_dim: D.
        mask_needs_grad: whether gradients are to flow into the mask.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    head_dim: int
    mask_needs_grad: bool = False


def choose_backend(device: torch.device | str, dtype: torch.dtype, tokens: int, head_dim: int) -> Backend:
    """What `backend="auto"` runs, by the problem alone: `"triton"` on a GPU that takes it, else `"torch"`.

    A mask that needs gradients is the one thing beside these arguments that sends `auto` to `"torch"`.

    Args:
        device: e.g. `"cuda"`.
        dtype: of query, key and value.
        tokens: N, tokens per window.
        head_dim: D.
    """
    return _choose(Problem(torch.device(device), dtype, tokens, head_dim))


def _choose(problem: Problem) -> Backend:
    return "triton" if problem.device.type == "cuda" and not unsupported_reasons("triton", problem) else "torch"


def unsupported_reasons(backend: Backend, problem: Problem) -> list[str]:
    """Every reason why `backend` cannot run `problem`; empty when it can."""
    match backend:
        case "triton":
            return triton.unsupported_reasons(
                problem.device, problem.dtype, problem.head_dim, problem.mask_needs_grad
            )  # fmt: skip
        case "flex":
            return ["FlexAttention has no adapter for windows: use backend='triton' on a GPU"]
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
        return _choose(problem)
    if reasons := unsupported_reasons(backend, problem):
        raise BackendUnsupported(backend, reasons)
    return backend
