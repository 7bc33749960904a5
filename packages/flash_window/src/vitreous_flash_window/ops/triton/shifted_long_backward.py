"""Backward of long windows on the packed image: the kernels of `long_backward`, then the small gradients.

The gradient of the bias `[H, N, N]` comes as partial sums; each entry of the table sums its places in a fixed order.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitreous_core.kernel_launch import device_of

from ..reference import MAX_LOGIT_SCALE
from .long_arguments import Geometry, rows_contiguous
from .long_backward import Gradients, run_backward
from .long_bias import spread_table
from .long_bias_gradient import bias_partials
from .shifted_long_forward import image_call, image_geometry

_FOLD_ROWS = 8


@triton.jit(do_not_specialize=["parts"])
def _fold_table_kernel(
    partial_ptr, table_ptr, parts, heads, SIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Gradient `[(2 SIDE - 1)^2, H]` of the table from partial sums `[parts, H, N, N]` of that of the bias.

    A program owns one row of the table, an offset `dy`, of one head: it sums the `[x of query, x of key]` tiles of all
    key rows, then the diagonals of the sum. Grid: offsets, heads.
    """
    TOKENS: tl.constexpr = SIDE * SIDE
    SPAN: tl.constexpr = 2 * SIDE - 1
    dy = tl.program_id(0) - (SIDE - 1)
    head = tl.program_id(1)
    query_x = tl.arange(0, BLOCK)[:, None]
    key_x = tl.arange(0, BLOCK)[None, :]
    first, past = tl.maximum(-dy, 0), tl.minimum(SIDE - dy, SIDE)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for part in range(parts):
        base = partial_ptr + (tl.cast(part, tl.int64) * heads + head) * TOKENS * TOKENS
        for start in range(first, past, ROWS):
            # Several loads in flight.
            for row in tl.static_range(ROWS):
                y = start + row
                is_pair = (query_x < tl.where(y < past, SIDE, 0)) & (key_x < SIDE)
                place = ((y + dy) * SIDE + query_x) * TOKENS + y * SIDE + key_x
                total += tl.load(base + place, mask=is_pair, other=0.0)

    for half in tl.static_range(2):
        entry = half * BLOCK + tl.arange(0, BLOCK)
        column = query_x + (SIDE - 1) - entry[None, :]
        diagonals = tl.gather(total, tl.minimum(tl.maximum(column, 0), BLOCK - 1), 1)
        sums = tl.sum(tl.where((column >= 0) & (column < SIDE), diagonals, 0.0), 0)
        tl.store(table_ptr + (tl.program_id(0) * SPAN + entry) * heads + head, sums, mask=entry < SPAN)


def launch_shifted_long_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, statistics: Tensor, bias_table: Tensor | None, pad_qkv: Tensor | None,
    logit_scale: Tensor | None, seed: Tensor | None, num_heads: int, window_size: int, shift_size: int, scale: float,
    dropout_p: float, needs_table: bool, needs_pad: bool, needs_logit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the packed image, table, padding token and logit scale; see `contracts_shifted`."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    geometry = image_geometry(qkv, num_heads, window_size, shift_size)
    if not qkv.numel():
        wanted = ((bias_table, needs_table), (pad_qkv, needs_pad), (logit_scale, needs_logit))
        zeros = (torch.zeros_like(tensor) if needed else qkv.new_empty(0) for tensor, needed in wanted)
        return dqkv, *zeros

    call = image_call(geometry, qkv, bias_table, pad_qkv, logit_scale, seed, scale, dropout_p)
    strips = -(-geometry.tokens // call.config.dkv.rows)
    small = {"dtype": torch.float32, "device": qkv.device}
    heads, head_dim = geometry.heads, geometry.head_dim
    gradients = Gradients(
        *dqkv.unflatten(-1, (3, heads, head_dim)).unbind(3),
        None if logit_scale is None else torch.empty(statistics.shape[1:], **small),
        torch.empty(geometry.units * strips, 2, heads, head_dim, **small) if geometry.has_padding else None,
    )
    turned_bias = None if bias_table is None else spread_table(bias_table, geometry.side, turned=True)
    dout, out = rows_contiguous(dout).unflatten(-1, (heads, head_dim)), out.unflatten(-1, (heads, head_dim))
    delta = run_backward(call, turned_bias, dout, out, statistics, gradients)
    dtable = dpad = dlogit = qkv.new_empty(0)
    if needs_table:
        dtable = _fold_table(bias_partials(call, dout, statistics, delta), geometry).to(bias_table.dtype)
    if needs_pad:
        dpad = _padding_gradient(gradients.padding, pad_qkv)
    if needs_logit:
        dlogit = gradients.logit_rows.sum((0, 2)).view_as(logit_scale)
        dlogit = dlogit.masked_fill(logit_scale > MAX_LOGIT_SCALE, 0.0).to(logit_scale.dtype)
    return dqkv, dtable, dpad, dlogit


def _fold_table(partials: Tensor, geometry: Geometry) -> Tensor:
    side, heads = geometry.side, geometry.heads
    table = torch.empty((2 * side - 1) ** 2, heads, dtype=torch.float32, device=partials.device)
    block = max(2, 1 << (side - 1).bit_length())
    with device_of(partials):
        _fold_table_kernel[(2 * side - 1, heads)](
            partials, table, len(partials), heads, SIDE=side, BLOCK=block, ROWS=_FOLD_ROWS, num_warps=8
        )
    return table


def _padding_gradient(padding: Tensor | None, pad_qkv: Tensor) -> Tensor:
    """Padded queries are cropped, so that only keys and values have a gradient."""
    gradient = torch.zeros(pad_qkv.shape, dtype=torch.float32, device=pad_qkv.device)
    if padding is not None:
        third = len(gradient) // 3
        gradient[third:] = padding.sum(0).flatten()
    return gradient.to(pad_qkv.dtype)
