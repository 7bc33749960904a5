"""The torch implementation of both operations: the specification that every kernel answers to.

Any device, any floating dtype, autograd to any order. Everything between the inputs and the output runs in
`promote_types(dtype, float32)`, under autocast too; the result is rounded once. The only array of N x N scores
kept for the backward pass is the softmax's output. No atomics: two runs agree bitwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreous_core.autocast import without_autocast
from vitreous_core.ops.block_sparse_attention.dropout import keep_mask

REGION_PENALTY = -100.0
"""Added to the score of a pair from different regions of a shifted map. A number, and not minus infinity, because
released Swin weights were trained with it; with the V2 scores (up to 100 + 16) the two can differ."""

MAX_LOGIT_SCALE = math.log(100.0)
"""Upper bound of the V2 logit scale before the exponential (Swin V2, section 3.2)."""

NORM_EPS = 1e-12
"""Lower bound of the norm that V2 divides queries and keys by."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores, softmax and gradients of shared tensors are summed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """See `ops.window_attention`, which has checked the arguments."""
    dtype = accumulation_dtype(query.dtype)
    with without_autocast(query):
        scores = (query.to(dtype) * scale) @ key.to(dtype).mT  # [B*W, H, N, N]
        if bias is not None:
            scores = scores + bias.to(dtype)
        if mask is not None:
            scores = _add_mask(scores, mask)
        if bias is None and mask is None:
            return _attend(scores, value.to(dtype), seed, dropout_p).to(query.dtype)
        # A row of minus infinities has no softmax: give it any finite one and drop its output, gradients included.
        blank = scores.detach().amax(-1, keepdim=True) == -torch.inf
        output = _attend(scores.masked_fill(blank, 0.0), value.to(dtype), seed, dropout_p)
        return output.masked_fill(blank, 0.0).to(query.dtype)


def shifted_window_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    logit_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window_size: int,
    shift_size: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """See `ops.shifted_window_attention`, which has checked the arguments."""
    _, height, width, _ = qkv.shape
    dtype = accumulation_dtype(qkv.dtype)
    with without_autocast(qkv):
        image = _pad(qkv, pad_qkv, window_size)
        _, padded_height, padded_width, _ = image.shape
        if shift_size > 0:
            image = torch.roll(image, (-shift_size, -shift_size), dims=(1, 2))
        query, key, value = _cut(image.to(dtype), num_heads, window_size)  # [B, W, H, N, D] each
        if logit_scale is None:
            query = query * scale
        else:
            factor = logit_factor(logit_scale.to(dtype)).view(num_heads, 1, 1)
            # On the queries and not on the scores, which would have to be kept for the gradient of the factor.
            query = F.normalize(query, dim=-1, eps=NORM_EPS) * factor
            key = F.normalize(key, dim=-1, eps=NORM_EPS)
        scores = query @ key.mT
        if bias_table is not None:
            scores = scores + gather_bias(bias_table.to(dtype), window_size, window_size)
        if shift_size > 0:
            penalty = region_penalty(padded_height, padded_width, window_size, shift_size, qkv.device, dtype)
            scores = scores + penalty[:, None]
        merged = _merge(_attend(scores, value, seed, dropout_p), padded_height, padded_width, window_size)
        if shift_size > 0:
            merged = torch.roll(merged, (shift_size, shift_size), dims=(1, 2))
        return merged[:, :height, :width].to(qkv.dtype).contiguous()


def relative_position_index(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each (query, key) of one window, tokens row-major: int64 `[N, N]`.

    Entry `(y_q - y_k + height - 1) * (2 * width - 1) + (x_q - x_k + width - 1)`.
    """
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    rows = y[:, None] - y[None, :] + height - 1
    columns = x[:, None] - x[None, :] + width - 1
    return rows * (2 * width - 1) + columns


def logit_factor(logit_scale: Tensor) -> Tensor:
    """`exp(min(logit_scale, log 100))`; the gradient passes at the bound itself and is zero above."""
    # Not `clamp`, whose gradient at the bound has changed between releases of PyTorch.
    return logit_scale.masked_fill(logit_scale > MAX_LOGIT_SCALE, MAX_LOGIT_SCALE).exp()


