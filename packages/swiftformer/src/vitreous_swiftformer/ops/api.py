"""The public operations: contract, checks and the choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from vitreous_core.autocast import autocast_dtype, to_autocast

from . import contracts, reference
from .backends import Backend, resolve, resolve_halving, resolve_mlp


def additive_attention(
    query: Tensor, key: Tensor, w_g: Tensor, *, scale: float | None = None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Efficient additive attention between its linear maps: what goes into `final(Proj(mixed) + unit)`.

    With `u = q / |q|` and `v = k / |k|` for each token:

        a = scale (u w_g)       one weight per token
        a = a / |a|             length one over the tokens of an image
        G = sum_n a_n u_n       the global query of the image
        unit, mixed = u, G v

    Paper: SwiftFormer (arXiv 2303.15446), section 3, "Efficient Additive Attention", with the normalisations of the
    released code, as `EfficientAdditiveAttention` says.

    Args:
        query, key: `[B, L, D]`, one floating dtype, any strides.
        w_g: `[D]`, any floating dtype.
        scale: positive factor on the weights; default `D ** -0.5`. It cancels but for weights of length 1e-12 or less.
        backend: `"torch"`, `"triton"` or `"auto"` (see `choose_backend`).

    Returns:
        Unit queries, and global query times unit keys; `[B, L, D]` each, dtype of query.

    Raises:
        TypeError: for arguments of the wrong type or mixed dtypes.
        ValueError: for wrong shapes, values or mixed devices.
        BackendUnsupported: when the named backend cannot run this.

    Numerics: lengths below 1e-12 count as 1e-12. `"triton"` computes in fp32 and rounds results once; `"torch"` rounds
        at each step, `w_g` to the dtype of query too, and sums lengths in fp32 or wider. Under autocast, query and key
        are first cast to its dtype. Deterministic. `"triton"` has no second derivative.
    """
    query, key = _autocast(query=query, key=key)
    if query.ndim != 3:
        raise ValueError(f"query must be [B, L, D]; got shape {tuple(query.shape)}")
    if key.dtype != query.dtype:
        raise TypeError(f"key must have the dtype of query, {query.dtype}; got {key.dtype}")
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, {tuple(query.shape)}; got {tuple(key.shape)}")
    _check_device("key", key, "query", query)
    channels = query.shape[2]
    _check_w_g(w_g, channels, "query", query)
    scale = _checked_scale(scale, channels)
    chosen = resolve(backend, query.device, query.dtype, w_g.dtype, query.shape[1], channels)
    run = contracts.additive_attention if chosen == "triton" else reference.additive_attention
    return run(query, key, w_g, scale)


def additive_attention_packed(
    query_key: Tensor, w_g: Tensor, *, scale: float | None = None, backend: Backend
) -> Tensor:
    """`additive_attention` with queries and keys side by side, as one linear map makes them, and so the results.

    Args:
        query_key: `[B, L, 2 * D]`, queries first, floating, any strides.
        w_g, scale, backend: as in `additive_attention`.

    Returns:
        `[B, L, 2 * D]`: unit queries, then global query times unit keys. Strides in the order of those of `query_key`
        with `"triton"`.

    Raises:
        TypeError, ValueError, BackendUnsupported: as `additive_attention` does.

    Numerics: as `additive_attention`. Where gradients are needed the halves are computed apart and joined by a copy.
    """
    (query_key,) = _autocast(query_key=query_key)
    if query_key.ndim != 3 or query_key.shape[2] % 2:
        raise ValueError(f"query_key must be [B, L, 2 * D]; got shape {tuple(query_key.shape)}")
    channels = query_key.shape[2] // 2
    _check_w_g(w_g, channels, "query_key", query_key)
    scale = _checked_scale(scale, channels)
    chosen = resolve(backend, query_key.device, query_key.dtype, w_g.dtype, query_key.shape[1], channels)
    if chosen == "triton" and not (torch.is_grad_enabled() and (query_key.requires_grad or w_g.requires_grad)):
        return contracts.additive_attention_packed(query_key, w_g, scale)
    run = contracts.additive_attention if chosen == "triton" else reference.additive_attention
    query, key = query_key.chunk(2, -1)
    return torch.cat(run(query, key, w_g, scale), -1)


