"""The public function: contract, checks and the choice of backend."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ...autocast import to_autocast
from ...errors import BackendUnsupported
from ...layout import BlockLayout
from . import contracts, flex, reference, triton
from .bias import DENSE_BIAS_LIMIT, Bias
from .dropout import as_seed

Backend = Literal["torch", "flex", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: Backend,
) -> Tensor:
    """Softmax attention in which each token sees only the keys that `layout` allows.

    Paper: arXiv 2511.05832, section on sparse kernels; `softmax(scale q k^T + bias) v` over visible pairs.

    Args:
        query: `[B, H, L, D]`, fp16, bf16, fp32 or (torch backend) fp64, any strides.
        key, value: `[B, G, L, D]` with `G` dividing `H`: each group of `H / G` query heads shares one. Same dtype
            and device as `query`, any strides.
        layout: of `L` tokens, in the same token order as the tensors; `vitreous_core.patterns` builds it. Moved to
            the tensors' device if need be (`layout.to(device)` beforehand saves the copy).
        bias: added to the scaled scores: `RelativeBias2d`, `RelativeBias1d`, or a dense `[H, L, L]` tensor while
            `L <= DENSE_BIAS_LIMIT`. Trainable.
        scale: factor on the scores; None is `D ** -0.5`.
        dropout_p: probability, `0 <= dropout_p < 1`, with which each weight is dropped after the softmax; the others
            grow by `1 / (1 - dropout_p)`. Pass 0 in evaluation.
        dropout_seed: 64-bit int, or int64 tensor `[]` on the tensors' device (which needs no recompilation or copy
            when it changes). The same seed drops the same weights on every backend. None draws one from PyTorch's
            default generator.
        backend: `"torch"` (the truth), `"flex"` (FlexAttention) or `"triton"`. A named backend never falls back.

    Returns:
        `[B, H, L, D]` in the dtype of `query`. Rows without a visible key are zero; `B = 0` gives an empty result.

    Raises:
        TypeError: for arguments of the wrong type or mixed dtypes.
        ValueError: for shapes, devices, layouts or biases that do not fit together.
        BackendUnsupported: naming every reason, when the backend cannot run this problem.

    Under autocast the tensors (not the bias) are cast to its dtype first, on every backend.

    Numerics: scores, softmax and sums accumulate in fp32 (fp64 for fp64 inputs).

    Examples:
        >>> from vitreous_core.patterns import Window1d
        >>> q = torch.randn(1, 2, 16, 8)
        >>> block_sparse_attention(q, q, q, Window1d(4).layout(4, 4), backend="torch").shape
        torch.Size([1, 2, 16, 8])
    """
    _check_backend(backend)
    query, key, value = (to_autocast(t) if isinstance(t, Tensor) else t for t in (query, key, value))
    _check_tensors(query, key, value)
    _check_rest(query, query.shape[1], query.shape[2], layout, bias, dropout_p)
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else float(scale)
    _check_supported(query, head_dim, layout, _needs_grad(query, key, value, bias), dropout_p, backend)
    seed = as_seed(dropout_seed, query.device) if dropout_p > 0 else None
    layout = layout.to(query.device)
    if backend == "triton":
        # The kernels want a positive scale.
        if scale <= 0:
            query, scale = (query * 0, 1.0) if scale == 0 else (-query, -scale)
        return contracts.attention(query, key, value, layout, bias, scale, dropout_p, seed)
    if query.numel() == 0:
        return torch.zeros_like(query)
    if backend == "flex":
        return flex.attention(query, key, value, layout, bias, scale)
    return reference.attention(query, key, value, layout, bias, scale, dropout_p, seed)


def packed_attention(
    qkv: Tensor,
    layout: BlockLayout,
    *,
    num_heads: int,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: Backend,
) -> Tensor:
    """`block_sparse_attention` of queries, keys and values that lie in one tensor, as one projection leaves them.

    The Triton kernels read that tensor and write its gradient in place: nothing is cut, moved or put together again.

    Args:
        qkv: `[B, L, 3 * C]`, any strides: queries, keys and values side by side, `C = H * D` channels each, one head
            after the other. fp16, bf16, fp32 or (torch backend) fp64.
        num_heads: `H`, a divisor of `C`.
        layout, bias, scale, dropout_p, dropout_seed, backend: as in `block_sparse_attention`.

    Returns:
        `[B, L, C]` in the dtype of `qkv`, heads side by side.

    Raises:
        TypeError, ValueError, BackendUnsupported: as `block_sparse_attention`.

    Under autocast `qkv` (not the bias) is cast to its dtype first, on every backend.

    Numerics: those of `block_sparse_attention`; the dropped weights are the same, too.

    Examples:
        >>> from vitreous_core.patterns import Window1d
        >>> qkv = torch.randn(1, 16, 3 * 2 * 8)
        >>> packed_attention(qkv, Window1d(4).layout(4, 4), num_heads=2, backend="torch").shape
        torch.Size([1, 16, 16])
    """
    _check_backend(backend)
    _check_packed(qkv, num_heads)
    qkv = to_autocast(qkv)
    if backend != "triton" or (scale is not None and scale <= 0):
        query, key, value = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = block_sparse_attention(
            query, key, value, layout, bias=bias, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
            backend=backend,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)
    _check_rest(qkv, num_heads, qkv.shape[1], layout, bias, dropout_p)
    head_dim = qkv.shape[2] // (3 * num_heads)
    _check_supported(qkv, head_dim, layout, True, dropout_p, backend)  # the kernels can always differentiate
    seed = as_seed(dropout_seed, qkv.device) if dropout_p > 0 else None
    scale = head_dim**-0.5 if scale is None else float(scale)
    return contracts.packed_attention(qkv, num_heads, layout.to(qkv.device), bias, scale, dropout_p, seed)


def choose_backend(
    query: Tensor, layout: BlockLayout, needs_grad: bool = True, *, head_dim: int | None = None
) -> Backend:
    """What `backend="auto"` of a module means: the first of triton, flex (on a GPU) and torch that takes the problem.

    A pure function of device, dtype and shape.

    Args:
        query: as in `block_sparse_attention`, or a packed tensor.
        layout: as in `block_sparse_attention`.
        needs_grad: whether gradients will be asked for.
        head_dim: `D`; None is the last side of the query. A packed tensor needs it.
    """
    if query.is_cuda:
        head_dim = query.shape[-1] if head_dim is None else head_dim
        if not triton.unsupported_reasons(query, head_dim, layout, needs_grad):
            return "triton"
        if not flex.unsupported_reasons(query, head_dim, layout, needs_grad):
            return "flex"
    return "torch"


def _needs_grad(query: Tensor, key: Tensor, value: Tensor, bias: Bias | None) -> bool:
    table = bias if bias is None or isinstance(bias, Tensor) else bias.table
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, table))


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {backend!r}")


def _check_supported(
    query: Tensor, head_dim: int, layout: BlockLayout, needs_grad: bool, dropout_p: float, backend: str
) -> None:
    if backend == "torch":
        return
    implementation = flex if backend == "flex" else triton
    reasons = implementation.unsupported_reasons(query, head_dim, layout, needs_grad, dropout_p)
    if reasons:
        raise BackendUnsupported(backend, reasons)


def _check_packed(qkv: Tensor, num_heads: int) -> None:
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a tensor; got {type(qkv).__name__}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an integer; got {num_heads!r}")
    if qkv.ndim != 3:
        raise ValueError(f"qkv must have shape [B, L, 3 * C]; got {tuple(qkv.shape)}")
    if num_heads < 1 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"the channels of qkv must be 3 * num_heads = {3 * num_heads} times the head dimension; got {qkv.shape[2]}"
        )
    if not qkv.is_floating_point():
        raise TypeError(f"qkv must be floating point; got {qkv.dtype}")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape [B, H, L, D]; got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}; got {tensor.dtype}. Cast it")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}; got {tensor.device}. Move it")
    batch, heads, length, head_dim = query.shape
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape; got {tuple(key.shape)} and {tuple(value.shape)}")
    if (key.shape[0], key.shape[2], key.shape[3]) != (batch, length, head_dim):
        raise ValueError(
            f"key must have shape [{batch}, groups, {length}, {head_dim}] to match query; got {tuple(key.shape)}"
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"the heads of key must divide the {heads} heads of query; got {key.shape[1]}")


def _check_rest(
    query: Tensor, heads: int, length: int, layout: BlockLayout, bias: Bias | None, dropout_p: float
) -> None:
    """What a packed tensor and a query are checked for alike; only the device of `query` counts."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout must be a BlockLayout; got {type(layout).__name__}. Call .layout(height, width) on a pattern"
        )
    if layout.length != length:
        raise ValueError(
            f"layout must be of the {length} tokens of the queries; got {layout.length} "
            f"({layout.height} x {layout.width}). Build it for this image size"
        )
    if bias is not None:
        _check_bias(query.device, heads, layout, bias)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1); got {dropout_p}")


def _check_bias(device: torch.device, heads: int, layout: BlockLayout, bias: Bias) -> None:
    length = layout.length
    if isinstance(bias, Tensor):
        if bias.shape != (heads, length, length):
            raise ValueError(f"bias must have shape ({heads}, {length}, {length}); got {tuple(bias.shape)}")
        if length > DENSE_BIAS_LIMIT:
            raise ValueError(
                f"a dense bias is refused above {DENSE_BIAS_LIMIT} tokens; got {length}. Use a relative-position table"
            )
        tensor = bias
    else:
        if not hasattr(bias, "problems"):
            raise TypeError(f"bias must be a RelativeBias2d, RelativeBias1d or tensor; got {type(bias).__name__}")
        problems = bias.problems(layout)
        if bias.heads != heads:
            problems.append(f"bias.table must have one entry per head, {heads}; got {bias.heads}")
        if problems:
            raise ValueError("; ".join(problems))
        tensor = bias.table
    if not tensor.is_floating_point():
        raise TypeError(f"bias must be floating point; got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"bias must be on the device of the queries, {device}; got {tensor.device}. Move it")
