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
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {backend!r}")
    query, key, value = (to_autocast(t) if isinstance(t, Tensor) else t for t in (query, key, value))
    _check_tensors(query, key, value)
    _check_layout(query, layout)
    if bias is not None:
        _check_bias(query, layout, bias)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1); got {dropout_p}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend != "torch":
        implementation = flex if backend == "flex" else triton
        reasons = implementation.unsupported_reasons(query, layout, _needs_grad(query, key, value, bias), dropout_p)
        if reasons:
            raise BackendUnsupported(backend, reasons)
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


def choose_backend(query: Tensor, layout: BlockLayout, needs_grad: bool = True) -> Backend:
    """What `backend="auto"` of a module means: the first of triton, flex (on a GPU) and torch that takes the problem.

    A pure function of device, dtype and shape.
    """
    if query.is_cuda:
        if not triton.unsupported_reasons(query, layout, needs_grad):
            return "triton"
        if not flex.unsupported_reasons(query, layout, needs_grad):
            return "flex"
    return "torch"


def _needs_grad(query: Tensor, key: Tensor, value: Tensor, bias: Bias | None) -> bool:
    table = bias if bias is None or isinstance(bias, Tensor) else bias.table
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, table))


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


def _check_layout(query: Tensor, layout: BlockLayout) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout must be a BlockLayout; got {type(layout).__name__}. Call .layout(height, width) on a pattern"
        )
    if layout.length != query.shape[2]:
        raise ValueError(
            f"layout must be of the {query.shape[2]} tokens of query; got {layout.length} "
            f"({layout.height} x {layout.width}). Build it for this image size"
        )


def _check_bias(query: Tensor, layout: BlockLayout, bias: Bias) -> None:
    heads, length = query.shape[1], query.shape[2]
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
    if tensor.device != query.device:
        raise ValueError(f"bias must be on the device of query, {query.device}; got {tensor.device}. Move it")