def pointwise_mlp(
    x: Tensor, residual: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, backend: Backend
) -> Tensor:  # fmt: skip
    """Two 1x1 convolutions with a GELU between and a residual, for inference: `residual + conv(gelu(conv(x)))`.

    Args:
        x: `[B, C, height, width]`, any strides; channels-last is fast.
        residual: the same shape; may be x.
        weight1, bias1: `[hidden, C, 1, 1]` and `[hidden]`.
        weight2, bias2: `[C, hidden, 1, 1]` and `[C]`.
        backend: `"torch"`, `"triton"` or `"auto"` (see `choose_mlp_backend`).

    Returns:
        `[B, C, height, width]`, dtype of x; channels-last with `"triton"`.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for wrong shapes or mixed devices.
        BackendUnsupported: when the named backend cannot run this.

    Numerics: `"triton"` takes half precision, sums in fp32 and rounds the activations once, as operands; its GELU is
        within 2e-6 of the exact one, and NaN of infinities. Under autocast all are first cast to its dtype by
        `"triton"`, by each step of `"torch"`.
    """
    parameters = {"residual": residual, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    cast = _autocast(x=x, **parameters)
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, height, width]; got shape {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    hidden = weight1.shape[0]
    shapes = (x.shape, (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,))
    for (name, tensor), shape in zip(parameters.items(), shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}")
        _check_device(name, tensor, "x", x)
    dtypes = tuple(tensor.dtype for tensor in cast)
    chosen = resolve_mlp(backend, x.device, dtypes, channels, hidden, batch * height * width, _needs_grad(cast))
    if chosen == "triton":
        return contracts.pointwise_mlp(*cast)
    return reference.pointwise_mlp(x, residual, weight1, bias1, weight2, bias2)


def halving_convolution(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool, backend: Backend) -> Tensor:
    """A 3x3 convolution of stride 2 and padding 1, for inference, with ReLU if asked for: `r` to `(r + 1) // 2`.

    Args:
        x: `[B, C, height, width]`, any strides; channels-last is fast.
        weight: `[O, C, 3, 3]`, channels-last is fast.
        bias: `[O]`.
        relu: whether to take the ReLU of the sum.
        backend: `"torch"`, `"triton"` or `"auto"` (see `choose_halving_backend`).

    Returns:
        `[B, O, (height + 1) // 2, (width + 1) // 2]`, dtype of x; channels-last with `"triton"`.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for wrong shapes or mixed devices.
        BackendUnsupported: when the named backend cannot run this.

    Numerics: `"triton"` takes half precision, sums in fp32 and rounds once. Autocast as in `pointwise_mlp`.
    """
    cast = _autocast(x=x, weight=weight, bias=bias)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, C, height, width], none but B zero; got shape {tuple(x.shape)}")
    channels, outputs = x.shape[1], weight.shape[0]
    for name, tensor, shape in (("weight", weight, (outputs, channels, 3, 3)), ("bias", bias, (outputs,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
        _check_device(name, tensor, "x", x)
    dtypes = tuple(tensor.dtype for tensor in cast)
    chosen = resolve_halving(backend, x.device, dtypes, channels, outputs, _needs_grad(cast))
    if chosen == "triton":
        return contracts.halving_convolution(cast[0], cast[1], cast[2], relu)
    return reference.halving_convolution(x, weight, bias, relu)


def _needs_grad(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _autocast(**tensors: Tensor) -> list[Tensor]:
    """The tensors, checked to be floating; where autocast is on, those that it touches in its dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor; got {tensor.dtype}")
    given = list(tensors.values())
    # They are all on one device, and asking once for it is enough.
    return given if autocast_dtype(given[0].device) is None else [to_autocast(tensor) for tensor in given]


def _check_w_g(w_g: Tensor, channels: int, main_name: str, main: Tensor) -> None:
    if not isinstance(w_g, Tensor):
        raise TypeError(f"w_g must be a torch.Tensor; got {type(w_g).__name__}")
    if not w_g.is_floating_point():
        raise TypeError(f"w_g must be a floating tensor; got {w_g.dtype}")
    if w_g.shape != (channels,):
        raise ValueError(f"w_g must have shape {(channels,)}; got {tuple(w_g.shape)}")
    _check_device("w_g", w_g, main_name, main)


def _check_device(name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    if tensor.device != main.device:
        raise ValueError(f"{name} must be on the device of {main_name}, {main.device}; got {tensor.device}")


def _checked_scale(scale: float | None, channels: int) -> float:
    if scale is None:
        return float(max(channels, 1)) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number; got {type(scale).__name__}")
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite; got {scale}")
    return float(scale)
