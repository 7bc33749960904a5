"""Attention of one head in windows, between the convolutions of cascaded group attention, with gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitreous_core.autocast import autocast_dtype, to_autocast
from vitreous_core.errors import BackendUnsupported
from vitreous_core.triton_support import device_reasons, dtype_reasons

from . import head_contract
from .api import Backend, check_backend

_MOST_TOKENS, _WIDEST_KEY, _WIDEST_VALUE = 64, 64, 128


def head_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float, *, backend: Backend
) -> Tensor:
    """`softmax(scale q k^T + bias) v` over the tokens of each window, the bias of (query, key) `table[|dy| r + |dx|]`.

    **Paper**: arXiv 2305.07027, "Cascaded Group Attention": what stands between a head's convolutions, whose batch
    norms need all windows while training.

    Args:
        query, key: `[B*W, D, r, r]`, one floating dtype, any strides; may be slices of one convolution's output.
        value: `[B*W, d, r, r]`, likewise.
        table: `[r * r]`, of the head, any floating dtype.
        scale: on the scores.
        backend: `"torch"`, `"triton"` or `"auto"` (`choose_head_backend`).

    Returns:
        `[B*W, d, r, r]`, dtype of the values. From Triton in their memory format: channels-last where their channels
        lie side by side.

    Raises:
        TypeError: for mixed dtypes.
        ValueError: for shapes or devices that do not fit together, or an unknown backend.
        BackendUnsupported: when `backend="triton"` cannot run this.

    Numerics: Triton sums products and computes the softmax in fp32, and rounds its weights and the gradient of the
    scores once, as factors of products. Deterministic, in the gradients too; no second derivative. Plain PyTorch rounds
    at each step. Under autocast all but the table are cast to its dtype first.
    """
    if autocast_dtype(value.device) is not None:
        query, key, value = to_autocast(query), to_autocast(key), to_autocast(value)
    _check(query, key, value, table)
    side = value.shape[-1]
    if resolve_head(backend, value.device, value.dtype, side, query.shape[1], value.shape[1]) == "triton":
        return head_contract.head_attention(query, key, value, table, scale)
    bias = spread_table(table, bias_index(side).to(table.device), pairs_of_entries(side).to(table.device))
    return attend(query, key, value, bias, scale)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """`head_attention` in plain operations: on any device, in any floating dtype, differentiable twice.

    Args:
        query, key, value: see there.
        bias: `[N, N]`, N = r * r, rows index queries.
        scale: on the scores before the bias; None when the query has it.
    """
    scores = query.flatten(2).mT @ key.flatten(2)
    weights = ((scores if scale is None else scores * scale) + bias).softmax(dim=-1).to(value.dtype)
    return (value.flatten(2) @ weights.mT).view_as(value)


def choose_head_backend(
    device: torch.device | str, dtype: torch.dtype, window_size: int, key_dim: int, value_dim: int
) -> Backend:
    """What `backend="auto"` runs: on GPUs that can, in half precision, `"triton"` in windows of up to 64 tokens.

    Under `torch.compile` too, which leaves the two products to cuBLAS and writes scores and weights to memory between.
    Not in fp32: there an error of TF32 is the user's choice for products, and no row says that it pays here.

    Args:
        device: of the maps.
        dtype: of query, key and value.
        window_size: r.
        key_dim: D.
        value_dim: d.
    """
    return resolve_head("auto", torch.device(device), dtype, window_size, key_dim, value_dim)


def resolve_head(
    backend: Backend, device: torch.device, dtype: torch.dtype, window_size: int, key_dim: int, value_dim: int
) -> Backend:
    """The backend that runs: `"auto"` chosen, a named one checked and never replaced; sizes as for the choice.

    Raises:
        ValueError: for an unknown backend.
        BackendUnsupported: with every reason why the named backend cannot run this.
    """
    check_backend(backend)
    is_fast = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if backend == "torch" or (backend == "auto" and not is_fast):
        return "torch"
    reasons = device_reasons(device) + dtype_reasons(device, dtype)
    for name, size, most in (
        ("window_size**2", window_size**2, _MOST_TOKENS),
        ("key_dim", key_dim, _WIDEST_KEY),
        ("value_dim", value_dim, _WIDEST_VALUE),
    ):
        if size > most:
            reasons.append(f"{name} must be at most {most}; got {size}")
    if reasons and backend == "triton":
        raise BackendUnsupported(backend, reasons)
    return "torch" if reasons else "triton"


def bias_index(window_size: int) -> Tensor:
    """Table entry of every (query, key) pair of a square window, `|dy| * window_size + |dx|`.

    Returns:
        `[N, N]` int64, N = window_size**2, tokens in row-major order, rows index queries.
    """
    position = torch.arange(window_size**2)
    y, x = position // window_size, position % window_size
    return (y[:, None] - y).abs() * window_size + (x[:, None] - x).abs()


def pairs_of_entries(window_size: int) -> Tensor:
    """The inverse of `bias_index`: the pairs of each table entry as positions in `[N * N]`, and `N * N` as padding.

    A query has at most four keys at `(|dy|, |dx|)`, one in each direction.

    Returns:
        `[N, 4 * N]` int64.
    """
    tokens = window_size**2
    query = torch.arange(tokens)
    y, x = query // window_size, query % window_size
    dy, dx = y[:, None], x[:, None]  # of each entry
    columns = []
    for up, left in itertools.product((-1, 1), repeat=2):
        key_y, key_x = y + up * dy, x + left * dx
        is_key = (key_y >= 0) & (key_y < window_size) & (key_x >= 0) & (key_x < window_size)
        # No step is the same in both directions.
        if up < 0:
            is_key &= dy > 0
        if left < 0:
            is_key &= dx > 0
        columns.append(torch.where(is_key, query * tokens + key_y * window_size + key_x, tokens**2))
    return torch.cat(columns, dim=1)


def spread_table(table: Tensor, index: Tensor, pairs: Tensor) -> Tensor:
    """`table[..., index]`, whose gradient sums over `pairs` in a fixed order instead of adding pair by pair.

    Args:
        table: `[..., N]`.
        index: see `bias_index`.
        pairs: see `pairs_of_entries`.

    Returns:
        `[..., N, N]`.
    """
    if torch.is_grad_enabled() and table.requires_grad:
        spread: Tensor = _SpreadTable.apply(table, index, pairs)
        return spread
    return table[..., index]


class _SpreadTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(pairs)
        return table[..., index]

    @staticmethod
    def backward(ctx: Any, dbias: Tensor) -> tuple[Tensor, None, None]:
        (pairs,) = ctx.saved_tensors
        return F.pad(dbias.flatten(-2), (0, 1))[..., pairs].sum(-1), None, None


def _check(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> None:
    if value.ndim != 4 or value.shape[2] != value.shape[3] or 0 in value.shape[1:]:
        raise ValueError(f"value must be [B*W, d, r, r], only B*W may be 0; got {tuple(value.shape)}")
    windows, _, side, _ = value.shape
    if query.ndim != 4 or query.shape != (windows, query.shape[1], side, side) or not query.shape[1]:
        raise ValueError(f"query must be [{windows}, D, {side}, {side}] as value is; got {tuple(query.shape)}")
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, {tuple(query.shape)}; got {tuple(key.shape)}")
    if table.shape != (side * side,):
        raise ValueError(f"table must be [{side * side}], an entry for each (|dy|, |dx|); got {tuple(table.shape)}")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dtype != value.dtype:
            raise TypeError(f"{name} must have the dtype of value, {value.dtype}; got {tensor.dtype}. Cast it")
    if not table.is_floating_point():
        raise TypeError(f"table must be floating; got {table.dtype}")
    for name, tensor in (("query", query), ("key", key), ("table", table)):
        if tensor.device != value.device:
            raise ValueError(f"{name} must be on the device of value, {value.device}; got {tensor.device}. Move it")
