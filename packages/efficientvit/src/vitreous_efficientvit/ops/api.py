"""The public functions: contract, checks and choice of backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from vitreous_core.errors import BackendUnsupported
from vitreous_core.triton_support import device_reasons, dtype_reasons

from . import contracts, reference
from .weights import BIAS_TILE, AttentionWeights, ConvolutionWeights, DepthwiseWeights, FeedForwardWeights

Backend = Literal["auto", "torch", "triton"]
Operator = Literal["cascaded_group_attention", "feed_forward", "halving_convolution", "halving_depthwise"]

_LARGEST_VALUE_DIM = 128
_LARGEST_KEY_DIM = 64
_LARGEST_CHANNELS = 512
_WIDEST_CONVOLUTION = 256
_WIDEST_TIMED_FEED_FORWARD = 384
# Where plain layers won when timed, see `choose_backend`.
_FEW_CELLS, _WIDEST_FEED_FORWARD_OF_FEW = 32, 256
_WIDEST_WINNING_CONVOLUTION = 32


def cascaded_group_attention(x: Tensor, weights: AttentionWeights, *, backend: Backend = "auto") -> Tensor:
    """`x + attention(x)` in windows of a map, for inference.

    The map is padded at the bottom and right with zeros to whole windows. Padded cells are not masked: they carry the
    biases of queries, keys and values and the cascade, as in the official code; only their outputs are dropped.

    **Paper**: arXiv 2305.07027, "Cascaded Group Attention".

    Args:
        x: `[B, C, height, width]`, any strides; channels-last is read as it is, the rest is copied first by Triton.
        weights: see `AttentionWeights`; dtype and device of `x`.
        backend: `"torch"`, `"triton"` or `"auto"` (`choose_backend`).

    Returns:
        `[B, C, height, width]`; channels-last from Triton.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, or an unknown backend.
        BackendUnsupported: when `backend="triton"` cannot run this.
        RuntimeError: when Triton is to give gradients.

    Numerics: products take factors of the dtype of `x` and sum in fp32, as softmax, cascade and residual do.
    Queries, keys, values, weights of the softmax and the projection's input are rounded once.
    """
    heads, mixed, value_dim = weights.qkv_weight.shape
    _check(x, heads * value_dim, weights, weights.shapes())
    reasons = attention_reasons((mixed - value_dim) // 2, value_dim, weights.window_size)
    if _resolve("cascaded_group_attention", backend, x, reasons) == "torch":
        return reference.attention(x, weights)
    return contracts.attention(x, weights)


def feed_forward(x: Tensor, weights: FeedForwardWeights, *, backend: Backend = "auto") -> Tensor:
    """`y + W_2 relu(W_1 y + b_1) + b_2` at every cell, `y` the depthwise convolution of `x` or `x` itself.

    **Paper**: arXiv 2305.07027, figure 6b: a token interaction and the FFN after it.

    Args:
        x: as in `cascaded_group_attention`.
        weights: see `FeedForwardWeights`; dtype and device of `x`.
        backend: as there.

    Returns:
        As `cascaded_group_attention`; it raises the same.

    Numerics: sums in fp32; `y` and the hidden activations are rounded to the dtype of `x`.
    """
    _check(x, weights.out_bias.shape[0], weights, weights.shapes())
    if _resolve("feed_forward", backend, x, feed_forward_reasons(x.shape[1])) == "torch":
        return reference.feed_forward(x, weights)
    return contracts.feed_forward(x, weights)


def halving_convolution(
    x: Tensor, weights: ConvolutionWeights, relu: bool = True, *, backend: Backend = "auto"
) -> Tensor:
    """The convolution 3x3 of stride 2 and padding 1 with its bias, and ReLU: a layer of the stem.

    Args:
        x: as in `cascaded_group_attention`.
        weights: see `ConvolutionWeights`; dtype and device of `x`.
        relu: whether a ReLU follows.
        backend: as there.

    Returns:
        `[B, O, height / 2, width / 2]`, rounded up; channels-last from Triton.

    It raises the same.

    Numerics: sums in fp32, rounded once.
    """
    _check(x, weights.weight.shape[1] // 9, weights, weights.shapes())
    if _resolve("halving_convolution", backend, x, convolution_reasons(*weights.weight.shape)) == "torch":
        return reference.halving_convolution(x, weights, relu)
    return contracts.halving_convolution(x, weights, relu)


def halving_depthwise(x: Tensor, weights: DepthwiseWeights, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """`relu(dw(relu(x)))`, of stride 2 and with its bias, and its spatial mean: the middle of patch merging.

    Args:
        x: as in `cascaded_group_attention`.
        weights: see `DepthwiseWeights`; dtype and device of `x`.
        backend: as there.

    Returns:
        `[B, C, height / 2, width / 2]`, rounded up, channels-last from Triton; and `[B, C]`.

    It raises the same.

    Numerics: sums in fp32; the mean is that of the rounded map.
    """
    _check(x, weights.bias.shape[0], weights, weights.shapes())
    if _resolve("halving_depthwise", backend, x, []) == "torch":
        return reference.halving_depthwise(x, weights)
    return contracts.halving_depthwise(x, weights)


def choose_backend(
    operator: Operator, device: torch.device | str, dtype: torch.dtype, channels: int, cells: int | None = None
) -> Backend:
    """What `backend="auto"` runs: `"triton"` on GPUs that can, in half precision, where it has been seen to win.

    That is against the same layers in eager mode, at the sizes of M0 and M4 and batches of 1, 256 and 2048 (mark
    E1-layers of the bench): everywhere but the last convolution of M4's stem, from 64 channels, at any batch, and the
    FFN of its last stage, 384 channels, for one image, where a single program would read all weights. Wider FFNs were
    not timed. Compiled, cuBLAS's two products can be faster at 384 channels.

    Args:
        operator: by the name of its function.
        device: of the map.
        dtype: of the map.
        channels: of the map.
        cells: of all images together; None: many.
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or device_reasons(device):
        return "torch"
    if operator == "halving_convolution" and channels > _WIDEST_WINNING_CONVOLUTION:
        return "torch"
    if operator == "feed_forward" and channels > _WIDEST_FEED_FORWARD_OF_FEW:
        are_few = cells is not None and cells <= _FEW_CELLS
        return "torch" if are_few or channels > _WIDEST_TIMED_FEED_FORWARD else "triton"
    return "triton"


