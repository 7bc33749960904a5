"""Local attention on a token sequence in plain torch: exact, differentiable, and never an `L x L` array.

The three operators of arXiv 2511.05832 once tokens lie on a curve. They equal masked softmax attention under
`vitreous_core.patterns.Window1d`, `Slide1d` and `Neighborhood1d` (which the tests compare them with) and do work
proportional to the visible pairs: windows become a batch of small attentions; bands are cut into blocks of
consecutive queries, each of which reads one run of consecutive keys. No gather and no scatter, so two runs agree
bitwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TokenBias = Callable[[Tensor, Tensor], Tensor]
"""Maps broadcastable int64 token indices of queries and keys `[...]` to biases `[H, ...]`."""

_SHORTEST_BLOCK = 32  # queries per block of a band: below this the products are too small to be worth a call


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, size: int, shift: int = 0, *, scale: float, bias: TokenBias | None
) -> Tensor:
    """Token `i` sees `j` iff `(i + shift) // size == (j + shift) // size`.

    Args:
        query, key, value: `[B, H, L, D]`, any L, any strides.
        size: tokens per window; the first and the last window are cut where they do not fit.
        shift: `0 <= shift < size`.
        scale: factor on the scores.
        bias: added to the scores.

    Returns:
        `[B, H, L, D]`, dtype of `value`.
    """
    length = int(query.shape[2])
    first = min((size - shift) % size, length)
    whole = (length - first) // size
    parts, start = [], 0
    # Cutting off the two short windows keeps every batch free of padding, hence free of masks.
    for windows, tokens in ((1, first), (whole, size), (1, length - first - whole * size)):
        if windows * tokens == 0:
            continue
        stop = start + windows * tokens
        q, k, v = (t[:, :, start:stop].unflatten(2, (windows, tokens)) for t in (query, key, value))
        index = torch.arange(start, stop, device=query.device).view(windows, tokens)
        tile = None if bias is None else bias(index[:, :, None], index[:, None, :])
        parts.append(attend(q, k.mT, v, scale, tile).flatten(2, 3))
        start = stop
    return _join(parts, value)


def slide_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: int, *, scale: float, bias: TokenBias | None
) -> Tensor:
    """Token `i` sees `j` iff `|i - j| <= kernel // 2`; fewer keys at both ends. `kernel` is odd.

    Args and Returns: as `window_attention`.
    """
    length = int(query.shape[2])
    reach = min(kernel // 2, length - 1)
    key, value = (F.pad(t, (0, 0, reach, reach)) for t in (key, value))
    parts = _band(query, key, value, 2 * reach + 1, -reach, length, scale, bias, first=0)
    return _join(parts, value)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: int, *, scale: float, bias: TokenBias | None
) -> Tensor:
    """Token `i` sees the `kernel` tokens from `clamp(i - kernel // 2, 0, L - kernel)` on, or all when L is smaller.

    Args and Returns: as `window_attention`.
    """
    length = int(query.shape[2])
    kernel = min(kernel, length)
    left = kernel // 2
    inner = length - kernel + 1
    index = torch.arange(length, device=query.device)

    def end(queries: slice, keys: slice) -> list[Tensor]:
        """The queries of one end, which all see the same keys."""
        q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        if q.shape[2] == 0:
            return []
        tile = None if bias is None else bias(index[queries, None], index[None, keys])
        return [attend(q, k.mT, v, scale, tile)]

    parts = end(slice(0, left), slice(0, kernel))
    parts += _band(query[:, :, left : left + inner], key, value, kernel, 0, length, scale, bias, first=left)
    parts += end(slice(left + inner, length), slice(length - kernel, length))
    return _join(parts, value)


def _band(
    query: Tensor, key: Tensor, value: Tensor, kernel: int, offset: int, length: int, scale: float,
    bias: TokenBias | None, *, first: int,
) -> list[Tensor]:  # fmt: skip
    """Row `m` of `query` sees rows `m .. m + kernel - 1` of `key`, except those that lie outside the sequence.

    Row `m` of `query` is token `first + m`; row `n` of `key` is token `offset + n`, which is padding where it is
    not in `0 .. length - 1`.
    """
    rows = int(query.shape[2])
    block = min(max(kernel, _SHORTEST_BLOCK), rows)
    parts = []
    for start, blocks, size in ((0, rows // block, block), (rows - rows % block, 1, rows % block)):
        if size == 0:
            continue
        stop, run = start + blocks * size, size + kernel - 1
        q = query[:, :, start:stop].unflatten(2, (blocks, size))
        k, v = (t[:, :, start : stop + kernel - 1].unfold(2, run, size) for t in (key, value))  # [B, H, G, D, run]

        step = torch.arange(run, device=query.device)
        lag = step - step[:size, None]
        visible = (lag >= 0) & (lag < kernel)
        corner = torch.arange(start, stop, size, device=query.device)[:, None, None]
        token = corner + offset + step
        if offset < 0:
            visible = visible & (token >= 0) & (token < length)
        tile = None
        if bias is not None:
            tile = bias(corner + first + step[:size, None], token.clamp(0, length - 1))
        parts.append(attend(q, k, v.mT, scale, tile, visible).flatten(2, 3))
    return parts


def attend(
    query: Tensor, key_transposed: Tensor, value: Tensor, scale: float, tile: Tensor | None,
    visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of `[B, H, ..., N, D]` on `[B, H, ..., D, K]`; scores and softmax in fp32 at least.

    `tile` is `[H, ..., N, K]` and `visible` broadcasts to it; every row must have a visible key.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) * scale) @ key_transposed.to(dtype)
    if tile is not None:
        scores = scores + tile
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ value.to(dtype)).to(value.dtype)


def _join(parts: list[Tensor], value: Tensor) -> Tensor:
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
