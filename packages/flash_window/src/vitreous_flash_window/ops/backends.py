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
        matmul_precision: what `torch.get_float32_matmul_precision` says; counts for float32 alone.
        on_image: whether windows are yet to be cut from a packed image.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    head_dim: int
    mask_needs_grad: bool = False
    matmul_precision: str = "highest"
    on_image: bool = False


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    tokens: int,
    head_dim: int,
    matmul_precision: str = "highest",
    on_image: bool = False,
) -> Backend:
    """What `backend="auto"` runs, by the problem alone: `"triton"` on a GPU where it is known to win, else `"torch"`.

    It wins in half precision. In float32 with TF32 products it wins up to 128 channels, and in windows already cut, of
    up to 64 tokens, with any number. Where products are full float32, for which there are no matrix units, it is known
    to win up to 64 tokens and 64 channels. Name `"triton"` elsewhere for its memory, which does not grow with the
    square of the tokens.

    A mask that needs gradients is the one thing beside these arguments that sends `auto` to `"torch"`.

    Args:
        device: e.g. `"cuda"`.
        dtype: of query, key and value.
        tokens: N, tokens per window.
        head_dim: D.
        matmul_precision: what `torch.get_float32_matmul_precision` says; `"highest"` is full float32.
        on_image: whether it is `shifted_window_attention` that asks.
    """
    problem = Problem(
        torch.device(device), dtype, tokens, head_dim, matmul_precision=matmul_precision, on_image=on_image
    )
    return _choose(problem)


def _choose(problem: Problem) -> Backend:
    takes = problem.device.type == "cuda" and not unsupported_reasons("triton", problem)
    return "triton" if takes and _wins(problem) else "torch"


def _wins(problem: Problem) -> bool:
    """Whether the kernels are known to be faster than plain PyTorch, see `choose_backend`."""
    if problem.dtype != torch.float32:
        return True
    if problem.matmul_precision == "highest":
        return problem.head_dim <= 64 and problem.tokens <= 64
    return problem.head_dim <= 128 or (problem.tokens <= 64 and not problem.on_image)


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