def attention_reasons(key_dim: int, value_dim: int, window_size: int) -> list[str]:
    """Why the Triton kernel cannot take attention of these sizes; empty when it can."""
    reasons = []
    if window_size**2 > BIAS_TILE:
        reasons.append(f"window_size must be at most {int(BIAS_TILE**0.5)}; got {window_size}")
    for name, size, most in (("value_dim", value_dim, _LARGEST_VALUE_DIM), ("key_dim", key_dim, _LARGEST_KEY_DIM)):
        if size > most:
            reasons.append(f"{name} must be at most {most}; got {size}")
    return reasons


def feed_forward_reasons(channels: int) -> list[str]:
    """Why the Triton kernel cannot take an FFN of this width; empty when it can."""
    if channels <= _LARGEST_CHANNELS:
        return []
    return [f"channels must be at most {_LARGEST_CHANNELS}; got {channels}"]


def convolution_reasons(outputs: int, taps: int) -> list[str]:
    """Why the Triton kernel cannot take a convolution of weights `[outputs, taps]`; empty when it can."""
    reasons = []
    for name, size, most in (
        ("outputs", outputs, 2 * _WIDEST_CONVOLUTION),
        ("channels", taps // 9, _WIDEST_CONVOLUTION),
    ):
        if size > most:
            reasons.append(f"{name} must be at most {most}; got {size}")
    return reasons


def check_backend(backend: str) -> None:
    """Refuse an unknown backend.

    Raises:
        ValueError: naming those there are.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton'; got {backend!r}")


def _resolve(operator: Operator, backend: Backend, x: Tensor, reasons: list[str]) -> Backend:
    check_backend(backend)
    if backend == "auto":
        cells = x.shape[0] * x.shape[2] * x.shape[3]
        backend = "torch" if reasons else choose_backend(operator, x.device, x.dtype, x.shape[1], cells)
    if backend == "triton":
        reasons = device_reasons(x.device) + dtype_reasons(x.device, x.dtype) + reasons
        if reasons:
            raise BackendUnsupported(backend, reasons)
    return backend


def _check(
    x: Tensor,
    channels: int,
    weights: AttentionWeights | FeedForwardWeights | ConvolutionWeights | DepthwiseWeights,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be [B, {channels}, height, width]; got {tuple(x.shape)}")
    dtype, device = x.dtype, x.device
    for name, shape in shapes.items():
        tensor: Tensor = getattr(weights, name)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {tuple(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}. Call contiguous()")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must have the dtype and device of x, {dtype} on {device}; "
                f"got {tensor.dtype} on {tensor.device}. Move the model, or cast the images"
            )
