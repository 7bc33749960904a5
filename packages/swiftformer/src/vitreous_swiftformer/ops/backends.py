"""Which implementation runs, and why a named one refuses. Everything here is a pure function."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from vitreous_core.errors import BackendUnsupported

from . import triton
from .triton.configs import takes_encoder

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_WIDEST = 512
"""Channels of the last stage of L3."""


def check_backend(backend: str) -> None:
    """Require a backend's name.

    Raises:
        ValueError: for another string.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def choose_backend(device: torch.device | str, dtype: torch.dtype, tokens: int, channels: int) -> Backend:
    """What `backend="auto"` runs of additive attention: `"triton"` where it is known to win, else `"torch"`.

    It wins in half precision, forward and backward, over eager and compiled PyTorch at every stage that rows of
    `vitreous bench swiftformer --case 'attention/*'` cover, from 49 tokens to 3136. No row says so of float32, nor of
    more channels than any SwiftFormer has. Kernels need an NVIDIA GPU from Ampere on.

    Args:
        device: e.g. `"cuda"`.
        dtype: of queries and keys.
        tokens: L, tokens per image; decides nothing so far.
        channels: D.
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or channels > _WIDEST:
        return "torch"
    return "torch" if triton.unsupported_reasons(device, dtype, torch.float32, channels) else "triton"


def resolve(
    backend: Backend, device: torch.device, dtype: torch.dtype, w_dtype: torch.dtype, tokens: int, channels: int
) -> Backend:
    """The backend of additive attention that runs: `auto` chosen, a named one checked and never replaced.

    Raises:
        ValueError: for a name that is not a backend.
        BackendUnsupported: listing every reason why the named backend cannot run this problem.
    """
    check_backend(backend)
    chosen = choose_backend(device, dtype, tokens, channels) if backend == "auto" else backend
    if chosen == "triton" and (reasons := triton.unsupported_reasons(device, dtype, w_dtype, channels)):
        if backend == "auto":  # a w_g of a dtype that the kernels do not take
            return "torch"
        raise BackendUnsupported(backend, reasons)
    return chosen


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
    """As `resolve`, of the convolutional block, where `"auto"` is `"torch"`.

    Its kernel runs by name only: it wins nothing over convolutions under `torch.compile` (`vitreous bench swiftformer
    --case 'S1/*'`, provider `deploy-encoder-graph`).

    Raises:
        ValueError, BackendUnsupported: as `resolve` does.
    """
    check_backend(backend)
    if backend == "auto":
        return "torch"
    if backend == "triton" and (reasons := triton.encoder_unsupported_reasons(device, dtypes, channels, needs_grad)):
        raise BackendUnsupported(backend, reasons)
    return backend
