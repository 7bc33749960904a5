"""The public operations: contract, checks and the choice of the implementation."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from vitreous_core.autocast import to_autocast
from vitreous_core.ops.block_sparse_attention.dropout import as_seed

from . import contracts, contracts_shifted, reference
from .backends import Backend, Problem, resolve
from .reference import accumulation_dtype


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: Backend,
) -> Tensor:
    """Softmax attention inside windows that are already cut, with a bias per head and a mask per window.

    Paper: Flash Window Attention (arXiv 2501.06480), `O = softmax(scale * Q K^T + bias) V` per window and head;
    the mask is that of Swin (arXiv 2103.14030, section 3.2), which the paper's own release leaves out.

    Args:
        query, key, value: `[B*W, H, N, D]`, one floating dtype, any strides: B images of W windows each,
            the windows of an image next to each other.
        bias: `[H, N, N]`, dtype of query or of the accumulation: added to the scores of every window.
        mask: `[W, N, N]`, for window `i % W` of the first dimension. bool: True where the query (row) may see
            the key. Floating (dtype of query or of the accumulation): added to the scores.
        scale: factor on the scores; default `D ** -0.5`.
        dropout_p: probability of dropping an attention weight. Applied whenever it is not zero, as in
            `torch.nn.functional.scaled_dot_product_attention`.
        dropout_seed: 64-bit int, or int64 tensor `[]` on the device of query (which needs no recompilation or copy when
            it changes). The same seed drops the same weights on every backend. None draws one from PyTorch's default
            generator.
        backend: `"torch"`, `"flex"`, `"triton"` or `"auto"` (see `choose_backend`).

    Returns:
        `[B*W, H, N, D]`, dtype of query. A row with no visible key is zero, and so are its gradients.

    Raises:
        TypeError: for arguments of the wrong type or mixed dtypes.
        ValueError: for wrong shapes, values or mixed devices.
        BackendUnsupported: when the named backend cannot run this.

    Numerics: scores, softmax and the gradient of `bias` are computed in `promote_types(dtype, float32)`, under
        autocast too. Under autocast, query, key and value are first cast to its dtype. Deterministic. `"triton"` sends
        no gradient to `mask`.

    Examples:
        >>> query, key, value = torch.randn(3, 8, 2, 49, 32)
        >>> window_attention(query, key, value, torch.zeros(2, 49, 49), backend="auto").shape
        torch.Size([8, 2, 49, 32])
    """
    _check_tensors(query=query, key=key, value=value, bias=bias, mask=mask)
    query, key, value = to_autocast(query), to_autocast(key), to_autocast(value)
    _check_floating("query", query)
    if query.ndim != 4:
        raise ValueError(f"query must be [B*W, H, N, D]; got shape {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}; got {tensor.dtype}")
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}; got {tuple(tensor.shape)}")
        _check_device(name, tensor, "query", query)
    windows, heads, tokens, head_dim = query.shape
    if bias is not None:
        _check_companion("bias", bias, (heads, tokens, tokens), "query", query)
    if mask is not None:
        if mask.ndim != 3 or mask.shape[1:] != (tokens, tokens) or mask.shape[0] < 1:
            raise ValueError(f"mask must be [W, {tokens}, {tokens}]; got {tuple(mask.shape)}")
        if windows % mask.shape[0]:
            raise ValueError(
                f"mask must have a number of windows that divides the {windows} of query; got {mask.shape[0]}"
            )
        if mask.dtype != torch.bool:
            _check_companion_dtype("mask", mask, "query", query)
        _check_device("mask", mask, "query", query)
    scale = _checked_scale(scale, head_dim)
    _check_dropout(dropout_p)
    mask_needs_grad = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    precision = _matmul_precision()
    chosen = resolve(backend, Problem(query.device, query.dtype, tokens, head_dim, mask_needs_grad, precision))
    seed = as_seed(dropout_seed, query.device) if dropout_p > 0 else None
    run = contracts.window_attention if chosen == "triton" else reference.window_attention
    return run(query, key, value, bias, mask, seed, scale, dropout_p)


def shifted_window_attention(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: int,
    shift_size: int = 0,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: Backend,
) -> Tensor:
    """Everything between the qkv projection and the output projection of a Swin block, on the whole image.

    Padding to whole windows, cyclic shift, partition, bias gather, region mask, attention, reverse, shift back,
    crop. The projections act per token, so doing this after the first and before the second is exact.

    Paper: Swin (arXiv 2103.14030), section 3.2; with `logit_scale`, the scaled cosine attention of Swin V2
    (arXiv 2111.09883), section 3.2.

    Args:
        qkv: `[B, height, width, 3 * C]`, any strides, as the linear layer leaves it: channels are
            (query, key, value) x heads x head dim.
        bias_table: `[(2 * window_size - 1) ** 2, H]`, dtype of qkv or of the accumulation: the bias by offset,
            entry `(y_q - y_k + w - 1) * (2 * w - 1) + (x_q - x_k + w - 1)`. For V2 pass the finished table,
            `16 * sigmoid(cpb_mlp(coordinates))`.
        num_heads: H, divides C.
        window_size: side w of the square windows.
        shift_size: s, `0 <= s < w`. Where it is not zero, pairs that were not neighbours before the cyclic shift
            get -100 on their score, as Swin does it.
        pad_qkv: `[3 * C]`: the token that fills right and bottom up to whole windows, default zero. In Swin it is
            the bias of the qkv projection, because the padding comes before that projection. Padded tokens are
            visible keys and send gradients to `pad_qkv`.
        scale: factor on the scores; default `D ** -0.5`. Not together with `logit_scale`.
        logit_scale: H values, `[H]` or `[H, 1, 1]`, dtype of qkv or of the accumulation: the *raw* V2 parameter.
            Queries and keys are normalised (norms below 1e-12 count as 1e-12) and scores are multiplied by
            `exp(min(logit_scale, log 100))`; clamped heads get no gradient.
        dropout_p: probability of dropping an attention weight. Applied whenever it is not zero.
        dropout_seed: 64-bit int, or int64 tensor `[]` on the device of qkv (which needs no recompilation or copy when
            it changes). The same seed drops the same weights on every backend. None draws one from PyTorch's default
            generator.
        backend: `"torch"`, `"flex"`, `"triton"` or `"auto"` (see `choose_backend`).

    Returns:
        `[B, height, width, C]`, contiguous, dtype of qkv.

    Raises:
        TypeError: for arguments of the wrong type or mixed dtypes.
        ValueError: for wrong shapes, values or mixed devices.
        BackendUnsupported: when the named backend cannot run this.

    Numerics: as `window_attention`; the gradients of `bias_table` and `logit_scale` are summed in
        `promote_types(dtype, float32)`.

    Examples:
        >>> image = torch.randn(1, 15, 17, 3 * 64)
        >>> shifted_window_attention(image, num_heads=2, window_size=7, shift_size=3, backend="auto").shape
        torch.Size([1, 15, 17, 64])
    """
    _check_tensors(qkv=qkv, bias_table=bias_table, pad_qkv=pad_qkv, logit_scale=logit_scale)
    qkv = to_autocast(qkv)
    _check_floating("qkv", qkv)
    _check_positive_int("num_heads", num_heads)
    _check_positive_int("window_size", window_size)
    if qkv.ndim != 4 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv must be [B, height, width, 3 * C]; got shape {tuple(qkv.shape)}")
    channels = qkv.shape[-1] // 3
    if channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels; got {num_heads}")
    if isinstance(shift_size, bool) or not isinstance(shift_size, int):
        raise TypeError(f"shift_size must be an int; got {type(shift_size).__name__}")
    if not 0 <= shift_size < window_size:
        raise ValueError(f"shift_size must be in [0, window_size = {window_size}); got {shift_size}")
    if bias_table is not None:
        _check_companion("bias_table", bias_table, ((2 * window_size - 1) ** 2, num_heads), "qkv", qkv)
    if pad_qkv is not None:
        _check_companion("pad_qkv", pad_qkv, (3 * channels,), "qkv", qkv)
    if logit_scale is not None:
        if scale is not None:
            raise ValueError("scale and logit_scale exclude each other: cosine attention has no other scale")
        shape = (num_heads,) if logit_scale.ndim == 1 else (num_heads, 1, 1)
        _check_companion("logit_scale", logit_scale, shape, "qkv", qkv)
    head_dim = channels // num_heads
    scale = _checked_scale(scale, head_dim)
    _check_dropout(dropout_p)
    precision = _matmul_precision()
    problem = Problem(qkv.device, qkv.dtype, window_size**2, head_dim, matmul_precision=precision, on_image=True)
    chosen = resolve(backend, problem)
    seed = as_seed(dropout_seed, qkv.device) if dropout_p > 0 else None
    run = contracts_shifted.shifted_window_attention if chosen == "triton" else reference.shifted_window_attention
    return run(
        qkv, bias_table, pad_qkv, logit_scale, seed, num_heads, window_size, shift_size, scale, dropout_p
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _matmul_precision() -> str:
    """Which Dynamo cannot ask for; its guards compile anew when it changes."""
    return torch.get_float32_matmul_precision()


def _check_tensors(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor; got {tensor.dtype}")


def _check_companion(name: str, tensor: Tensor, shape: tuple[int, ...], main_name: str, main: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
    _check_companion_dtype(name, tensor, main_name, main)
    _check_device(name, tensor, main_name, main)


def _check_companion_dtype(name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    allowed = {main.dtype, accumulation_dtype(main.dtype)}
    if tensor.dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        raise TypeError(f"{name} must be {names} beside a {main.dtype} {main_name}; got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    if tensor.device != main.device:
        raise ValueError(f"{name} must be on the device of {main_name}, {main.device}; got {tensor.device}")


def _check_positive_int(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int; got {type(number).__name__}")
    if number < 1:
        raise ValueError(f"{name} must be positive; got {number}")


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return max(head_dim, 1) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, Real | torch.SymFloat):
        raise TypeError(f"scale must be a number; got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite; got {scale}")
    return scale if isinstance(scale, torch.SymFloat) else float(scale)


def _check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1]; got {dropout_p}")
