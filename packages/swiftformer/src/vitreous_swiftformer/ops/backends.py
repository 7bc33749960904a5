"""Which implementation runs, and why a named one refuses. Everything here is a pure function."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from vitreous_core.errors import BackendUnsupported

from . import triton
from .triton.configs import takes_encoder

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def check_backend(backend: str) -> None:
    """Require a backend's name.

    Raises:
        ValueError: for another string.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def choose_backend(device: torch.device | str, dtype: torch.dtype, tokens: int, channels: int) -> Backend:
    """What `backend="auto"` runs: `"torch"` everywhere.

    Where the kernels win is decided by measured rows of `vitreous bench swiftformer` (`attention/*`), and none are
    recorded. Until they are, the kernels run by name only.

    Args:
        device: e.g. `"cuda"`.
        dtype: of queries and keys.
        tokens: L, tokens per image.
        channels: D.
    """
    return "torch"


def resolve(
    backend: Backend, device: torch.device, dtype: torch.dtype, w_dtype: torch.dtype, tokens: int, channels: int
) -> Backend:
    """The backend of additive attention that runs: `auto` chosen, a named one checked and never replaced.

    Raises:
        ValueError: for a name that is not a backend.
        BackendUnsupported: listing every reason why the named backend cannot run this problem.
    """
    check_backend(backend)
    if backend == "auto":
        return choose_backend(device, dtype, tokens, channels)
    if backend == "triton" and (reasons := triton.unsupported_reasons(device, dtype, w_dtype, channels)):
        raise BackendUnsupported(backend, reasons)
    return backend


def encoder_backend(backend: Backend, channels: int) -> Backend:
    """What the convolutional blocks of a network run in deploy mode.

    That of the network, but `"torch"` where there is no kernel (`triton.configs.takes_encoder`): in the last stage of
    XS (220 channels) and L1 (384) and in the last two of L3 (320, 512).

    Args:
        backend: of the network.
        channels: of the block.
    """
    return backend if takes_encoder(channels) else "torch"


def resolve_encoder(
    backend: Backend, device: torch.device, dtypes: tuple[torch.dtype, ...], channels: int, needs_grad: bool
) -> Backend:
    """As `resolve`, of the convolutional block; `"auto"` is `"torch"` there as well, for the same reason.

    Raises:
        ValueError, BackendUnsupported: as `resolve` does.
    """
    check_backend(backend)
    if backend == "auto":
        return "torch"
    if backend == "triton" and (reasons := triton.encoder_unsupported_reasons(device, dtypes, channels, needs_grad)):
        raise BackendUnsupported(backend, reasons)
    return backend