def gather_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Bias `[H, N, N]` of one window from the table `[(2 * height - 1) * (2 * width - 1), H]`.

    Numerics: the gradient of the table is summed in the dtype of `table`, so cast before and not after.
    """
    return table[relative_position_index(height, width, table.device)].permute(2, 0, 1)


def region_penalty(
    height: int, width: int, window_size: int, shift_size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What keeps a shifted window from attending across the wrap: `[W, N, N]`, zero or `REGION_PENALTY`.

    Each axis of the rolled map has three regions, `[0, P - w)`, `[P - w, P - s)` and `[P - s, P)`; a pair is
    penalised when its regions differ on either axis. Padding has no region of its own.

    Args:
        height, width: of the padded map, multiples of `window_size`.
        window_size, shift_size: w and s, `0 < s < w`.
        device, dtype: of the result.
    """

    def regions(length: int) -> Tensor:  # [windows on this axis, window_size]
        position = torch.arange(length, device=device)
        region = (position >= length - window_size).long() + (position >= length - shift_size).long()
        return region.view(-1, window_size)

    rows, columns = regions(height), regions(width)
    region = 3 * rows[:, None, :, None] + columns[None, :, None, :]  # [rows, columns, w, w]
    region = region.reshape(-1, window_size**2)
    apart = region[:, :, None] != region[:, None, :]
    return apart.to(dtype) * REGION_PENALTY


def _add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Add `mask` `[W, N, N]`, or hide where it is False, on scores `[B*W, H, N, N]`."""
    windows = scores.unflatten(0, (scores.shape[0] // mask.shape[0], mask.shape[0]))
    if mask.dtype == torch.bool:
        windows = windows.masked_fill(~mask[:, None], -torch.inf)
    else:
        windows = windows + mask[:, None].to(scores.dtype)
    return windows.flatten(0, 1)


def _attend(scores: Tensor, value: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Softmax of scores `[B*W, H, N, N]` or `[B, W, H, N, N]`, dropout, and the product with the values."""
    weights = torch.softmax(scores, dim=-1)
    if seed is not None:
        heads, tokens = scores.shape[-3], scores.shape[-1]
        windows = math.prod(scores.shape[:-3])
        kept = keep_mask(seed, dropout_p, windows, heads, tokens).view(scores.shape)
        weights = weights * kept * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))
    return weights @ value


def _pad(qkv: Tensor, pad_qkv: Tensor | None, window_size: int) -> Tensor:
    """Pad right and bottom to multiples of the window, with the token `pad_qkv` or with zeros."""
    batch, height, width, channels = qkv.shape
    right, bottom = -width % window_size, -height % window_size
    if right == 0 and bottom == 0:
        return qkv
    if pad_qkv is None:
        return F.pad(qkv, (0, 0, 0, right, 0, bottom))
    token = pad_qkv.to(qkv.dtype)
    qkv = torch.cat([qkv, token.expand(batch, height, right, channels)], dim=2)
    return torch.cat([qkv, token.expand(batch, bottom, width + right, channels)], dim=1)


def _cut(image: Tensor, num_heads: int, window_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, W, H, N, D]` from the packed image; windows and tokens row-major."""
    batch, height, width, channels = image.shape
    rows, columns = height // window_size, width // window_size
    parts = image.view(batch, rows, window_size, columns, window_size, 3, num_heads, channels // 3 // num_heads)
    parts = parts.permute(5, 0, 1, 3, 6, 2, 4, 7)  # [3, B, rows, columns, H, w, w, D]
    query, key, value = parts.flatten(5, 6).flatten(2, 3)
    return query, key, value


def _merge(windows: Tensor, height: int, width: int, window_size: int) -> Tensor:
    """The image `[B, height, width, C]` from windows `[B, W, H, N, D]`; the reverse of `_cut`."""
    rows, columns = height // window_size, width // window_size
    parts = windows.unflatten(3, (window_size, window_size)).unflatten(1, (rows, columns))
    parts = parts.permute(0, 1, 4, 2, 5, 3, 6)  # [B, rows, w, columns, w, H, D]
    return parts.flatten(5, 6).flatten(3, 4).flatten(1, 2)
