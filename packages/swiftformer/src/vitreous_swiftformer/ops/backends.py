"""Which implementation runs, and why a named one refuses. Everything here is a pure function."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from vitreous_core.errors import BackendUnsupported

from . import triton
from .triton.configs import takes_mlp

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_WIDEST = 512
"""Channels of the last stage of L3."""

_SHORT_WALK, _MANY_POSITIONS = 64, 4096
"""Channels up to which a lone program is no slower than separate layers; positions that are work for enough of them."""


def check_backend(backend: str) -> None:
    """Require a backend's name.

    Raises:
        ValueError: for another string.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def choose_backend(device: torch.device | str, dtype: torch.dtype, tokens: int, channels: int) -> Backend:
    """What `backend="auto"` runs of additive attention: `"triton"` where it is known to win, else `"torch"`.

    It wins forward and backward over eager and compiled PyTorch at every stage that rows of
    `vitreous bench swiftformer --case 'attention/*'` cover, from 49 tokens to 3136, in float16 and float32. No row says
    so of more channels than any SwiftFormer has. Kernels need an NVIDIA GPU from Ampere on.

    Args:
        device: e.g. `"cuda"`.
        dtype: of queries and keys; float16, bfloat16 or float32 for the kernels.
        tokens: L, tokens per image; decides nothing so far.
        channels: D.
    """
    return resolve("auto", torch.device(device), dtype, torch.float32, tokens, channels)


def resolve(
    backend: Backend, device: torch.device, dtype: torch.dtype, w_dtype: torch.dtype, tokens: int, channels: int
) -> Backend:
    """The backend of additive attention that runs: `auto` chosen, a named one checked and never replaced.

    Raises:
        ValueError: for a name that is not a backend.
        BackendUnsupported: listing every reason why the named backend cannot run this problem.
    """
    is_known = device.type == "cuda" and channels <= _WIDEST
    if not _is_wanted(backend, is_known):
        return "torch"
    return _checked(backend, triton.unsupported_reasons(device, dtype, w_dtype, channels))


def choose_mlp_backend(
    device: torch.device | str, dtype: torch.dtype, channels: int, hidden: int, positions: int
) -> Backend:
    """What `backend="auto"` runs of two 1x1 convolutions with a GELU between, for inference.

    The kernel wherever it has the width, in half precision: it saves four passes over the hidden maps, and is ahead at
    every such stage of XS and L1 (`docs/results/profiles/swiftformer-tiles.txt`). But a program walks over all hidden
    channels alone, so that few positions, which keep few programs busy, are PyTorch's; up to 64 channels the walk is
    short.

    Args:
        device: e.g. `"cuda"`.
        dtype: of maps and weights.
        channels, hidden: of the block.
        positions: of all maps of the batch.
    """
    return resolve_mlp("auto", torch.device(device), (dtype,), channels, hidden, positions, needs_grad=False)


def choose_halving_backend(device: torch.device | str, dtype: torch.dtype, channels: int, outputs: int) -> Backend:
    """What `backend="auto"` runs of a 3x3 convolution of stride 2, for inference: in half precision the kernel.

    It is ahead of convolution, bias and ReLU at all of XS and L1 (`docs/results/profiles/swiftformer-tiles.txt`).

    Args:
        device: e.g. `"cuda"`.
        dtype: of map and weight.
        channels, outputs: of the map and the result.
    """
    return resolve_halving("auto", torch.device(device), (dtype,), channels, outputs, needs_grad=False)


def mlp_backend(backend: Backend, channels: int) -> Backend:
    """What the blocks of a network run in deploy mode: its backend, but `"torch"` where no kernel has their width.

    Args:
        backend: of the network.
        channels: of the block.
    """
    return backend if takes_mlp(channels) else "torch"


def resolve_mlp(
    backend: Backend, device: torch.device, dtypes: tuple[torch.dtype, ...], channels: int, hidden: int,
    positions: int, needs_grad: bool,
) -> Backend:  # fmt: skip
    """As `resolve`, of two 1x1 convolutions with a GELU between. `"auto"` is `"torch"` where gradients are needed.

    Raises:
        ValueError, BackendUnsupported: as `resolve` does.
    """
    wins = device.type == "cuda" and (channels <= _SHORT_WALK or positions >= _MANY_POSITIONS)
    if not _is_wanted(backend, wins):
        return "torch"
    return _checked(backend, triton.mlp_unsupported_reasons(device, dtypes, channels, needs_grad))


def resolve_halving(
    backend: Backend, device: torch.device, dtypes: tuple[torch.dtype, ...], channels: int, outputs: int,
    needs_grad: bool,
) -> Backend:  # fmt: skip
    """As `resolve_mlp`, of a 3x3 convolution of stride 2."""
    if not _is_wanted(backend, wins=device.type == "cuda"):
        return "torch"
    return _checked(backend, triton.halving_unsupported_reasons(device, dtypes, needs_grad))


def _is_wanted(backend: Backend, wins: bool) -> bool:
    """Whether the kernel is to run if it can."""
    check_backend(backend)
    return backend == "triton" or (backend == "auto" and wins)


def _checked(backend: Backend, reasons: list[str]) -> Backend:
    if reasons and backend == "triton":
        raise BackendUnsupported(backend, reasons)
    return "torch" if reasons else "triton"
